"""What an ingress has at each replica, and what the router makes of it."""

import asyncio
import gc

import pytest

from casa_serving.cluster.inflight import InflightTracker
from casa_serving.cluster.live.session_ticket import ReplicaShutdown
from casa_serving.cluster.routing_context import RoutingContext
from ray_router import make_router, route

pytestmark = pytest.mark.unit


def at(replica, **fields):
    return RoutingContext(replica=replica, **fields)


def test_what_is_finished_or_forgotten_counts_no_longer():
    work = InflightTracker()
    contexts = [at("a"), at("a"), at("b")]
    for context in contexts:
        work.add(context)
    assert (work.num_requests("a"), work.num_requests("b"), work.num_requests("c")) == (2, 1, 0)
    contexts[0].finished = True
    assert work.num_requests("a") == 1
    del contexts[1], context
    gc.collect()
    assert work.num_requests("a") == 0


def test_a_request_that_starts_again_counts_where_it_is():
    work = InflightTracker()
    context = at("a")
    work.add(context)
    context.reset_for_retry()
    assert work.num_requests("a") == 0
    context.replica = "b"
    work.add(context)
    assert (work.num_requests("a"), work.num_requests("b")) == (0, 1)


async def test_live_sessions_are_counted_apart_and_found_when_their_replica_goes():
    work = InflightTracker()
    session, request = at("a", replica_shutdown=ReplicaShutdown()), at("b")
    work.add(session)
    work.add(request)
    assert (work.num_requests("a"), work.num_sessions("a")) == (0, 1)
    assert work.keep_only(["b"]) == [session]
    assert (work.num_sessions("a"), work.num_requests("b")) == (0, 1)


async def test_a_full_replica_gets_no_request_but_sessions():
    router = make_router()
    contexts = [RoutingContext() for _ in range(4)]
    homes = [await route(router, context) for context in contexts]
    assert sorted(homes) == ["a", "a", "b", "b"]
    late = RoutingContext()
    waiting = asyncio.create_task(route(router, late))
    live = RoutingContext(replica_shutdown=ReplicaShutdown())
    assert await asyncio.wait_for(route(router, live), 5) in ("a", "b")
    await asyncio.sleep(0.2)
    assert not waiting.done()
    contexts[0].finished = True
    assert await asyncio.wait_for(waiting, 5) == homes[0]


async def test_requests_of_a_full_session_hold_up_nobody_else():
    router = make_router()
    held = [RoutingContext() for _ in range(2)]
    home, again = [await route(router, context, "mine") for context in held]
    assert again == home
    stuck_notes = [RoutingContext() for _ in range(30)]
    stuck = [asyncio.create_task(route(router, context, "mine")) for context in stuck_notes]
    await asyncio.sleep(0.1)
    free = RoutingContext()
    assert await asyncio.wait_for(route(router, free), 5) != home
    assert not any(task.done() for task in stuck)
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
