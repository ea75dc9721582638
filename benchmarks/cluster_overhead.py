"""Time to first token through Ray Serve beside `casa-serve` alone: the same engine options, the same requests, in turn.

    python benchmarks/cluster_overhead.py [--environment RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 ...]

starts both, one replica each, and sends every streamed request first to one and then to the other. The same engine is
also asked through a handle from here, which leaves out proxy and ingress, and each layer's own log of its durations
shows where the rest is. `--environment` sets variables of Ray's processes, to try what they change.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import httpx
from cluster_local import HOST, LocalCluster, chat_body, model_name, noise_url, percentile

RUNNING = 16
CONFIG = {"cpus": 0.5, "concurrency": {"running": RUNNING}, "engine": {"enforce_eager": True}}
READY_S = 300.0
# Ray Serve logs the duration of each request in each layer.
LAYERS = {
    "proxy": ("proxy_*.log", r"POST /v1/chat/completions 200 ([0-9.]+)ms"),
    "ingress": ("replica_casa_CasaIngress_*.log", r"POST /v1/chat/completions 200 ([0-9.]+)ms"),
    "replica": ("replica_casa_CasaServer*.log", r"CALL chat OK ([0-9.]+)ms"),
}


@contextlib.contextmanager
def casa_serve(port):
    """A `casa-serve` process; yields its URL when it is ready."""
    command = [Path(sys.executable).with_name("casa-serve"), "--port", port, "--enforce-eager"]
    command += ["--max-num-seqs", RUNNING]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://{HOST}:{port}"
    try:
        deadline = time.monotonic() + READY_S
        while not answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"casa-serve did not become ready (exit status {process.poll()}).")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url):
    """Whether a GET is answered with 200."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


def first_token_s(client, body):
    """Seconds until the first piece of text, and until the end."""
    started = time.perf_counter()
    first = None
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if first is None and '"content":"' in line.replace(" ", "") and '"content":""' not in line:
                first = time.perf_counter() - started
    return first, time.perf_counter() - started


def through_handle(handle, body):
    """Seconds until the replica's first piece of text, and until the end, asked without HTTP."""
    from ray.serve.llm.openai_api_models import ChatCompletionRequest

    from casa_serving.cluster.routing_context import RoutingContext

    started = time.perf_counter()
    first = None
    for piece in handle.chat.remote(ChatCompletionRequest(**body), RoutingContext(headers={})):
        text = piece if isinstance(piece, str) else "".join(map(str, piece))
        if first is None and '"content":"' in text and '"content":""' not in text:
            first = time.perf_counter() - started
    return first, time.perf_counter() - started


def timed(function):
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def layers(folder, number):
    """Median duration of the latest requests in each layer, from Ray Serve's logs."""
    medians = {}
    for name, (pattern, expression) in LAYERS.items():
        found = [re.findall(expression, path.read_text()) for path in sorted(folder.glob(pattern))]
        values = [float(value) for some in found for value in some][-number:]
        medians[name] = round(percentile(values, 50), 2)
    return medians


def measure(direct_url, cluster, options):
    """Return all figures, in ms."""
    from ray import serve
    from ray._private.worker import _global_node

    model = model_name(cluster.url)
    handle = serve.get_deployment_handle(f"CasaServer:{model}", "casa")
    stream = handle.options(stream=True)
    images = [noise_url(number, options.side) for number in range(4)]
    times = defaultdict(list)
    with httpx.Client(base_url=direct_url, timeout=60) as direct, httpx.Client(base_url=cluster.url, timeout=60) as ray:
        ways = {
            "casa-serve": lambda body: first_token_s(direct, body),
            "casa-serve --ray": lambda body: first_token_s(ray, body),
            "handle to the replica": lambda body: through_handle(stream, body),
        }
        for number in range(options.warm + options.requests):
            body = chat_body(
                model, "Read.", images[number % 4], max_tokens=options.tokens, ignore_eos=True, stream=True
            )
            # Whoever comes first would otherwise always meet the same state of the machine.
            order = list(ways) if number % 2 else list(ways)[::-1]
            for way in order:
                first, whole = ways[way](body)
                if number >= options.warm:
                    times[f"{way}: first token"].append(first)
                    times[f"{way}: whole"].append(whole)
        for _ in range(options.requests):
            times["casa-serve: GET /health"].append(timed(lambda: direct.get("/health")))
            times["casa-serve --ray: GET /health"].append(timed(lambda: ray.get("/health")))
            times["handle: a call that does nothing"].append(timed(lambda: handle.llm_config.remote().result()))
        body = chat_body(model, "Read.", images[0], max_tokens=1, stream=True)
        one_token = {way: [] for way in ("casa-serve", "casa-serve --ray")}
        for _ in range(options.requests):
            for way, values in one_token.items():
                values.append(ways[way](body)[1])
    time.sleep(2)
    logs = Path(_global_node.get_session_dir_path()) / "logs" / "serve"
    rows = {name: row(values) for name, values in times.items()}
    plain, ray_s = times["casa-serve: first token"], times["casa-serve --ray: first token"]
    return {
        "first_token_more_p50_ms": round(1000 * (percentile(ray_s, 50) - percentile(plain, 50)), 2),
        "first_token_more_p95_ms": round(1000 * (percentile(ray_s, 95) - percentile(plain, 95)), 2),
        **rows,
        "one token, whole answer": {way: row(values) for way, values in one_token.items()},
        "one token, p50 of each layer's log, ms": layers(logs, options.requests),
    }


def row(seconds):
    """Median and 95th percentile in ms."""
    return {"p50_ms": round(1000 * percentile(seconds, 50), 2), "p95_ms": round(1000 * percentile(seconds, 95), 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="to each (%(default)s)")
    parser.add_argument("--warm", type=int, default=20, help="before these, not counted (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4, help="of each answer (%(default)s)")
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels (%(default)s)")
    parser.add_argument("--environment", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--port", type=int, default=8123, help="and the one after it (%(default)s)")
    options = parser.parse_args()
    import ray.serve  # noqa: F401 - this process has read them before they change, and its own handle stays as it is

    # Ray's processes inherit them; casa-serve does not read them.
    os.environ.update(pair.split("=", 1) for pair in options.environment)
    with casa_serve(options.port + 1) as direct_url, LocalCluster(CONFIG, port=options.port) as cluster:
        result = {"environment": options.environment, **measure(direct_url, cluster, options)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
