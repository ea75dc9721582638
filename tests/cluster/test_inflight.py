"""What an ingress has at each replica, and what the router makes of it."""

import asyncio
import gc
import time

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest

from casa_serving.cluster.inflight import InflightTracker
from casa_serving.cluster.live.session_ticket import ReplicaShutdown
from casa_serving.cluster.router import CasaRequestRouter
from casa_serving.cluster.routing_context import RoutingContext

pytestmark = pytest.mark.unit

DEPLOYMENT = DeploymentID(name="model", app_name="app")


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


class Replica:
    """A replica as Ray's router knows it; the router asks nobody, since its cache knows the lengths."""

    is_cross_language = False
    max_ongoing_requests = 8
    multiplexed_model_ids = frozenset()

    def __init__(self, name):
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.node_id, self.availability_zone, self.actor_id = "node", None, name

    def update_replica_info(self, info):
        pass

    async def get_queue_len(self, *, deadline_s):
        return 0


@pytest.fixture
def make_router():
    """Makes Ray's real router with our choice, in the loop of the test."""

    def make(max_waiting):
        router = CasaRequestRouter(
            deployment_id=DEPLOYMENT,
            handle_source=DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=False,
            get_curr_time_s=time.time,
        )
        router.initialize_state(
            affinity=True, max_images=8, max_sessions=8, max_imbalance=8, max_requests=2, max_waiting=max_waiting
        )
        router.update_replicas([Replica("a"), Replica("b")])
        return router

    return make


def pending(context, session=""):
    metadata = RequestMetadata(request_id="r", internal_request_id=str(id(context)), session_id=session)
    return PendingRequest(args=[context], kwargs={}, metadata=metadata)


async def route(router, context, session=""):
    """Routes a request as Ray does, and has its replica accept it."""
    request = pending(context, session)
    replica = await router._choose_replica_for_request(request)
    router.on_request_routed(request, replica.replica_id, None)
    return context.replica


async def test_a_full_replica_gets_no_request_but_sessions(make_router):
    router = make_router(max_waiting=64)
    contexts = [RoutingContext() for _ in range(4)]
    homes = [await route(router, context) for context in contexts]
    assert sorted(homes) == ["a", "a", "b", "b"]
    late = RoutingContext()
    waiting = asyncio.create_task(route(router, late))
    live = RoutingContext(replica_shutdown=ReplicaShutdown())
    assert await asyncio.wait_for(route(router, live), 5) in "ab"
    await asyncio.sleep(0.2)
    assert not waiting.done()
    contexts[0].finished = True
    assert await asyncio.wait_for(waiting, 5) == homes[0]


async def test_requests_of_a_full_session_hold_up_nobody_else(make_router):
    router = make_router(max_waiting=64)
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
