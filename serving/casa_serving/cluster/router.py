"""Ray Serve's request router for CASA: a session stays on its replica, an image goes where it is cached.

1.  A known session goes to its replica, and waits for it while it is full. If that replica is gone,
    another is chosen and the response has `x-casa-session: moved`.
2.  Otherwise the replica that has seen most of the request's images is preferred, unless it has
    `max_imbalance` requests more than the least loaded one.
3.  Otherwise the least loaded replica.

Replicas in a context's `avoid` are chosen only if there is no other. A context's `replica_shutdown` is notified when
its replica is stopped or has died.

A replica at its limit of requests gets no more: Ray Serve, which has one limit for requests and live sessions, would
also fill the slots of live sessions with requests.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter
from ray.util.metrics import Counter

from casa_serving.cluster.affinity import Affinity, preference
from casa_serving.cluster.image_digests import digest
from casa_serving.cluster.inflight import InflightTracker
from casa_serving.cluster.routing_context import RoutingContext, find_context


class CasaRequestRouter(RequestRouter):
    """Chooses a replica for each request of one ingress process."""

    def initialize_state(
        self,
        affinity: bool,
        max_images: int,
        max_sessions: int,
        max_imbalance: int,
        max_requests: int,
        max_waiting: int,
    ) -> None:
        """Called by Ray Serve with the deployment's `request_router_kwargs`.

        Args:
            affinity: See `config.Routing`, also for the next three.
            max_images: Recorded for each replica.
            max_sessions: Recorded in all.
            max_imbalance: In requests.
            max_requests: Limit of a replica, without live sessions (`Concurrency.per_replica`).
            max_waiting: Limit of the queue in this ingress (`Concurrency.queued`).
        """
        self._enabled = affinity
        self._max_imbalance, self._max_requests, self._max_waiting = max_imbalance, max_requests, max_waiting
        self._affinity = Affinity(max_images, max_sessions)
        self._inflight = InflightTracker()
        tags = {"application": self._deployment_id.app_name, "deployment": self._deployment_id.name}
        names = (*tags, "result")
        self._sessions_counter = Counter("casa_routing_sessions", "Requests of sessions: new, kept or moved.", names)
        self._requests_counter = Counter("casa_routing_requests", "Requests with images: hit, partial or miss.", names)
        self._images_counter = Counter("casa_routing_images", "Images sent to a replica that knew them or not.", names)
        for counter in (self._sessions_counter, self._requests_counter, self._images_counter):
            counter.set_default_tags(tags)

    @property
    def max_num_routing_tasks(self) -> int:
        """Number of requests that are routed concurrently: all that wait.

        With Ray Serve's default, two for each replica, a few requests of a session whose replica is full
        would block all others.
        """
        return self._max_waiting

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        """Return replicas in groups, best first; Ray Serve takes the first that is not full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        context = find_context(pending_request.args) or RoutingContext()
        everywhere = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        replicas = {name: replica for name, replica in everywhere.items() if name not in context.avoid} or everywhere
        session = digest(pending_request.metadata.session_id) if self._enabled else ""
        images = context.images if self._enabled else ()
        hits = {replica: self._affinity.num_images_on(replica, images) for replica in replicas}
        context.hits = hits if context.hits is None else context.hits
        assigned = self._affinity.session_replica(session) if session else None
        context.session = context.session or session_state(session, assigned, replicas)
        free = [name for name in replicas if context.is_live or self._inflight.num_requests(name) < self._max_requests]
        if assigned in replicas:
            return [[replicas[assigned]]] if assigned in free else []
        tie_key = session or next(iter(images), pending_request.metadata.internal_request_id)
        order = preference(hits, {name: self._load(replicas[name]) for name in free}, self._max_imbalance, tie_key)
        if self._enabled and order:
            self._promise(context, order[0], session)
        # A new session is bound immediately: two simultaneous requests of it must get the same replica.
        return [[replicas[replica]] for replica in (order[:1] if session else order)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray Serve when a replica has accepted a request."""
        context = find_context(pending_request.args)
        if context is None:
            return
        context.replica = replica_id.unique_id
        self._inflight.add(context)
        if replica_id not in self.curr_replicas:
            self._notify_shutdowns()
        if context.session:
            self._sessions_counter.inc(tags={"result": context.session})
        if context.images:
            self._count_images(context)
        if self._enabled:
            self._promise(context, context.replica, digest(pending_request.metadata.session_id))

    def update_replicas(self, replicas: list[Any]) -> None:
        """Called by Ray Serve when replicas were added or removed."""
        super().update_replicas(replicas)
        self._affinity.keep_only(replica_id.unique_id for replica_id in self.curr_replicas)
        self._notify_shutdowns()

    def _promise(self, context: RoutingContext, replica: str, session: str) -> None:
        """Record where a request goes, already before it is accepted: requests that arrive meanwhile go there too.

        A replica that was full, or did not answer in time, is not going to see its images.
        """
        new = self._affinity.record(replica, session, context.images)
        former, images = context.promised
        if former != replica:
            self._affinity.forget(former, images)
            context.promised = replica, new

    def _notify_shutdowns(self) -> None:
        for context in self._inflight.keep_only(replica_id.unique_id for replica_id in self.curr_replicas):
            if context.replica_shutdown is not None:
                context.replica_shutdown.notify()

    def _load(self, replica: Any) -> int:
        """Return a replica's requests and sessions: its last report, or those in flight from here if more."""
        name = replica.replica_id.unique_id
        own = self._inflight.num_requests(name) + self._inflight.num_sessions(name)
        return max(own, self.replica_queue_len_cache.get(replica.replica_id) or 0)

    def _count_images(self, context: RoutingContext) -> None:
        hits = (context.hits or {}).get(context.replica, 0)
        context.affinity = "hit" if hits == len(context.images) else "partial" if hits else "miss"
        self._requests_counter.inc(tags={"result": context.affinity})
        for result, amount in (("hit", hits), ("miss", len(context.images) - hits)):
            if amount:
                self._images_counter.inc(amount, tags={"result": result})


def session_state(session: str, assigned: str | None, replicas: dict[str, Any]) -> str:
    """Return the value of the session header; "" for a request without a session."""
    if not session:
        return ""
    if assigned is None:
        return "new"
    return "kept" if assigned in replicas else "moved"
