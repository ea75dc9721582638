"""From nothing to the first answer: how long `casa-serve --ray` takes to be ready, and its first request beside others.

    python benchmarks/cluster_cold.py [--config CONFIG.yaml]

starts `casa-serve --ray` with the embedded model and one replica, waits until it is ready, and asks about
an image once, which is the first request of a client, and then twenty times about others.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from cluster_local import HOST, chat_body, model_name, noise_url, summary_ms

STOP_S = 120


def ask_s(client, model, seed, tokens):
    """Seconds that a chat request about an image nobody has seen takes."""
    body = chat_body(model, "Read the digits.", noise_url(seed, 112), max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    client.post("/v1/chat/completions", json=body).raise_for_status()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a cluster configuration; default: none")
    parser.add_argument("--requests", type=int, default=20, help="warm ones (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer (%(default)s)")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    command = [str(Path(sys.executable).with_name("casa-serve")), "--ray"]
    command += [str(options.config)] if options.config else []
    command += ["--port", str(options.port)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            if not any("ready at" in line for line in process.stdout):
                raise RuntimeError(f"casa-serve ended with status {process.wait()} before it was ready.")
            ready_s = time.perf_counter() - started
            url = f"http://{HOST}:{options.port}"
            # The name as a client knows it; no request of a model.
            with httpx.Client(base_url=url, timeout=300) as client:
                model = model_name(url)
                first_s = ask_s(client, model, 0, options.tokens)
                warm = [ask_s(client, model, 1 + number, options.tokens) for number in range(options.requests)]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)
    warm_ms = summary_ms(warm)
    result = {
        "seconds_until_ready": round(ready_s, 1),
        "first_ms": round(1000 * first_s, 1),
        "warm": warm_ms,
        "first_against_warm": round(1000 * first_s / warm_ms["p50_ms"], 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
