"""Exported models for tests: made once a session, since tracing a decoder takes some ten seconds."""

import functools
import tempfile
from pathlib import Path

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config
from casa_export.exporter import export_checkpoint

# Small limits, so that tests can exceed them and engines build fast.
LIMITS = {"batch": 3, "text_tokens": 160, "call_tokens": 48, "image_tokens": 64, "call_image_tokens": 128}
KINDS = [(backbone, fusion) for backbone in ("llama", "qwen") for fusion in ("ca", "ca_tv")]


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="casa-export-")


@functools.cache
def checkpoint(backbone: str, fusion: str) -> Path:
    """A random checkpoint of two decoder layers.

    The kinds differ in more than their names say, so that four cover shared weights and replaced layers too.
    """
    fields = {("llama", "ca"): {"ca_placement": "replace", "ca_layers": [1]}, ("qwen", "ca"): {"ca_weights": "shared"}}
    config = preset_config(f"tiny-{backbone}", fusion=fusion)
    text = config.text_config.to_dict() | {"num_hidden_layers": 2, "layer_types": None}
    config = type(config)(**(config.to_dict() | {"text_config": text} | fields.get((backbone, fusion), {})))
    folder = Path(_root().name) / f"{backbone}-{fusion}"
    write_random_checkpoint(config, folder)
    return folder


@functools.cache
def export(backbone: str, fusion: str) -> Path:
    """The fp32 export of `checkpoint(backbone, fusion)`."""
    folder = Path(_root().name) / f"{backbone}-{fusion}-onnx"
    export_checkpoint(checkpoint(backbone, fusion), folder, limits=LIMITS)
    return folder


@functools.cache
def embedded_export() -> Path:
    """The fp32 export of the embedded model, with its default limits."""
    from casa_engine.digits import checkpoint_path

    folder = Path(_root().name) / "embedded-onnx"
    export_checkpoint(checkpoint_path(), folder)
    return folder
