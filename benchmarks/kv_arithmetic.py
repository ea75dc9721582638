"""KV-cache bytes of a conversation with many frames, CASA against token insertion.

Arithmetic from the presets' configurations, not a measurement; `benchmarks/` holds those. Each
frame brings its image tokens and a few text tokens, as in a captioned video:

    insertion   every image token stays in the text KV cache for good
    CASA        the text KV cache knows text only; at most two frames' images are in pages at
                once (the window being read and the one being opened)

`python benchmarks/kv_arithmetic.py` prints the table of the README.
"""

from __future__ import annotations

from casa_engine.configuration import CasaConfig
from casa_engine.presets import preset_config

FRAMES = (1, 10, 100, 1_000)
FRAME_PX = 448
TEXT_TOKENS = 7  # two delimiters and five words a frame
BYTES_PER_VALUE = 2  # bf16
LIVE_IMAGES = 2
MODELS = (("Helium 2B", "CASA-Helium1-VL-2B"), ("Qwen2.5-VL 3B", "CASA-Qwen2_5-VL-3B"))


def token_bytes(config: CasaConfig) -> int:
    """Return the bytes of one token's keys and values in one layer."""
    return 2 * config.text_config.num_key_value_heads * config.head_dim * BYTES_PER_VALUE


def image_tokens(config: CasaConfig, side_px: int = FRAME_PX) -> int:
    """Return the image tokens of a square frame whose sides are multiples of 28 pixels."""
    vision = config.vision_config
    return (side_px // (vision.patch_size * vision.spatial_merge_size)) ** 2


def kv_bytes(config: CasaConfig, num_frames: int) -> int:
    """Return the KV-cache bytes of a conversation of `num_frames` frames with their text."""
    num_layers = config.text_config.num_hidden_layers
    text = num_frames * TEXT_TOKENS
    images = num_frames * image_tokens(config)
    if not config.is_cross_attention:
        return (text + images) * num_layers * token_bytes(config)
    num_ca = len(config.cross_attention_layers)
    num_text_caches = sum(config.has_sa(layer) for layer in range(num_layers))
    if config.sees_window_text and config.ca_weights == "own":
        num_text_caches += num_ca
    live = min(num_frames, LIVE_IMAGES) * image_tokens(config)
    return (text * num_text_caches + live * num_ca) * token_bytes(config)


def readable(num_bytes: int) -> str:
    """Return bytes as MB or GB with three figures."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            value = num_bytes / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return f"{num_bytes / 1000:.0f} kB"


def table() -> list[str]:
    """Return the lines of the Markdown table."""
    lines = [
        "| KV cache after | " + " | ".join(f"{frames:,} frames" for frames in FRAMES) + " |",
        "|---|" + "---:|" * len(FRAMES),
    ]
    for label, preset in MODELS:
        for fusion, name in (("insertion", "token insertion"), ("ca", "CASA"), ("ca_tv", "CASA_t+v")):
            config = preset_config(preset, fusion=fusion)
            cells = " | ".join(readable(kv_bytes(config, frames)) for frames in FRAMES)
            lines.append(f"| {label}, {name} | {cells} |")
    return [line.replace(" 1 frames", " 1 frame") for line in lines]


if __name__ == "__main__":
    print("\n".join(table()))
