"""Autoscaling from one replica to three and back under a load that rises and falls, and refusals where there is none.

    python benchmarks/cluster_ramp.py [--plot docs/cluster_ramp.svg]

starts a local cluster. Few clients, then many until three replicas run, then one until one replica is left; each asks
again as soon as it has its answer, and every answer must be a completion. Afterwards, with a short queue and one
replica, all clients ask at once: what is too much must be refused at once, with 429 and Retry-After.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections import Counter
from pathlib import Path

import httpx
from cluster_local import LocalCluster, Sampler, ask, chat_body, model_name, noise_url, summary_ms
from ramp_plot import plot

CONFIG = {
    "cpus": 0.5,
    "replicas": {
        "min": 1,
        "max": 3,
        "target_ongoing_requests": 3,
        "upscale_delay_s": 2,
        "downscale_delay_s": 10,
        "drain_timeout_s": 30,
    },
    "concurrency": {"running": 4, "waiting": 2, "queued": 64},
    "engine": {"enforce_eager": True},
}
OVERLOADED = {
    **CONFIG,
    "replicas": {"min": 1, "max": 1},
    "concurrency": {"running": 2, "waiting": 0, "queued": 2},
    # The places of live sessions are places for any request to Ray Serve.
    "live": {"max_sessions": 0},
}
QUIET_S = 15.0


class Load:
    """Clients without pause, as many as `number` is at the time.

    Attributes:
        outcomes: Of all requests, in the order in which they ended.
    """

    def __init__(self, client, model, tokens):
        self.number = 0
        self.outcomes = []
        self._client = client
        self._bodies = [
            chat_body(model, "Read.", noise_url(n, 112), max_tokens=tokens, ignore_eos=True) for n in range(8)
        ]
        self._tasks = []

    def set(self, number):
        """Change the number of clients; those too many finish what they asked."""
        self.number = number
        running = {task for task in self._tasks if not task.done()}
        self._tasks = [*running, *(asyncio.create_task(self._run(n)) for n in range(len(running), number))]

    async def _run(self, place):
        for turn in itertools.count(place):
            if place >= self.number:
                return
            self.outcomes.append(await ask(self._client, self._bodies[turn % len(self._bodies)]))

    async def finish(self):
        """Wait for the last answers."""
        self.set(0)
        await asyncio.gather(*self._tasks)


async def ramp(cluster, model, options):
    """Return the figures of the ramp and what the plot shows."""
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=cluster.url, timeout=300) as client:
        load = Load(client, model, options.tokens)

        def sample():
            states = Counter(replica.state for replica in cluster.replicas())
            return {"clients": load.number, "running": states.pop("RUNNING", 0), "other": states.total()}

        def reached(number):
            def test(replicas):
                return len(replicas) == number and all(replica.state == "RUNNING" for replica in replicas)

            return test

        marks = {}
        with Sampler(sample, started) as sampler:
            for name, number, replicas in (("low", 1, 1), ("high", options.clients, 3), ("low again", 1, 1)):
                load.set(number)
                begun = time.monotonic()
                await asyncio.to_thread(cluster.wait_until, reached(replicas))
                marks[f"seconds to {replicas} at {name} load"] = round(time.monotonic() - begun, 1)
                await asyncio.sleep(QUIET_S)
            await load.finish()
    lost = [outcome for outcome in load.outcomes if not outcome.good]
    return {
        **marks,
        "requests": len(load.outcomes),
        "lost": len(lost),
        "kinds": dict(Counter(outcome.kind for outcome in load.outcomes)),
        "details": dict(Counter(outcome.detail for outcome in lost).most_common(3)),
        "latency": summary_ms([outcome.seconds for outcome in load.outcomes]),
        "requests_by_replica": dict(Counter(outcome.replica for outcome in load.outcomes)),
        "samples": [{"s": round(at, 1), **values} for at, values in sampler.samples],
        "answers": [{"s": round(o.ended - started, 2), "latency_s": round(o.seconds, 3)} for o in load.outcomes],
    }


async def overload(url, model, options):
    """Return what becomes of too many requests at once."""
    body = chat_body(model, "Read.", noise_url(0, 112), max_tokens=options.tokens, ignore_eos=True)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        outcomes = await asyncio.gather(*(ask(client, body) for _ in range(options.clients)))
    refused = [outcome for outcome in outcomes if outcome.kind == "status 429"]
    return {
        "at_once": len(outcomes),
        "kinds": dict(Counter(outcome.kind for outcome in outcomes)),
        "retry_after": dict(Counter(outcome.headers.get("retry-after", "none") for outcome in refused)),
        "refused_after": summary_ms([outcome.seconds for outcome in refused]),
        "answered_after": summary_ms([outcome.seconds for outcome in outcomes if outcome.good]),
        "messages": dict(Counter(outcome.detail for outcome in outcomes if not outcome.good)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=12, help="at high load, and at once in overload (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (%(default)s)")
    parser.add_argument("--only", choices=["ramp", "overload"])
    parser.add_argument("--plot", type=Path, help="write an SVG of the ramp here")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    result = {}
    if options.only != "overload":
        with LocalCluster(CONFIG, port=options.port) as cluster:
            report = asyncio.run(ramp(cluster, model_name(cluster.url), options))
        samples, answers = report.pop("samples"), report.pop("answers")
        result["ramp"] = report
        if options.plot:
            options.plot.write_text(plot(samples, answers))
    if options.only != "ramp":
        with LocalCluster(OVERLOADED, port=options.port) as cluster:
            result["overload"] = asyncio.run(overload(cluster.url, model_name(cluster.url), options))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
