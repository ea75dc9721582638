"""Time, processor time and memory from `casa-serve` to its first answer, of several installations in turn.

    PYTHONPATH=tests/support python benchmarks/start_time.py .venv/bin/casa-serve ../other/.venv/bin/casa-serve

Each start is a session of its own with default options. Processor time and memory (PSS, in which shared pages are
counted once) are those of all its processes when it has answered. `--priority` gives the session the machine's cores
before everything else at work on it (Linux's autogroup), for which it must be root's.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from serving_process import free_port

QUESTION = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
LIMIT_S = 600


def measure(command: Path, priority: bool) -> tuple[float, float, float]:
    """Return the seconds to the first answer, the processor seconds until then, and MiB of memory."""
    port = free_port()
    begun_s = time.monotonic()
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [command, "--port", str(port)], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            if priority:
                Path(f"/proc/{server.pid}/autogroup").write_text("-19")
            while not answers(port):
                if server.poll() is not None or time.monotonic() - begun_s > LIMIT_S:
                    log.seek(0)
                    raise SystemExit(f"{command} did not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.1)
            answered_s = time.monotonic() - begun_s
            main = psutil.Process(server.pid)
            processes = [main, *main.children(recursive=True)]
            times = [each.cpu_times() for each in processes]
            spent_s = sum(each.user + each.system for each in times)
            memory_bytes = sum(each.memory_full_info().pss for each in processes)
        finally:
            server.terminate()
            server.wait(20)
    return answered_s, spent_s, memory_bytes / 2**20


def answers(port: int) -> bool:
    """Return whether the server has answered a question."""
    try:
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).raise_for_status()
        httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=QUESTION, timeout=60).raise_for_status()
    except httpx.HTTPError:
        return False
    return True


def main() -> None:
    """Run the rounds and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", type=Path, nargs="+", help="casa-serve of each installation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--priority", action="store_true")
    args = parser.parse_args()
    measured: dict[Path, list] = {command: [] for command in args.commands}
    for number in range(args.rounds):
        for command, figures in measured.items():
            figures.append(measure(command, args.priority))
            row = dict(zip(("answer_s", "processor_s", "memory_mib"), figures[-1], strict=True))
            print(json.dumps({"round": number, "command": str(command)} | row), flush=True)
    print("| | first answer | processor time | memory |\n|---|---:|---:|---:|")
    for command, figures in measured.items():
        answer, spent, memory = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {command} | {answer:.1f} s | {spent:.1f} s | {memory:,.0f} MiB |")


if __name__ == "__main__":
    main()
