"""How often requests about the same images meet their pages: requests in random order against a running cluster.

Start a cluster of two replicas (docs/cluster.md), then

    python benchmarks/cluster_affinity.py --base-url http://127.0.0.1:8000 --metrics-url http://127.0.0.1:8080/metrics

and again with `routing: {affinity: false}` for the figure beside it. The images are noise of 320 x 320 pixels, whose
base64 is above 256 KiB; their order is random with a fixed seed.
"""

import argparse
import base64
import io
import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
from PIL import Image

ENCODER_RUNS = "casa_vision_encoder_runs"


def noise(seed, side=320):
    """A data URL of about 410 kB with an image of nothing but noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def ask(client, model, url):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Read the digits."}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    return answer.headers["x-casa-replica"]


def encoder_runs(url):
    """Vision-encoder runs over all replicas so far, from the Prometheus endpoint; None where it has none."""
    text = httpx.get(url, timeout=30).text
    values = re.findall(rf"^(?:ray_)?{ENCODER_RUNS}(?:_total)?{{[^}}]*}} ([0-9.e+]+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else None


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--metrics-url")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Other images in every run: what an earlier run left in the caches must not count.
    urls = [noise(options.seed * 1000 + number) for number in range(options.images)]
    order = [number % options.images for number in range(options.requests)]
    random.Random(options.seed).shuffle(order)
    with httpx.Client(base_url=options.base_url, timeout=300) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        before = encoder_runs(options.metrics_url) if options.metrics_url else None
        with ThreadPoolExecutor(options.concurrency) as pool:
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
        result["before"] = before
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
