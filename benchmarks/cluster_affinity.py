"""How often requests about the same images meet their pages: requests in random order over the nodes of a cluster.

    python benchmarks/cluster_affinity.py

starts a local cluster of two nodes with one replica each, once with routing by affinity and once without, and prints
both. Against a cluster that runs already, and only with what it is configured for:

    python benchmarks/cluster_affinity.py --base-url http://127.0.0.1:8000 --metrics-url http://127.0.0.1:8080/metrics

The images are noise of 320 x 320 pixels, whose base64 is above 256 KiB; their order is random with a fixed seed.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
from cluster_local import LocalCluster, chat_body, model_name, noise_url

ENCODER_RUNS = "casa_vision_encoder_runs"
# Replicas push their metrics every few seconds; a sum that stayed for so long is the last one.
STABLE_S, TOO_LONG_S = 12.0, 60.0


def ask(client, model, url):
    answer = client.post("/v1/chat/completions", json=chat_body(model, "Read the digits.", url, max_tokens=4))
    answer.raise_for_status()
    return answer.headers["x-casa-replica"]


def encoder_runs(text):
    """Vision-encoder runs over all replicas so far, from Prometheus's text; None where it has none."""
    values = re.findall(rf"^(?:ray_)?{ENCODER_RUNS}(?:_total)?{{[^}}]*}} ([0-9.e+]+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else None


def stable_encoder_runs(read_metrics):
    """`encoder_runs` once it no longer changes."""
    started = changed = time.monotonic()
    runs = encoder_runs(read_metrics())
    while time.monotonic() - changed < STABLE_S and time.monotonic() - started < TOO_LONG_S:
        time.sleep(1)
        latest = encoder_runs(read_metrics())
        if latest != runs:
            runs, changed = latest, time.monotonic()
    return runs


def repeats_at_home(served):
    """Of all requests about an image seen before: how many met a replica that had seen it.

    Args:
        served: Image and replica of each request, in the order in which they were sent.
    """
    homes, hits, repeated = {}, 0, 0
    for image, replica in served:
        if image in homes:
            repeated += 1
            hits += replica in homes[image]
        homes.setdefault(image, set()).add(replica)
    return hits, repeated


def measure(base_url, read_metrics, options):
    """Send the requests; `read_metrics` returns Prometheus's text, or is None."""
    # Other images in every run: what an earlier run left in the caches must not count.
    urls = [noise_url(options.seed * 1000 + number) for number in range(options.images)]
    order = [number % options.images for number in range(options.requests)]
    random.Random(options.seed).shuffle(order)
    before = stable_encoder_runs(read_metrics) if read_metrics else None
    model = model_name(base_url)
    with httpx.Client(base_url=base_url, timeout=300) as client, ThreadPoolExecutor(options.concurrency) as pool:
        replicas = list(pool.map(lambda number: ask(client, model, urls[number]), order))
    hits, repeated = repeats_at_home(zip(order, replicas, strict=True))
    result = {
        "requests": len(order),
        "images": options.images,
        "repeated": repeated,
        "repeated_at_home": hits,
        "share": round(hits / repeated, 3),
        # At least so many encoder runs: each replica encodes each of its images once.
        "image_replica_pairs": len(set(zip(order, replicas, strict=True))),
        "requests_by_replica": dict(Counter(replicas)),
    }
    if before is not None:
        after = stable_encoder_runs(read_metrics)
        result |= {"encoder_runs_before": before, "encoder_runs_after": after}
        result["encoder_runs_per_image"] = round((after - before) / options.images, 3)
    return result


def measure_local(affinity, options):
    """The figures of a cluster of its own, whose nodes have room for one replica each."""
    config = {
        "cpus": 1,
        "replicas": {"min": options.nodes, "max": options.nodes},
        "routing": {"affinity": affinity},
        "engine": {"enforce_eager": True},
    }
    with LocalCluster(config, num_nodes=options.nodes, cpus_per_node=1, port=options.port) as cluster:
        nodes = {replica.node for replica in cluster.running()}
        return {"nodes": len(nodes), **measure(cluster.url, cluster.metrics, options)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="a cluster that runs already; default: clusters of its own")
    parser.add_argument("--metrics-url", help="its Prometheus endpoint")
    parser.add_argument("--nodes", type=int, default=2, help="of the clusters of its own (%(default)s)")
    parser.add_argument("--port", type=int, default=8123, help="of the clusters of its own (%(default)s)")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.base_url:
        url = options.metrics_url
        result = measure(options.base_url, (lambda: httpx.get(url, timeout=30).text) if url else None, options)
    else:
        result = {f"affinity {name}": measure_local(name == "on", options) for name in ("on", "off")}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
