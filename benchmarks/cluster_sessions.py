"""Sticky sessions while replicas come and go: a session changes its replica only when that one is gone, and reports it.

    python benchmarks/cluster_sessions.py

starts a local cluster of two replicas. Twenty sessions (`x-session-id`) ask in turn all the time. Other requests raise
the load until a third replica runs; ten more sessions begin, so that each replica has some; the load falls, and a
replica is drained. A session may be answered by another replica only when its own is gone, and then the answer must
have `x-casa-session: moved`; everything else is a violation.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections import Counter

import httpx
from cluster_local import LocalCluster, Sampler, ask, chat_body, model_name, noise_url, summary_ms

CONFIG = {
    "cpus": 0.5,
    "replicas": {
        "min": 2,
        "max": 3,
        "target_ongoing_requests": 4,
        "upscale_delay_s": 2,
        "downscale_delay_s": 10,
        "drain_timeout_s": 30,
    },
    "engine": {"enforce_eager": True},
}
QUIET_S = 20.0


async def live(client, model, name, options, stop, answers):
    """One session: a request about its own image, a pause, and so on. Mutates `answers`."""
    body = chat_body(model, "Read.", noise_url(hash_of(name), 56), max_tokens=4)
    while not stop.is_set():
        answers.append(await ask(client, body, **{"x-session-id": name}))
        await asyncio.sleep(options.pause_s)


def hash_of(name):
    """A seed that is the same in every run."""
    return sum(name.encode())


async def press(client, model, options, stop):
    """Send requests without a session, each client without pause; return how they ended."""
    bodies = [chat_body(model, "Read.", noise_url(n, 112), max_tokens=32, ignore_eos=True) for n in range(8)]
    outcomes = []

    async def one(place):
        for turn in itertools.count(place):
            if stop.is_set():
                return
            outcomes.append(await ask(client, bodies[turn % len(bodies)]))

    await asyncio.gather(*map(one, range(options.clients)))
    return outcomes


async def scale(cluster, model, options):
    """Return the answers of each session, the replicas over time, and how the other requests ended."""
    sessions, stop, calm = {}, asyncio.Event(), asyncio.Event()

    def begin(first, last):
        names = [f"session-{number}" for number in range(first, last)]
        sessions.update({name: [] for name in names})
        return [asyncio.create_task(live(client, model, name, options, stop, sessions[name])) for name in names]

    def steady(number):
        def test(replicas):
            return len(replicas) == number and all(replica.state == "RUNNING" for replica in replicas)

        return test

    def sample():
        return time.monotonic(), [(replica.name, replica.state) for replica in cluster.replicas()]

    async with httpx.AsyncClient(base_url=cluster.url, timeout=300, limits=httpx.Limits(max_connections=200)) as client:
        with Sampler(sample, time.monotonic()) as sampler:
            tasks = begin(0, options.sessions)
            await asyncio.sleep(QUIET_S)
            others = asyncio.create_task(press(client, model, options, calm))
            up_s = await asyncio.to_thread(cluster.wait_until, steady(3))
            tasks += begin(options.sessions, options.sessions + options.late)
            await asyncio.sleep(QUIET_S)
            calm.set()
            outcomes = await others
            down_s = await asyncio.to_thread(cluster.wait_until, steady(2))
            await asyncio.sleep(QUIET_S)
            stop.set()
            await asyncio.gather(*tasks)
    print(f"up after {up_s:.0f} s, down after {down_s:.0f} s", flush=True)
    return sessions, [value for _, value in sampler.samples], outcomes


def violations(sessions, samples):
    """Everything that should not have been, as sentences."""
    # Last time at which a replica was seen taking requests.
    running_until = {name: at for at, states in samples for name, state in states if state == "RUNNING"}
    found = []
    for name, answers in sessions.items():
        assigned = ""
        for number, answer in enumerate(answers):
            said, replica = answer.headers.get("x-casa-session", ""), answer.replica
            expected = "new" if not assigned else "kept" if replica == assigned else "moved"
            if not answer.good:
                found.append(f"{name}: answer {number} is {answer.kind}: {answer.detail}")
                continue
            if said != expected:
                found.append(f"{name}: answer {number} from {replica} after {assigned or 'none'} says {said!r}")
            if expected == "moved" and running_until.get(assigned, 0.0) > answer.ended:
                found.append(f"{name}: answer {number} moved from {assigned} to {replica}, but {assigned} ran on")
            assigned = replica
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--late", type=int, default=10, help="sessions that begin with three replicas (%(default)s)")
    parser.add_argument("--pause-s", type=float, default=4.0, help="of a session between requests (%(default)s)")
    parser.add_argument("--clients", type=int, default=12, help="without a session, for the load (%(default)s)")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    with LocalCluster(CONFIG, port=options.port) as cluster:
        sessions, samples, others = asyncio.run(scale(cluster, model_name(cluster.url), options))
    answers = [answer for some in sessions.values() for answer in some]
    running = (sum(state == "RUNNING" for _, state in states) for _, states in samples)
    result = {
        "sessions": len(sessions),
        "requests": len(answers),
        "told": dict(Counter(answer.headers.get("x-casa-session", "nothing") for answer in answers)),
        "sessions_by_number_of_replicas": dict(
            Counter(len({answer.replica for answer in some}) for some in sessions.values())
        ),
        "replicas_over_time": [number for number, _ in itertools.groupby(running)],
        "latency": summary_ms([answer.seconds for answer in answers]),
        "other_requests": dict(Counter(outcome.kind for outcome in others)),
        "violations": violations(sessions, samples),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
