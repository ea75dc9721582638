"""The one table at the end: `python report.py RESULTS` prints Markdown."""

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
        floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:.3f}"
        times = "" if row["floor_ms"] is None else f"{row['measured_ms'] / row['floor_ms']:.2f}"
        rate = ""
        if row["what"].startswith("decode"):
            sequences = int(row["case"].split(", ")[1].split()[0])
            rate = f"{sequences * 1e3 / row['measured_ms']:.0f}"
        print(f"| {row['what']} | {row['case']} | {row['measured_ms']:.3f} | {floor} | {times} | {rate} |")


if __name__ == "__main__":
    main()
