"""What the router does for live sessions: replicas to avoid, and news of one that leaves; without Ray's own part."""

import asyncio
import gc
from types import SimpleNamespace

import pytest
from ray.serve.request_router import RequestRouter

from casa_serving.cluster.live.session_ticket import ReplicaShutdown
from casa_serving.cluster.router import CasaRequestRouter
from casa_serving.cluster.routing_context import RoutingContext

pytestmark = pytest.mark.unit


def replica(name):
    # Frozen and hashable, as Ray's ids are.
    return SimpleNamespace(replica_id=Name(name))


class Name(str):
    @property
    def unique_id(self):
        return str(self)


@pytest.fixture
def router(monkeypatch):
    """A router that knows replicas only by what `update_replicas` has told."""

    def update(self, replicas):
        self._replicas = {each.replica_id: each for each in replicas}

    monkeypatch.setattr(RequestRouter, "update_replicas", update)
    made = CasaRequestRouter.__new__(CasaRequestRouter)
    made._deployment_id = SimpleNamespace(app_name="app", name="model")
    made._replica_queue_len_cache = {}
    made.initialize_state(affinity=True, max_images=8, max_sessions=8, max_imbalance=8, max_requests=2, max_waiting=64)
    made.update_replicas([replica("a"), replica("b")])
    return made


def pending(context, session=""):
    metadata = SimpleNamespace(session_id=session, internal_request_id="1")
    return SimpleNamespace(args=[context], metadata=metadata, routing_context=SimpleNamespace(should_backoff=False))


def choose(router, context, session=""):
    """The replicas in the order in which Ray would try them."""
    groups = asyncio.run(router.choose_replicas(list(router.curr_replicas.values()), pending(context, session)))
    return [each.replica_id for group in groups for each in group]


def test_replicas_to_avoid_are_taken_only_where_there_is_no_other(router):
    assert set(choose(router, RoutingContext())) == {"a", "b"}
    assert choose(router, RoutingContext(avoid=frozenset("a"))) == ["b"]
    assert set(choose(router, RoutingContext(avoid=frozenset("ab")))) == {"a", "b"}


def test_a_session_moves_from_a_home_that_is_to_be_avoided(router):
    (home, *_) = choose(router, RoutingContext(), "mine")
    assert choose(router, RoutingContext(), "mine") == [home]
    context = RoutingContext(avoid=frozenset([home]))
    (other,) = choose(router, context, "mine")
    assert (context.session, {home, other}) == ("moved", {"a", "b"})
    assert choose(router, RoutingContext(), "mine") == [other]


async def test_sessions_of_a_replica_that_leaves_are_told(router):
    contexts = {name: RoutingContext(replica_shutdown=ReplicaShutdown()) for name in ("a", "b")}
    for name, context in contexts.items():
        router.on_request_routed(pending(context), Name(name), None)
    # Ray's router has a loop of its own.
    await asyncio.to_thread(router.update_replicas, [replica("b"), replica("c")])
    await asyncio.wait_for(contexts["a"].replica_shutdown.wait(), 5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(contexts["b"].replica_shutdown.wait(), 0.1)


async def test_a_session_that_comes_while_its_replica_leaves_is_told(router):
    context = RoutingContext(replica_shutdown=ReplicaShutdown())
    router.update_replicas([replica("b")])
    router.on_request_routed(pending(context), Name("a"), None)
    await asyncio.wait_for(context.replica_shutdown.wait(), 5)


async def test_sessions_that_have_ended_are_forgotten(router):
    for _ in range(3):
        router.on_request_routed(pending(RoutingContext(replica_shutdown=ReplicaShutdown())), Name("a"), None)
    gc.collect()
    assert router._inflight.num_sessions("a") == 0
