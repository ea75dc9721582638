"""Figures that others have published of the same workloads, with where they stand. Nothing here was measured by us."""

from __future__ import annotations

KYUTAI = "kyutai-labs/casa, README (speed_bench_streaming.py; one H100 80 GB, 896 x 896, 16 tokens a turn)"
MOSS = (
    "MOSS-VL-Realtime 11B, fnlp-vision/sglang-omni-realtime, deployment/moss_vl_realtime/README.md (one H200, BF16, 1 "
    "frame a second)"
)
VSS = (
    "NVIDIA VSS 3.2 RT-VLM, docs.nvidia.com/vss, performance-rt-vlm (8B in FP8 on vLLM, 448 x 448, 8 frames a second "
    "in chunks of 10 s; no state between chunks)"
)
# Model, turns, TTFT in ms, tok/s, KV tokens, peak GiB.
STREAM_ROWS = (
    ("Helium1-VL-2B (insertion)", 256, "80 -> 459", "89.5 -> 20.1", "266,773", "34.2"),
    ("CASA-Helium1-VL-2B", 256, "64 -> 64", "59.2 -> 58.9", "4,629", "6.4"),
    ("CASA-Helium1-VL-2B-Shared", 256, "65 -> 65", "59.0 -> 59.1", "4,629", "5.7"),
    ("CASA-Qwen2_5-VL-3B", 256, "74 -> 73", "40.7 -> 40.6", "4,653", "8.1"),
    ("CASA-Qwen2_5-VL-3B-Shared", 256, "74 -> 74", "40.5 -> 40.6", "4,653", "7.4"),
    ("Helium1-VL-2B (insertion)", 512, "111 -> 917", "81.1 -> 10.9", "533,525", "63.2"),
    ("CASA-Helium1-VL-2B", 512, "63 -> 66", "59.5 -> 59.6", "9,237", "6.8"),
    ("CASA-Helium1-VL-2B-Shared", 512, "64 -> 67", "59.9 -> 59.3", "9,237", "6.2"),
    ("CASA-Qwen2_5-VL-3B", 512, "74 -> 74", "40.4 -> 40.7", "9,261", "8.2"),
    ("CASA-Qwen2_5-VL-3B-Shared", 512, "74 -> 73", "40.1 -> 41.0", "9,261", "7.6"),
)
# Streams, frame p95, TTFT mean and p95, tok/s a stream.
MOSS_ROWS = (
    (1, 158, "513 / 975", 59.0),
    (2, 234, "544 / 1041", 53.2),
    (4, 235, "549 / 1026", 47.8),
    (8, 402, "728 / 1334", 25.6),
    (16, 492, "1685 / 3556", 10.7),
)
# Card, streams with captions, with alerts.
VSS_ROWS = (
    ("H100", "33 (average / p95 of a chunk 4.78 / 6.44 s)", "51 (3.6 / 4.95 s)"),
    ("RTX Pro 6000", "18", "33"),
    ("DGX Spark", "1", "2"),
    ("AGX Thor", "1", "3"),
)


def published_tables(workload: str) -> list[str]:
    """Return the lines of Markdown with what others have published of a workload; none where nothing is known."""
    if workload == "stream":
        header = ("published", "turns", "TTFT, ms, first -> last", "tok/s, first -> last", "KV tokens", "peak GiB")
        return [*table(header, STREAM_ROWS), "", f"Source: {KYUTAI}."]
    if workload == "live":
        moss = table(("MOSS-VL-Realtime, streams", "frame p95, ms", "TTFT mean / p95, ms", "tok/s a stream"), MOSS_ROWS)
        vss = table(("NVIDIA VSS, card", "streams, captions", "streams, alerts"), VSS_ROWS)
        return [*moss, "", f"Source: {MOSS}.", "", *vss, "", f"Source: {VSS}."]
    return []


def table(header: tuple[str, ...], rows: tuple[tuple[object, ...], ...] | list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first column is text, the others are numbers."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
