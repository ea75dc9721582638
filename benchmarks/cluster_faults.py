"""What clients see of a replica's death: two replicas under load, one of which is killed with SIGKILL.

    python benchmarks/cluster_faults.py [--victims replica engine]

starts a local cluster. Eight clients ask about images, one request streamed and the next not, and go on while the
victim dies and until two replicas run again. Victims are a replica's own process, and the engine below it alone, whose
death that only the replica can notice.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import time
from collections import Counter

import httpx
import psutil
from cluster_local import LocalCluster, ask, chat_body, model_name, noise_url, summary_ms

CONFIG = {"cpus": 0.5, "replicas": {"min": 2, "max": 2}, "engine": {"enforce_eager": True}}
ENGINE_TITLE = "VLLM::EngineCore"
GONE_S = 90.0


async def load(url, model, options, stop, outcomes):
    """Keep `options.clients` clients busy until `stop` is set. Mutates `outcomes`."""
    images = [noise_url(number, 112) for number in range(options.clients)]

    async def one(number):
        for turn in itertools.count(number):
            if stop.is_set():
                return
            image = images[turn % len(images)]
            stream = turn % 2 == 0
            body = chat_body(model, "Read.", image, max_tokens=options.tokens, ignore_eos=True, stream=stream)
            outcomes.append(await ask(client, body))
            # Not all at the same time, or the death may hit no request.
            await asyncio.sleep(random.uniform(0, 2 * options.pause_s))

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await asyncio.gather(*map(one, range(options.clients)))


def process_of(replica, victim):
    """Return the process to kill: the replica's actor, or the engine below it."""
    actor = psutil.Process(replica.pid)
    if victim == "replica":
        return actor
    (engine,) = (child for child in actor.children(recursive=True) if child.cmdline()[:1] == [ENGINE_TITLE])
    return engine


async def kill_under_load(cluster, model, victim, options):
    """Return the figures of one death."""
    stop, outcomes = asyncio.Event(), []
    clients = asyncio.create_task(load(cluster.url, model, options, stop, outcomes))
    await asyncio.sleep(options.before_s)
    before = await asyncio.to_thread(cluster.running)
    target = before[0]
    process = process_of(target, victim)
    killed = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)

    def gone(replicas):
        return all(replica.name != target.name for replica in replicas if replica.state == "RUNNING")

    def whole(replicas):
        return gone(replicas) and sum(replica.state == "RUNNING" for replica in replicas) == len(before)

    noticed_s = await asyncio.to_thread(cluster.wait_until, gone, GONE_S)
    await asyncio.to_thread(cluster.wait_until, whole)
    recovered_s = time.monotonic() - killed
    await asyncio.sleep(options.before_s)
    stop.set()
    await clients
    return report(outcomes, killed, recovered_s, target.name) | {
        "seconds_until_noticed": round(noticed_s, 1),
        "seconds_until_full_strength": round(recovered_s, 1),
    }


def report(outcomes, killed, recovered_s, target):
    """Count outcomes by when they happened."""
    recovered = killed + recovered_s
    parts = {
        "before": [o for o in outcomes if o.ended < killed],
        "in flight": [o for o in outcomes if o.started < killed <= o.ended],
        "one replica": [o for o in outcomes if killed <= o.started < recovered],
        "after": [o for o in outcomes if o.started >= recovered],
    }
    kinds = {
        part: dict(Counter(f"{'stream' if o.streamed else 'plain'}: {o.kind}" for o in some))
        for part, some in parts.items()
    }
    plain = [o for o in outcomes if not o.streamed]
    bad = [o for o in outcomes if o.kind not in ("answered", "whole")]
    return {
        "outcomes": kinds,
        "plain_not_answered": sum(o.kind != "answered" for o in plain),
        "streams_not_clean": sum(o.streamed and o.kind not in ("whole", "error event") for o in outcomes),
        "streams_with_error_event": sum(o.kind == "error event" for o in outcomes),
        "last_trouble_s": round(max((o.ended - killed for o in bad), default=0.0), 1),
        "from_dead_replica_after": sum(o.replica == target for o in parts["one replica"] + parts["after"]),
        "plain_latency": {
            part: summary_ms([o.ended - o.started for o in some if not o.streamed]) for part, some in parts.items()
        },
        "details": dict(Counter(o.detail for o in bad).most_common(4)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", nargs="+", default=["replica", "engine"], choices=["replica", "engine"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (%(default)s)")
    parser.add_argument("--pause-s", type=float, default=1.0, help="mean, of a client between requests (%(default)s)")
    parser.add_argument("--before-s", type=float, default=10.0, help="of load before and after (%(default)s)")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    result = {}
    with LocalCluster(CONFIG, port=options.port) as cluster:
        model = model_name(cluster.url)
        for victim in options.victims:
            result[victim] = asyncio.run(kill_under_load(cluster, model, victim, options))
            print(json.dumps({victim: result[victim]}, indent=2), flush=True)


if __name__ == "__main__":
    main()
