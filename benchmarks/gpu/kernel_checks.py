"""The plugin's kernels against float64 and against PyTorch, in bf16: `python kernels.py RESULTS [--tiny]`.

The cases are the tests' own (tests/vllm/test_window_attention.py, test_key_pages.py), at the heads of the published
models. No model, no engine. With `--tiny` Triton's interpreter runs them, in float32: it cannot
multiply bf16.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rows import Rows, leave

# (heads, kv heads, head size) of the published models.
HEADS = {"2B": (16, 8, 128), "3B": (16, 2, 128)}
CASES = ("decode-batch", "unequal-windows", "adjacent-images-with-partial-pages")


def attention_errors(dtype: Any, heads: dict[str, tuple[int, int, int]]) -> Iterator[tuple[str, float, float]]:
    """Yield case, greatest error and its bound of window attention."""
    import test_window_attention as cases

    for name, (num_heads, kv_heads, head_dim) in heads.items():
        for with_text in (False, True):
            for case in CASES:
                sizes = {"heads": num_heads, "kv_heads": kv_heads, "head_dim": head_dim}
                paged = cases.Paged(cases.CASES[case], **sizes, dtype=dtype, with_text=with_text)
                error = float(np.abs(paged.run() - paged.expected).max())
                fusion = "ca_tv" if with_text else "ca"
                yield f"{name} {fusion}, {case}, {dtype}".replace("torch.", ""), error, cases.TOLERANCE[dtype]


def page_checks(dtype: Any) -> Iterator[tuple[str, float, float]]:
    """Yield case, 0 or 1 (it differs from PyTorch), and the bound 0 of the kernels that write pages."""
    import test_key_pages as cases

    checks: dict[str, Callable[[], None]] = {}
    for has_norm in (False, True):
        norms = ", norms" if has_norm else ""
        for rope in cases.ROPES:
            checks[f"image keys, {rope}{norms}"] = partial(cases.test_image_heads, rope, has_norm, dtype)
        checks[f"text keys{norms}"] = partial(cases.test_text_heads, 4, 1, 128, 128, has_norm, dtype)
    for name, check in checks.items():
        try:
            check()
            differs = 0.0
        except AssertionError as error:
            print(error)
            differs = 1.0
        yield f"{name}, {dtype}".replace("torch.", ""), differs, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small heads, under Triton's interpreter")
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    start, rows = time.perf_counter(), Rows(options.results)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    heads = {"tiny": (4, 2, 32)} if options.tiny else HEADS
    checked = [rows.check("window attention", *case) for case in attention_errors(dtype, heads)]
    checked += [rows.check("pages", *case) for case in page_checks(dtype)]
    rows.add("kernels within their bounds", f"of {len(checked)}", sum(checked), "")
    rows.add("all kernels", "compiled and run", time.perf_counter() - start, "s")
    sys.stdout.flush()
    if not all(checked):
        raise SystemExit("a kernel is wrong, see FAIL above")
    leave()


if __name__ == "__main__":
    main()
