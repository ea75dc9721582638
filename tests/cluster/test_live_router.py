"""What the router does for live sessions: replicas to avoid, and news of one that leaves."""

import asyncio
import gc

import pytest

from casa_serving.cluster.live.session_ticket import ReplicaShutdown
from casa_serving.cluster.routing_context import RoutingContext
from ray_router import Replica, make_router, pending

pytestmark = pytest.mark.unit


async def choose(router, context, session=""):
    """The replicas in the order in which Ray would try them."""
    groups = await router.choose_replicas(list(router.curr_replicas.values()), pending(context, session))
    return [each.replica_id.unique_id for group in groups for each in group]


def accept(router, context, replica):
    """A replica accepts the request, as Ray tells it."""
    router.on_request_routed(pending(context), replica.replica_id, None)


async def test_replicas_to_avoid_are_taken_only_where_there_is_no_other():
    router = make_router()
    assert set(await choose(router, RoutingContext())) == {"a", "b"}
    assert await choose(router, RoutingContext(avoid=frozenset("a"))) == ["b"]
    assert set(await choose(router, RoutingContext(avoid=frozenset("ab")))) == {"a", "b"}


async def test_a_session_moves_from_a_home_that_is_to_be_avoided():
    router = make_router()
    (home, *_) = await choose(router, RoutingContext(), "mine")
    assert await choose(router, RoutingContext(), "mine") == [home]
    context = RoutingContext(avoid=frozenset([home]))
    (other,) = await choose(router, context, "mine")
    assert (context.session, {home, other}) == ("moved", {"a", "b"})
    assert await choose(router, RoutingContext(), "mine") == [other]


async def test_sessions_of_a_replica_that_leaves_are_told():
    router = make_router()
    contexts = {name: RoutingContext(replica_shutdown=ReplicaShutdown()) for name in ("a", "b")}
    for name, context in contexts.items():
        accept(router, context, Replica(name))
    # Ray's router has a loop of its own.
    await asyncio.to_thread(router.update_replicas, [Replica("b"), Replica("c")])
    await asyncio.wait_for(contexts["a"].replica_shutdown.wait(), 5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(contexts["b"].replica_shutdown.wait(), 0.1)


async def test_a_session_that_comes_while_its_replica_leaves_is_told():
    router = make_router()
    context = RoutingContext(replica_shutdown=ReplicaShutdown())
    router.update_replicas([Replica("b")])
    accept(router, context, Replica("a"))
    await asyncio.wait_for(context.replica_shutdown.wait(), 5)


async def test_sessions_that_have_ended_are_forgotten():
    router = make_router()
    contexts = [RoutingContext(replica_shutdown=ReplicaShutdown()) for _ in range(3)]
    for context in contexts:
        accept(router, context, Replica("a"))
    assert router._inflight.num_sessions("a") == 3
    del contexts, context
    gc.collect()
    assert router._inflight.num_sessions("a") == 0
