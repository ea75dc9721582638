"""The tiny presets, one for each backbone: what tests of a model run over, so that a new one is in all of them."""

from casa_engine.presets import PRESETS

TINY_PRESETS = [name for name in PRESETS if name.startswith("tiny-")]
