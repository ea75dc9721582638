"""Ray's real request router with our choice, over replicas that nobody asks."""

import asyncio
import time

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest

from casa_serving.cluster.router import CasaRequestRouter
from casa_serving.cluster.routing_context import RoutingContext

DEPLOYMENT = DeploymentID(name="model", app_name="app")


class Replica:
    """A replica as Ray's router knows it; its queue is empty, where it tells it in time."""

    is_cross_language = False
    max_ongoing_requests = 8
    multiplexed_model_ids = frozenset()

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.node_id, self.availability_zone, self.actor_id = "node", None, name
        self.is_late = False

    def update_replica_info(self, info: object) -> None:
        """Do nothing: what Ray tells a replica is not used."""

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(2 * deadline_s if self.is_late else 0)
        return 0


def make_router(max_waiting: int = 64) -> CasaRequestRouter:
    """Return a router over the replicas a and b, each with room for two requests; to be called in an event loop."""
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


def pending(context: RoutingContext, session: str = "") -> PendingRequest:
    """Return a request that waits for a replica."""
    metadata = RequestMetadata(request_id="r", internal_request_id=str(id(context)), session_id=session)
    return PendingRequest(args=[context], kwargs={}, metadata=metadata)


async def route(router: CasaRequestRouter, context: RoutingContext, session: str = "") -> str:
    """Route a request as Ray does, and have its replica accept it; return the replica's name."""
    request = pending(context, session)
    replica = await router._choose_replica_for_request(request)
    router.on_request_routed(request, replica.replica_id, None)
    return context.replica
