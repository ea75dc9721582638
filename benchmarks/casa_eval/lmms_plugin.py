"""Names the model `casa` to lmms-eval, by its entry-point group `lmms_eval.models` (lmms-eval 0.7.3)."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's description of the model: its name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="casa", chat_class_path="casa_eval.lmms_model.Casa")
