"""A server under everything at once: 10,000 mixed requests beside live sessions, and SIGTERM while it answers.

    PYTHONPATH=tests/support python benchmarks/server_soak.py --requests 10000 --output docs/server_soak

`casa-serve` with the embedded model and its defaults answers chats with 0 to 60 images, streams, structured output,
clients that leave, requests that are refused and malformed ones, while live sessions go on and `/health` is asked by
a process of its own. Then it is left alone, its pages are counted, and SIGTERM comes while streams, plain requests
and live sessions are open. Written: OUTPUT.json and OUTPUT.svg (memory and latency over requests).

    PYTHONPATH=tests/support python benchmarks/server_soak.py --only health --clients 16 --seconds 60

asks `/health` while that many clients post images of 1024 x 1024 pixels as fast as they are answered; with `--pause`
each waits before its next one, which leaves a machine of two cores something to spare.
"""

import argparse
import asyncio
import io
import json
import re
import signal
import statistics
import tempfile
import time
from base64 import b64encode
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
from health_probe import HealthProbe
from host_use import host_use
from PIL import Image
from server_soak_plot import plot
from server_soak_requests import MODEL, Outcome, draw_files, send

from casa_digits.cases import READ, draw_video
from casa_serving.live.client import ConnectionLostError, LiveClient
from request_fuzzer import Fuzzer
from serving_process import casa_serve

SAMPLE_EVERY = 100
LIVE_FPS = 2.0
PAGES = ("casa:image_pages_in_use", "vllm:kv_cache_usage_perc")


async def watch(url, number, stop):
    """A live session that shows a video until `stop` is set, begun anew every 200 frames; returns what it saw."""
    seen = Counter()
    while not stop.is_set():
        frames = draw_video(np.random.default_rng([number, seen["sessions"]]), 200).frames
        async with LiveClient(url) as client:
            await client.create(fps=LIVE_FPS)
            seen["sessions"] += 1
            for index, frame in enumerate(frames):
                if stop.is_set():
                    break
                file = io.BytesIO()
                Image.fromarray(frame).save(file, "PNG")
                await client.send_frame(file.getvalue(), index / LIVE_FPS)
                await asyncio.sleep(1 / LIVE_FPS)
            await client.stop()
            seen.update([event.type async for event in client.events()])
    return seen


async def pages(client):
    """The pages in use after all is answered, once a last short request has made the engine report."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    (await client.post("/v1/chat/completions", json=body)).raise_for_status()
    await asyncio.sleep(1)
    text = (await client.get("/metrics")).text
    return {name: sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", text, re.M))) for name in PAGES}


async def mixed(server, options):
    """The mix; returns outcomes, samples of memory, and what the live sessions saw."""
    urls, outcomes, samples = draw_files(options.seed), [], []
    stop, started = asyncio.Event(), time.monotonic()
    limits = httpx.Limits(max_connections=2 * options.concurrency)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        before = await pages(client)
        schema = (await client.get("/openapi.json")).raise_for_status().json()
        malformed = Fuzzer(schema, options.seed).cases(options.requests)
        watchers = [asyncio.create_task(watch(server.live_url, i, stop)) for i in range(options.live)]
        numbers = iter(range(options.requests))

        async def work():
            for number in numbers:
                try:
                    outcomes.append(await send(client, number, options.seed, urls, malformed))
                except httpx.HTTPError as error:
                    outcomes.append(Outcome("any", -1, f"request {number}: {type(error).__name__}: {error}", 0.0))
                if outcomes[-1].problem:
                    print(f"request {number}: {outcomes[-1]}", flush=True)
                if len(outcomes) % SAMPLE_EVERY == 0:
                    memory, cpu = host_use(server.process.pid)
                    recent = [o.latency_s for o in outcomes[-SAMPLE_EVERY:] if o.status == 200]
                    samples.append(
                        {
                            "requests": len(outcomes),
                            "s": round(time.monotonic() - started, 1),
                            "memory_mib": round(memory, 1),
                            "cpu_s": round(cpu, 1),
                            "p50_ms": round(1000 * statistics.median(recent), 1) if recent else None,
                        }
                    )

        await asyncio.gather(*(work() for _ in range(options.concurrency)))
        stop.set()
        live = sum(await asyncio.gather(*watchers), Counter())
        after = await pages(client)
    return outcomes, samples, live, before, after


async def ended_stream(client, body):
    """Read a stream to its end; return how it ended."""
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
    except httpx.HTTPError as error:
        return f"cut: {type(error).__name__}"
    if any('"error"' in line for line in lines):
        return "error event"
    return "[DONE]" if lines and lines[-1] == "data: [DONE]" else f"status {answer.status_code}"


async def ended_plain(client, body):
    """Wait for a plain answer; return its status."""
    try:
        return f"status {(await client.post('/v1/chat/completions', json=body)).status_code}"
    except httpx.HTTPError as error:
        return f"cut: {type(error).__name__}"


async def ended_live(url):
    """Keep a live session open; return what its last event is."""
    last = "nothing"
    async with LiveClient(url) as client:
        await client.create(fps=LIVE_FPS)
        with suppress(ConnectionLostError):
            async for event in client.events():
                last = f"{event.type} {getattr(event, 'code', '')}".strip()
    return last


async def terminate(server, options):
    """SIGTERM while streams, plain requests and live sessions are open; returns how each ended, and when the server."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}
    body |= {"max_tokens": options.last_tokens}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        tasks = [asyncio.create_task(ended_stream(client, body)) for _ in range(4)]
        tasks += [asyncio.create_task(ended_plain(client, body)) for _ in range(4)]
        tasks += [asyncio.create_task(ended_live(server.live_url)) for _ in range(2)]
        await asyncio.sleep(2)
        sent = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        ends = await asyncio.gather(*tasks)
    status = await asyncio.to_thread(server.process.wait, 120)
    kinds = ["stream"] * 4 + ["plain"] * 4 + ["live"] * 2
    return {
        "ends": dict(Counter(f"{kind}: {end}" for kind, end in zip(kinds, ends, strict=True))),
        "exit_s": round(time.monotonic() - sent, 2),
        "exit_status": status,
    }


async def post_images(server, options):
    """Clients that post images of 1024 x 1024 pixels, as fast as they are answered; returns how many were."""
    rng, done, until = np.random.default_rng(options.seed), 0, time.monotonic() + options.seconds
    bodies = []
    for _ in range(64):
        small = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((1024, 1024), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        url = "data:image/jpeg;base64," + b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": READ}]
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
        bodies.append(json.dumps(body).encode())

    async def work(client, number):
        nonlocal done
        while time.monotonic() < until:
            number += options.clients
            answer = await client.post(
                "/v1/chat/completions",
                content=bodies[number % len(bodies)],
                headers={"content-type": "application/json"},
            )
            answer.raise_for_status()
            done += 1
            await asyncio.sleep(options.pause)

    limits = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(work(client, number) for number in range(options.clients)))
    return done


def summarise(outcomes, samples, live, before, after):
    """The figures of the mix."""
    warm = [s["memory_mib"] for s in samples if s["requests"] > samples[-1]["requests"] * 0.2]
    tenth = max(1, len(warm) // 10)
    early, late = statistics.mean(warm[:tenth]), statistics.mean(warm[-tenth:])
    return {
        "requests": len(outcomes),
        "seconds": samples[-1]["s"],
        "statuses": {
            kind: {str(status): count for status, count in sorted(Counter(found).items())}
            for kind in sorted({o.kind for o in outcomes})
            if (found := [o.status for o in outcomes if o.kind == kind])
        },
        "server_errors": sum(o.status >= 500 for o in outcomes),
        "problems": [f"{o.kind}: {o.problem}" for o in outcomes if o.problem][:20],
        "num_problems": sum(o.problem is not None for o in outcomes),
        "live": dict(live),
        "pages_before": before,
        "pages_after": after,
        "memory_mib_after_warm_up": round(early, 1),
        "memory_mib_at_the_end": round(late, 1),
        "memory_ratio": round(late / early, 4),
    }


def soak(options):
    """Run the whole soak; return the report."""
    with (
        tempfile.TemporaryDirectory() as folder,
        casa_serve(options.keep_log or Path(folder) / "log", *options.server) as server,
    ):
        report = {}
        if options.only in (None, "mix"):
            with HealthProbe(server.url) as health:
                *measured, before, after = asyncio.run(mixed(server, options))
            report["mix"] = summarise(*measured, before, after) | {"health": health.summary()}
            report["samples"] = measured[1]
        if options.only in (None, "health"):
            with HealthProbe(server.url) as health:
                answered = asyncio.run(post_images(server, options))
            report["health"] = health.summary() | {"images_per_s": round(answered / options.seconds, 1)}
            report["health"]["clients"] = options.clients
        if options.only in (None, "mix", "exit"):
            report["exit"] = asyncio.run(terminate(server, options))
        server_log = server.log.read_text(errors="replace")
        report["tracebacks_in_log"] = server_log.count("Traceback (most recent call last)")
    return report


def main():
    """Run what the command line asks for; print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (%(default)s)")
    parser.add_argument("--live", type=int, default=2, help="live sessions beside them (%(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="that post large images (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for which they do (%(default)s)")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between a client's images (%(default)s)")
    parser.add_argument("--last-tokens", type=int, default=4000, help="of answers that are open at SIGTERM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["mix", "health", "exit"], help="one part instead of all")
    parser.add_argument("--output", type=Path, help="path without ending")
    parser.add_argument("--keep-log", type=Path, help="where the server's log goes")
    parser.add_argument("server", nargs="*", help="arguments of casa-serve, after --")
    options = parser.parse_args()
    report = soak(options)
    samples = report.get("samples")
    print(json.dumps({name: part for name, part in report.items() if name != "samples"}, indent=1))
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        if samples:
            options.output.with_suffix(".svg").write_text(plot(samples))


if __name__ == "__main__":
    main()
