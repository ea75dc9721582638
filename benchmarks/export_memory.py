"""Time and peak memory of exporting a preset of a published model's size, and of loading the graphs.

    python benchmarks/export_memory.py CASA-Helium1-VL-2B --work DIR                  28 layers, 32 vision blocks
    python benchmarks/export_memory.py CASA-Helium1-VL-2B --work DIR --layers 4 --vision-blocks 4

Weights are random. Each stage is a process of its own, so that its peak is its own; DIR needs room for the weights
twice. Memory counts what is mapped from the checkpoint's file as well.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.configuration import CasaConfig
from casa_engine.presets import preset_config
from casa_export.exporter import NUM_STEPS, export_checkpoint
from casa_export.manifest import read_manifest
from casa_export.ort_backend import OrtBackend
from casa_export.progress import Progress


def shortened(preset: str, layers: int | None, blocks: int | None) -> CasaConfig:
    """The preset, with fewer layers where asked; widths and vocabulary stay."""
    config = preset_config(preset)
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    if layers:
        text |= {"num_hidden_layers": layers, "layer_types": None}
    if blocks:
        full = [block for block in vision["fullatt_block_indexes"] if block < blocks]
        vision |= {"depth": blocks, "fullatt_block_indexes": full or [blocks - 1]}
    return CasaConfig(**(config.to_dict() | {"text_config": text, "vision_config": vision}))


def run_stage(options: argparse.Namespace) -> None:
    """One stage, in this process; prints its time and peak."""
    started = time.perf_counter()
    checkpoint, folder = options.work / "checkpoint", options.work / "onnx"
    if options.stage == "write":
        config = shortened(options.preset, options.layers, options.vision_blocks)
        write_random_checkpoint(config, checkpoint, dtype=torch.float16)
    elif options.stage == "export":
        export_checkpoint(checkpoint, folder, "fp16", progress=Progress(NUM_STEPS))
    else:
        # One at a time, as stored: ONNX Runtime's CPU provider would turn all fp16 weights into fp32 at once.
        manifest = read_manifest(folder)
        for name in manifest.graphs:
            one = type(manifest)(**{**vars(manifest), "graphs": {name: manifest.graphs[name]}})
            OrtBackend(folder, one, num_threads=1, optimize=False)
            print(f"  {name}: loaded after {time.perf_counter() - started:.0f} s")
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(f"{options.stage}: {time.perf_counter() - started:.0f} s, peak {peak_gib:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint and graphs; not removed")
    parser.add_argument("--layers", type=int, help="decoder layers; default: the preset's")
    parser.add_argument("--vision-blocks", type=int, help="default: the preset's")
    parser.add_argument("--stage", choices=("write", "export", "load"), help="only this one, in this process")
    options = parser.parse_args()
    if options.stage:
        run_stage(options)
        return
    for stage in ("write", "export", "load"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", stage], check=True)
    size = sum(path.stat().st_size for path in (options.work / "onnx").iterdir())
    print(f"graphs: {size / (1 << 30):.2f} GiB")


if __name__ == "__main__":
    main()
