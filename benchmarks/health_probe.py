"""Asks a server's `/health` from a process of its own, so that what is measured does not wait for the load's client."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np

EVERY_S = 0.05


class HealthProbe:
    """A context in which `/health` is asked every 50 ms; `summary` afterwards."""

    def __init__(self, url):
        self._url = url
        self._latencies_s = []

    def __enter__(self):
        command = [sys.executable, str(Path(__file__)), self._url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdout.readline()  # It asks from now on.
        return self

    def __exit__(self, *exc):
        output, _ = self._process.communicate("stop\n", timeout=90)
        self._latencies_s = json.loads(output)

    def summary(self):
        """Return how often it was asked, and percentiles in milliseconds."""
        p50, p99, most = (1000 * float(np.percentile(self._latencies_s, p)) for p in (50, 99, 100))
        return {
            "asked": len(self._latencies_s),
            "p50_ms": round(p50, 2),
            "p99_ms": round(p99, 2),
            "max_ms": round(most, 2),
        }


def main():
    """Ask until a line comes on standard input; print the latencies in seconds."""
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    latencies_s = []
    with httpx.Client(base_url=sys.argv[1], timeout=60) as client:
        print("asking", flush=True)
        while not stop.wait(EVERY_S):
            started = time.monotonic()
            client.get("/health").raise_for_status()
            latencies_s.append(time.monotonic() - started)
    print(json.dumps(latencies_s))


if __name__ == "__main__":
    main()
