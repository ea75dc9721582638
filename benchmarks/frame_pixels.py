"""A frame from JPEG to the vision encoder: bytes over the process border, processor time, launches on the device.

    python benchmarks/frame_pixels.py [--runs 30] [--json]

Each stage runs in one thread; printed is the least processor time of all runs. `decode`, `key` and `resize` are the
server's share; `key` is the digest of a live frame's pixels (that of a chat's file costs next to nothing). `patches` is
the engine's: normalise, cut and double, here on a CPU; launches are what PyTorch dispatches, on a CUDA device a kernel
each. `processor` is the image processor as the eager model calls it, in place of the last two: it sends float32.
"""

import argparse
import json
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from kernel_counts import LaunchCounter
from PIL import Image

from casa_engine.checkpoints import default_processor
from casa_engine.image_patches import PatchValues
from casa_engine.image_preparation import read_image
from casa_engine.presets import preset_config
from casa_vllm.image_items import content_key

# Sides of the picture as it is sent, and as the processor leaves it.
FRAMES = {"448 px": (448, 448), "896 px": (896, 896), "1280 px to 896 px": (1280, 896)}


def jpeg(side: int) -> bytes:
    """Return a square JPEG with the detail of a photograph: smooth noise."""
    noise = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def least_ms(run: Callable[[], Any], runs: int) -> float:
    """Return the least processor time of this thread, in ms."""
    times = []
    for _ in range(runs):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return round(1e3 * min(times), 2)


def measure(sent_side: int, side: int, runs: int) -> dict[str, Any]:
    """Measure one frame."""
    processor = default_processor(preset_config("tiny-qwen"))
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": side * side}
    file, values = jpeg(sent_side), PatchValues(processor.image_processor)
    image = read_image(file, "JPEG")
    pixels, grid = processor.image_bytes(image)
    floats = processor.process_images([image])["pixel_values"]
    assert torch.equal(values(pixels, grid[None]), floats)
    values(pixels, grid[None], torch.bfloat16)  # The table in 16 bits is made once.
    with LaunchCounter().counting() as launches:
        values(pixels, grid[None], torch.bfloat16)
    return {
        "decode_ms": least_ms(lambda: read_image(file, "JPEG"), runs),
        "key_ms": least_ms(lambda: content_key(image, ""), runs),
        "resize_ms": least_ms(lambda: processor.image_bytes(image), runs),
        "patches_ms": least_ms(lambda: values(pixels, grid[None]), runs),
        "sent_bytes": pixels.nbytes,
        "launches": launches.total(),
        "processor_ms": least_ms(lambda: processor.process_images([image]), runs),
        "processor_bytes": floats.nbytes,
    }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="runs of each stage")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(*sides, options.runs) for name, sides in FRAMES.items()}
    if options.json:
        print(json.dumps(results, indent=1))
        return
    columns = list(next(iter(results.values())))
    print(f"| frame | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, result in results.items():
        print(f"| {name} | {' | '.join(f'{result[column]:,}' for column in columns)} |")


if __name__ == "__main__":
    main()
