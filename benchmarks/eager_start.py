"""What compiling costs and brings the embedded model on a CPU: `casa-serve` with and without `--enforce-eager`.

    PYTHONPATH=tests/support python benchmarks/eager_start.py --rounds 3

Each round starts a server in both ways, in turn, and prints the seconds until it answers `/health` and until its first
answer about an image, then tokens per second of one client and of eight. torch.compile's cache is warm but for a first
round that is not counted.
"""

import argparse
import asyncio
import io
import statistics
import tempfile
import time
from base64 import b64encode
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from casa_digits.cases import READ, draw_video
from serving_process import casa_serve

NUM_TOKENS = 512


def chat(**options) -> dict:
    """Return a question about an image."""
    file = io.BytesIO()
    Image.fromarray(draw_video(np.random.default_rng(0), 1).frames[0]).save(file, "PNG")
    image = {"url": f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": READ}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}


async def tokens_per_second(url: str, num_clients: int) -> float:
    """Return the tokens of all clients together, each of which asks once for a long answer."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        body = chat(max_tokens=NUM_TOKENS, ignore_eos=True)
        begun_s = time.perf_counter()
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(num_clients)))
        seconds = time.perf_counter() - begun_s
    return sum(answer.raise_for_status().json()["usage"]["completion_tokens"] for answer in answers) / seconds


def measure(options: list[str]) -> tuple[float, float, float, float]:
    """Return the seconds to `/health` and to the first answer, and tokens per second of 1 and of 8 clients."""
    with tempfile.TemporaryDirectory() as folder:
        begun_s = time.perf_counter()
        with casa_serve(Path(folder) / "log.txt", *options) as server:
            ready_s = time.perf_counter() - begun_s
            httpx.post(f"{server.url}/v1/chat/completions", json=chat(max_tokens=8), timeout=300).raise_for_status()
            answered_s = time.perf_counter() - begun_s
            return ready_s, answered_s, *(asyncio.run(tokens_per_second(server.url, number)) for number in (1, 8))


def main() -> None:
    """Run the rounds and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    rows = {"compiled": ["--no-enforce-eager"], "eager": ["--enforce-eager"]}
    measured: dict[str, list] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, options in rows.items():
            figures = measure(options)
            print(f"round {number}, {name}: " + ", ".join(f"{figure:.1f}" for figure in figures), flush=True)
            if number:
                measured[name].append(figures)
    print("| | ready | first answer | 1 client | 8 clients |\n|---|---|---|---|---|")
    for name, figures in measured.items():
        ready, answer, one, eight = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {name} | {ready:.1f} s | {answer:.1f} s | {one:.0f} tok/s | {eight:.0f} tok/s |")


if __name__ == "__main__":
    main()
