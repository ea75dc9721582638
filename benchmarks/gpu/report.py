"""The one table at the end: `python report.py RESULTS [--tiny]` prints Markdown.

With `--tiny` no floors: they are those of a GPU that did not run it.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1])
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        raise SystemExit(f"{path} holds no results: every measurement failed, see above.")
    print("| what | case | measured, ms | floor, ms | times the floor | tokens/s |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        floor = times = ""
        if row["floor_ms"] is not None and "--tiny" not in sys.argv:
            floor, times = f"{row['floor_ms']:.4f}", f"{row['measured_ms'] / row['floor_ms']:.2f}"
        rate = ""
        if row["what"].startswith("decode"):
            sequences = int(row["case"].split(", ")[1].split()[0])
            rate = f"{sequences * 1e3 / row['measured_ms']:.0f}"
        print(f"| {row['what']} | {row['case']} | {row['measured_ms']:.4f} | {floor} | {times} | {rate} |")


if __name__ == "__main__":
    main()
