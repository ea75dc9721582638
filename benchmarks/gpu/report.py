"""One table of what stages have left: `python benchmarks/gpu/report.py FOLDER [FOLDER ...]`; Markdown.

The folders are the `--output` of run.py, one for each of its commands. Stages stand in the order of run.py. Floors and
goals are left out of a run with `--tiny`: they are a GPU's that did not run it.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from goals import goal
from run import STAGES

COLUMNS = ("stage", "what", "case", "measured", "goal (H200)", "floor", "times the floor", "tokens/s")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * 3}{'---:|' * 5}"


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
        aim = "" if is_tiny else goal(row)
        yield f"| {row['stage']} | {row['what']} | {row['case']} | {value} | {aim} | {floor} | {times} | {rate} |"


def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each stage."""
    return {
        name: [{"stage": name} | json.loads(line) for line in path.read_text().splitlines()]
        for name in STAGES
        if (path := folder / f"{name}.jsonl").exists()
    }


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders or not all(folder.is_dir() for folder in folders):
        raise SystemExit(__doc__)
    stages: dict[str, list[dict[str, Any]]] = {}
    is_tiny = False
    for folder in folders:
        found = results(folder)
        if not any(found.values()):
            raise SystemExit(f"{folder} holds no results: every stage failed, see its logs.")
        for name, rows in found.items():
            stages[name] = stages.get(name, []) + rows
        machine_file = folder / "machine.json"
        machine = json.loads(machine_file.read_text()) if machine_file.exists() else {}
        is_tiny |= bool(machine.get("tiny"))
        print(", ".join(f"{key} {value}" for key, value in machine.items()), f"({', '.join(found)})", end="\n\n")
    in_order = [row for name in STAGES for row in stages.get(name, [])]
    print("\n".join(table(in_order, is_tiny=is_tiny)))


if __name__ == "__main__":
    main()
