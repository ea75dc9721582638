"""What clients see of operations: one request a second while a cluster is redeployed, scaled, or loses a process.

    python benchmarks/cluster_operations.py [--events redeploy override replica ingress] [--rooms 1 2]

starts a local cluster of one replica and one ingress for each size of its node, deploys it as `serve deploy` does, and
prints a table: requests sent, answered, refused (429 and 503), lost (no answer, or a broken one), and how long the
answered ones took. With room for two replicas a new version starts before the old one goes; with room for one it
cannot.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from collections import Counter

import httpx
import psutil
from cluster_local import HOST, LocalCluster, ask, chat_body, model_name, noise_url, summary_ms

CONFIG = {"device": "cpu", "cpus": 1, "engine": {"enforce_eager": True}}
EVENTS = ("redeploy", "override", "replica", "ingress")
# How much longer than usual an answer must take to count as delayed.
DELAY_S = 1.0
REFUSALS = ("status 429", "status 503")


def serve_config(port, args, deployments=()):
    """Return a Serve config file as `serve deploy` sends it."""
    application = {"name": "casa", "route_prefix": "/", "import_path": "casa_serving.cluster:build_app", "args": args}
    if deployments:
        application["deployments"] = list(deployments)
    return {"http_options": {"host": HOST, "port": port}, "applications": [application]}


def happen(cluster, event, port):
    """Trigger the event; return the check that it is over."""
    before = cluster.running()
    if event == "redeploy":
        cluster.apply(serve_config(port, {**CONFIG, "concurrency": {"retry_after_s": 2}}))
        old = {each.name for each in before}
        # While the new one is being built there may be no replicas to be seen.
        return lambda replicas: bool(running := names_of(replicas, "RUNNING")) and running.isdisjoint(old)
    if event == "override":
        fixed = {"name": f"CasaServer:{model_name(cluster.url)}", "num_replicas": 2, "autoscaling_config": None}
        cluster.apply(serve_config(port, CONFIG, [fixed]))
        time.sleep(5)
        # Where there is no room for the second one, it is waited for and nothing else happens.
        return lambda replicas: {each.name for each in before} <= names_of(replicas, "RUNNING")
    victim = before[0] if event == "replica" else cluster.ingresses()[0]
    os.kill(victim.pid, signal.SIGKILL)
    if event == "ingress":
        return lambda replicas: any(each.state == "RUNNING" and each.pid != victim.pid for each in cluster.ingresses())
    return lambda replicas: bool(names_of(replicas, "RUNNING") - {victim.name})


def memory_of(replica):
    """Return the processes of a replica, and their memory in MiB: what is shared is divided among those that share."""
    actor = psutil.Process(replica.pid)
    processes = [actor, *actor.children(recursive=True)]
    return {
        "replica_processes": len(processes),
        "replica_mib": round(sum(each.memory_full_info().pss for each in processes) / 2**20),
    }


def names_of(replicas, state):
    """Return the names of the replicas in a state."""
    return {replica.name for replica in replicas if replica.state == state}


async def clients(url, model, stop, outcomes):
    """Send a request a second, whatever became of those before. Mutates `outcomes`."""
    image = noise_url(1, 112)

    async def one(number):
        outcomes.append(
            await ask(client, chat_body(model, "Read.", image, max_tokens=8, ignore_eos=True, stream=number % 2 == 0))
        )

    tasks = []
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while not stop.is_set():
            tasks.append(asyncio.create_task(one(len(tasks))))
            await asyncio.sleep(1)
        await asyncio.gather(*tasks)


async def measure(cluster, event, port, options):
    """Return the figures of one event."""
    stop, outcomes = asyncio.Event(), []
    load = asyncio.create_task(clients(cluster.url, model_name(cluster.url), stop, outcomes))
    await asyncio.sleep(options.before_s)
    usual = summary_ms([each.seconds for each in outcomes])
    memory = memory_of(cluster.running()[0])
    started = time.monotonic()
    is_over = await asyncio.to_thread(happen, cluster, event, port)
    await asyncio.to_thread(cluster.wait_until, is_over, options.limit_s)
    over_s = time.monotonic() - started
    await asyncio.sleep(options.before_s)
    stop.set()
    await load
    return report(outcomes, started, usual) | {"over_s": round(over_s, 1), **memory}


def report(outcomes, started, usual):
    """Count the outcomes of requests that were sent, or not yet answered, after the event."""
    after = [each for each in outcomes if each.ended >= started]
    kinds = Counter(each.kind for each in after)
    good = [each for each in after if each.good]
    limit_s = usual["p50_ms"] / 1000 + DELAY_S
    return {
        "sent": len(after),
        "answered": len(good),
        "refused": sum(kinds[kind] for kind in REFUSALS),
        "lost": sum(not each.good and each.kind not in REFUSALS for each in after),
        "delayed": sum(each.seconds > limit_s for each in good),
        "usual_p50_ms": usual["p50_ms"],
        "longest_s": round(max((each.seconds for each in good), default=0.0), 1),
        "kinds": dict(kinds),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", nargs="+", default=EVENTS, choices=EVENTS)
    parser.add_argument("--rooms", nargs="+", type=int, default=[1, 2], help="replicas a node holds (%(default)s)")
    parser.add_argument("--before-s", type=float, default=10.0, help="of requests before and after (%(default)s)")
    parser.add_argument("--limit-s", type=float, default=300.0, help="for the cluster to be well again (%(default)s)")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    rows = []
    for room in options.rooms:
        for event in options.events:
            start = serve_config(options.port, CONFIG)
            with LocalCluster(start, cpus_per_node=room, port=options.port) as cluster:
                row = {"room": room, "event": event, **asyncio.run(measure(cluster, event, options.port, options))}
            rows.append(row)
            print(json.dumps(row), flush=True)
    names = ("room", "event", "sent", "answered", "refused", "lost", "delayed", "longest_s", "over_s")
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")


if __name__ == "__main__":
    main()
