"""Scores that Kyutai has published of the same protocol. Nothing here was measured by us."""

from __future__ import annotations

from casa_bench.published import table
from casa_eval.tasks import TASKS

KYUTAI = "kyutai-labs/casa, README of March 2026 (896 x 896, one GPU); OCRBench out of 1,000, MME in total"
# In the order of TASKS: chartqa, docvqa, infographic_vqa, ocrbench, textvqa, realworldqa, ai2d, gqa, mme.
SCORES = {
    "Helium1-VL-2B (insertion)": (79.2, 88.3, 58.9, 746, 75.0, 59.6, 65.5, 54.2, 1665),
    "CASA-Helium1-VL-2B": (77.6, 86.3, 55.1, 740, 75.5, 58.2, 66.0, 55.6, 1722),
    "CASA-Helium1-VL-2B-Shared": (75.2, 85.8, 52.0, 728, 74.5, 58.3, 66.2, 55.7, 1637),
    "Qwen2.5-VL-3B (insertion)": (84.0, 93.6, 77.1, 797, 79.3, 62.2, 81.6, 61.0, 2249),
    "CASA-Qwen2_5-VL-3B": (81.8, 87.9, 58.2, 796, 76.5, 62.1, 76.1, 59.4, 1971),
    "CASA-Qwen2_5-VL-3B-Shared": (81.4, 87.8, 59.1, 797, 76.6, 63.0, 74.3, 59.2, 2075),
    "mPLUG-Owl3 8B": (59.2, 55.9, 36.8, 527, 69.0, 63.9, 73.4, 65.0, 1940),
    "mPLUG-Owl3 2B": (48.5, 48.2, 28.1, 450, 62.6, 56.9, 62.6, 61.0, 1551),
}


def published_table(names: list[str]) -> list[str]:
    """Return the lines of Markdown with the published scores of tasks."""
    places = [place for place, name in enumerate(TASKS) if name in names]
    titles = [TASKS[name].title for name in TASKS if name in names]
    rows = [[model, *(str(scores[place]) for place in places)] for model, scores in SCORES.items()]
    return [*table(("published", *titles), rows), "", f"Source: {KYUTAI}."]
