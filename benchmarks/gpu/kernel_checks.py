"""The plugin's kernels against float64 and against PyTorch, in bf16: `python kernel_checks.py RESULTS [--tiny]`.

The cases are the tests' own (tests/vllm/test_window_attention.py, test_key_pages.py, test_caption_rules.py,
test_segments.py), those of attention and of pages at the heads of the published models. No model, no engine. With
`--tiny` Triton's interpreter runs them, in float32: it cannot multiply bf16.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rows import Rows, leave

# (heads, kv heads, head size) of the published models.
HEADS = {"2B": (16, 8, 128), "3B": (16, 2, 128)}
CASES = ("decode-batch", "unequal-windows", "adjacent-images-with-partial-pages")


def attention_checks(dtype: Any, heads: dict[str, tuple[int, int, int]]) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield case, and what returns the greatest error of window attention."""
    import test_window_attention as cases

    def greatest_error(case: str, sizes: dict[str, int], *, with_text: bool) -> float:
        paged = cases.Paged(cases.CASES[case], **sizes, dtype=dtype, with_text=with_text)
        return float(np.abs(paged.run() - paged.expected).max())

    for name, (num_heads, kv_heads, head_dim) in heads.items():
        sizes = {"heads": num_heads, "kv_heads": kv_heads, "head_dim": head_dim}
        for with_text in (False, True):
            for case in CASES:
                fusion = "ca_tv" if with_text else "ca"
                yield f"{name} {fusion}, {case}", partial(greatest_error, case, sizes, with_text=with_text)


def page_checks(dtype: Any, heads: dict[str, tuple[int, int, int]]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield case, and what raises where a kernel that writes pages differs from PyTorch."""
    import test_key_pages as cases

    for name, (num_heads, kv_heads, head_dim) in heads.items():
        for has_norm in (False, True):
            norms = ", norms" if has_norm else ""
            for rope in cases.ROPES:
                check = partial(cases.test_image_heads, rope, has_norm, dtype, kv_heads, head_dim)
                yield f"{name}, image keys, {rope}{norms}", check
            sizes = (num_heads, kv_heads, head_dim, head_dim)
            yield f"{name}, text keys{norms}", partial(cases.test_text_heads, *sizes, has_norm, dtype)
        yield f"{name}, queries normed alone", partial(cases.test_queries_normed_alone, dtype, num_heads, head_dim)


def rule_checks(dtype: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield case, and what raises where the captioner's rules differ from the Python rules in a single bit."""
    import test_caption_rules as cases

    yield "a session of several frames", cases.test_a_session_of_several_frames
    yield "random sessions", partial(cases.test_random_sessions, 0)
    if not cases.IS_INTERPRETED:  # Neither these many tokens nor this type.
        yield "rows that outgrow their pages", cases.test_rows_that_outgrow_their_pages
        yield f"{dtype}", partial(cases.test_half_precision, dtype)


def segment_checks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield case, and what raises where a step's segments differ from the window rule."""
    import test_segments as cases

    for seed in range(2):
        yield f"random steps, {seed}", partial(cases.test_random_steps, seed)
        yield f"random steps in a graph, {seed}", partial(cases.test_segments_of_a_graph, seed)
    yield "padding", cases.test_padding_has_no_image
    yield "made-up batch", cases.test_made_up_batch_reads_no_row


def outcome(check: Callable[[], Any]) -> float:
    """Return the error that a check measures; of one that only passes or fails 0 or 1. NaN where it cannot run."""
    import torch

    try:
        measured = check()
        return 0.0 if measured is None else measured
    except AssertionError as error:
        print(error)
        return 1.0
    except Exception:  # noqa: BLE001 (printed, and a failure: one kernel that does not compile hides no other)
        traceback.print_exc()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # raises where the device's context is lost: all that follows would fail with it
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small heads, under Triton's interpreter")
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch
    from test_window_attention import TOLERANCE

    start, rows = time.perf_counter(), Rows(options.results)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    heads = {"tiny": (4, 2, 64)} if options.tiny else HEADS
    groups = {
        "window attention": attention_checks(dtype, heads),
        "pages": page_checks(dtype, heads),
        "captioner's rules": rule_checks(dtype),
        "segments": segment_checks(),
    }
    checked = []
    for group, checks in groups.items():
        bound = TOLERANCE[dtype] if group == "window attention" else 0.0
        checked += [rows.check(group, name, outcome(check), bound) for name, check in checks]
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
    rows.add("kernels within their bounds", f"of {len(checked)}", sum(checked), "")
    rows.add("all kernels", f"compiled and run, {dtype}", time.perf_counter() - start, "s")
    sys.stdout.flush()
    if not all(checked):
        raise SystemExit("a kernel is wrong, see FAIL above")
    leave()


if __name__ == "__main__":
    main()
