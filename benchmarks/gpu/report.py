"""One table of what stages have left: `python benchmarks/gpu/report.py FOLDER`, the `--output` of run.py; Markdown.

Floors are left out of a run with `--tiny`: they are a GPU's that did not run it.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEADER = "| stage | what | case | measured | floor | times the floor | tokens/s |\n|---|---|---|---:|---:|---:|---:|"


def table(rows: Iterable[dict[str, Any]], *, is_tiny: bool) -> Iterable[str]:
    """Yield lines of Markdown; `rows` have their stage's name beside what `rows.Rows` writes."""
    yield HEADER
    for row in rows:
        floor = times = rate = ""
        if row["floor"] is not None and not is_tiny:
            floor, times = f"{row['floor']:.3f}", f"{row['value'] / row['floor']:.2f}"
        if row["what"].startswith("decode step"):
            rate = f"{int(row['case'].split(', ')[1].split()[0]) * 1e3 / row['value']:.0f}"
        number = f"{row['value']:,.0f}" if row["value"] >= 10_000 else f"{row['value']:.4g}"
        value = f"{number} {row['unit']}".strip()
        if "bound" in row:
            value = f"{row['value']:.1e} ({'ok' if row['value'] <= row['bound'] else 'TOO MUCH'})"
        yield f"| {row['stage']} | {row['what']} | {row['case']} | {value} | {floor} | {times} | {rate} |"


def main() -> None:
    if len(sys.argv) != 2 or not (folder := Path(sys.argv[1])).is_dir():
        raise SystemExit(__doc__)
    # In the order in which they ran.
    files = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_ctime_ns)
    rows = [{"stage": path.stem} | json.loads(line) for path in files for line in path.read_text().splitlines()]
    if not rows:
        raise SystemExit(f"{folder} holds no results: every stage failed, see its logs.")
    machine_file = folder / "machine.json"
    machine = json.loads(machine_file.read_text()) if machine_file.exists() else {}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
    print("\n".join(table(rows, is_tiny=bool(machine.get("tiny")))))


if __name__ == "__main__":
    main()
