"""Compiles the plugin's Triton kernels ahead of time, and lists what each takes of a multiprocessor; no GPU is needed.

    python benchmarks/kernel_resources.py [--architectures 80 90 100] [--dtypes bf16 fp16 fp32] [--head-sizes 64 128]
    python benchmarks/kernel_resources.py --ranges     # the tables of docs/benchmarks.md: a row a kernel

Down to machine code, with the constants that the launches use, at the heads of the 3B preset (16, 2 for keys and
values). Registers are of a thread and at most 255; local memory is what did not fit into them. Shared memory is of a
program: the multiprocessors have 164 (sm_80) and 228 KiB (sm_90, sm_100).
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from casa_vllm.caption_rules import tensors, triton_rules
from casa_vllm.ops import triton_build_segments, triton_key_pages, triton_window_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURES, HEAD_SIZES = (80, 90, 100), (64, 128)
NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, SPLITS = 16, 2, 16, 16
# Types of arguments; a pointer that is not here is to the model's type, any other argument is an int32.
INT32 = {
    "query_start_loc_ptr", "image_table_ptr", "page_lens_ptr", "num_pages_ptr",
    "text_table_ptr", "text_rows_ptr", "text_starts_ptr", "first_positions_ptr",
    "state_ptr", "splits_ptr", "table_ptr", "fields_ptr", "pages_ptr", "padded_starts_ptr",
    "new_ids_ptr", "page_table_ptr", "ids_ptr", "sizes_ptr", "stop_ids_ptr", "recent_ptr",
}  # fmt: skip
INT64 = {"slots_ptr", "positions_ptr", "caches_ptr", "rows_ptr", "relative_ptr"}
FLOAT32 = {"partial_ptr", "max_ptr", "sum_ptr", "cos_ptr", "sin_ptr"}
FLOAT64 = {"counts_ptr", "numbers_ptr"}
SCALARS = {"scale", "eps"}


@dataclass(frozen=True)
class Case:
    """A kernel with the constants of one launch.

    Attributes:
        name: Of the launch.
        kernel: Triton's function.
        constants: Its `constexpr` arguments.
        num_warps: Of a program.
        enable_fp_fusion: Whether a multiplication and an addition may be one instruction.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: Of a thread.
        local_bytes: Of a thread, in memory for want of registers.
        shared_bytes: Of a program.
    """

    registers: int
    local_bytes: int
    shared_bytes: int


def cases(head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield every kernel that a decode step, a prefill or a frame launches, and those of the captioner's rules."""
    attention, pages = triton_window_attention, triton_key_pages
    for has_text in (False, True):
        fusion = "ca_tv" if has_text else "ca"
        blocks = {"IMAGE_BLOCK": BLOCK_SIZE, "TEXT_BLOCK": BLOCK_SIZE, "HAS_TEXT": has_text}
        for is_decode, splits in ((True, SPLITS), (True, 1), (False, 1)):
            tiles = attention.tile_constants(head_dim, NUM_HEADS // NUM_KV_HEADS, dtype, is_decode=is_decode)
            name = f"{fusion} {'decode' if is_decode else 'prefill'}, {splits} splits"
            constants = blocks | tiles | {"SPLITS": splits, "BESIDE": NUM_HEADS * head_dim}
            yield Case(name, attention._window_attention_kernel, constants, 4)
    sizes = {"HEAD_DIM": head_dim, "DIMS": triton.next_power_of_2(head_dim)}
    merging = sizes | {"SPLITS": SPLITS, "BESIDE": NUM_HEADS * head_dim}
    yield Case("merge splits", attention._merge_splits_kernel, merging, 4)
    cells = NUM_KV_HEADS * head_dim
    writing = {"BLOCK": BLOCK_SIZE, "CELLS": cells, "CELLS_PADDED": triton.next_power_of_2(cells), "HEAD_DIM": head_dim}
    yield Case("write pages", attention._write_pages_kernel, writing, 4)
    for has_norm in (False, True):
        suffix = ", norms" if has_norm else ""
        constants = sizes | {"BLOCK": BLOCK_SIZE, "HAS_NORM": has_norm}
        text = constants | {"NUM_HEADS": NUM_HEADS, "ROTARY_DIM": head_dim, "HAS_KEYS": True}
        yield Case(f"text heads{suffix}", pages._text_heads_kernel, text, 1)
        for has_rope in (False, True):
            image = constants | {"NUM_HEADS": NUM_KV_HEADS, "HAS_ROPE": has_rope}
            name = f"image heads{', rotation' if has_rope else ''}{suffix}"
            yield Case(name, pages._image_heads_kernel, image, 1)
    for is_split, is_padded in product((False, True), repeat=2):
        constants = {"IS_SPLIT": is_split, "HAS_TEXT": True, "IS_PADDED": is_padded}
        constants["BLOCK"] = triton_build_segments.BLOCK
        name = f"segments, {'split' if is_split else 'a request each'}{', of a graph' if is_padded else ''}"
        yield Case(name, triton_build_segments._build_segments_kernel, constants, 4)
    alone = {"NUM_HEADS": NUM_HEADS, "BLOCK": 1, "ROTARY_DIM": 0, "HAS_NORM": True, "HAS_KEYS": False}
    yield Case("queries alone, norms", pages._text_heads_kernel, sizes | alone, 1)
    penalty = {"PAGE": tensors.PAGE, "BLOCK": triton_rules.BLOCK}
    yield Case("caption penalty", triton_rules._penalty_kernel, penalty, 8, enable_fp_fusion=False)
    ngrams = {"RING": tensors.RING, "BLOCK": triton_rules.WINDOW_BLOCK}
    yield Case("caption n-grams", triton_rules._ngram_kernel, ngrams, 1)


def compile_case(case: Case, architecture: int, dtype: str) -> Any:
    """Return Triton's compiled kernel; arguments that a launch specialises are multiples of 16."""

    def type_of(argument: str) -> str:
        if argument in case.constants:
            return "constexpr"
        if not argument.endswith("_ptr"):
            return "fp32" if argument in SCALARS else "i32"
        names = {"*i32": INT32, "*i64": INT64, "*fp32": FLOAT32, "*fp64": FLOAT64}
        return next((type_ for type_, arguments in names.items() if argument in arguments), f"*{dtype}")

    signature = {name: type_of(name) for name in case.kernel.arg_names}
    specialised = [
        index
        for index, parameter in enumerate(case.kernel.params)
        if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        and signature[parameter.name] not in ("constexpr", "fp32")
    ]
    source = ASTSource(
        case.kernel,
        signature,
        constexprs={(case.kernel.arg_names.index(name),): value for name, value in case.constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in specialised},
    )
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": case.num_warps, "enable_fp_fusion": case.enable_fp_fusion}
    return triton.compile(source, target=target, options=options)


def resources_of(compiled: Any) -> Resources:
    """Return what the machine code says of itself."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared)


def list_resources(options: argparse.Namespace) -> Iterator[tuple[int, str, int, str, Resources]]:
    """Yield architecture, type, head size and name of every kernel, and what it takes."""
    for architecture, dtype, head_dim in product(options.architectures, options.dtypes, options.head_sizes):
        for case in cases(head_dim, DTYPES[dtype]):
            yield architecture, dtype, head_dim, case.name, resources_of(compile_case(case, architecture, dtype))


def print_all(options: argparse.Namespace) -> None:
    """Print a row for each kernel, architecture, type and head size."""
    print("| architecture | type | head size | kernel | registers | local memory, bytes | shared memory, bytes |")
    print("|---|---|---:|---|---:|---:|---:|")
    for architecture, *row, used in list_resources(options):
        cells = (f"sm_{architecture}", *row, used.registers, used.local_bytes, used.shared_bytes)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def span(numbers: Iterable[int]) -> str:
    """Return the least and the most of the numbers, or the one that all are."""
    different = sorted(set(numbers))
    return " to ".join(f"{number:,}" for number in (different[0], different[-1])[: len(different)])


def print_ranges(options: argparse.Namespace) -> None:
    """Print a table for each width of types: a row a kernel, registers by architecture."""
    taken: dict[int, dict[str, list[tuple[int, Resources]]]] = {}
    for architecture, dtype, _, name, used in list_resources(options):
        of_width = taken.setdefault(8 * DTYPES[dtype].itemsize, {})
        of_width.setdefault(name, []).append((architecture, used))
    registers = [f"registers, sm_{architecture}" for architecture in options.architectures]
    for width, of_width in sorted(taken.items()):
        heads = [f"{width} bits", *registers, "shared memory, bytes", "local memory, bytes"]
        print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
        for name, rows in of_width.items():
            cells = [span(used.registers for gpu, used in rows if gpu == each) for each in options.architectures]
            cells += [span(used.shared_bytes for _, used in rows), span(used.local_bytes for _, used in rows)]
            print(f"| {name} | {' | '.join(cells)} |")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-sizes", type=int, nargs="+", default=HEAD_SIZES)
    parser.add_argument("--ranges", action="store_true", help="least and most of each kernel over types and head sizes")
    options = parser.parse_args()
    (print_ranges if options.ranges else print_all)(options)


if __name__ == "__main__":
    main()
