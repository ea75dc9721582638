"""Exported models for tests: made once a session, since tracing a decoder takes some ten seconds."""

import functools
import tempfile
from pathlib import Path

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.configuration import CasaConfig
from casa_engine.presets import preset_config
from casa_export.exporter import export_checkpoint

# Small limits, so that tests can exceed them and engines build fast.
LIMITS = {"batch": 3, "text_tokens": 160, "call_tokens": 48, "image_tokens": 64, "call_image_tokens": 128}
KINDS = [("llama", "ca"), ("llama", "ca_tv"), ("qwen", "ca"), ("qwen", "ca_tv"), ("qwen3", "ca_tv")]


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="casa-export-")


# Tracing costs some six seconds a decoder layer, so most kinds have one. They differ in more than their names say: a
# replaced layer, shared weights, an encoder with only windowed or only full attention.
VARIANTS = {
    ("llama", "ca"): {"layers": 2, "vision": {"depth": 2}, "fields": {"ca_placement": "replace", "ca_layers": [1]}},
    ("llama", "ca_tv"): {
        "layers": 1,
        "vision": {"depth": 1, "fullatt_block_indexes": []},
        "fields": {"image_norm": True},
    },
    ("qwen", "ca"): {
        "layers": 1,
        "vision": {"depth": 1, "fullatt_block_indexes": [0]},
        "fields": {"ca_weights": "shared"},
    },
    ("qwen", "ca_tv"): {"layers": 1, "vision": {"depth": 1, "fullatt_block_indexes": []}, "fields": {}},
    ("qwen3", "ca_tv"): {"layers": 1, "vision": {"depth": 1, "fullatt_block_indexes": [0]}, "fields": {}},
}


@functools.cache
def checkpoint(backbone: str, fusion: str) -> Path:
    """A tiny random checkpoint of a kind."""
    config, variant = preset_config(f"tiny-{backbone}", fusion=fusion), VARIANTS[backbone, fusion]
    parts = {
        "text_config": config.text_config.to_dict() | {"num_hidden_layers": variant["layers"], "layer_types": None},
        "vision_config": config.vision_config.to_dict() | variant["vision"],
    }
    folder = Path(_root().name) / f"{backbone}-{fusion}"
    write_random_checkpoint(CasaConfig(**(config.to_dict() | parts | variant["fields"])), folder)
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
