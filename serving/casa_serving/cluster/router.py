"""Ray Serve's request router for CASA: a session stays where it is, images go where their pages are.

1.  A session that the router knows goes to its replica, and waits there when it is full. When that
    replica is gone, another is taken and the client is told (`x-casa-session: moved`).
2.  Otherwise the replica that has seen most of the request's images comes first, unless it has
    `max_imbalance` requests more than the least loaded one.
3.  Otherwise the least loaded replica.

Replicas that a context says to avoid are passed over while there is any other. A context with a `departure` is notified
when its replica leaves, whether that is being stopped or has died.

A replica that has as many requests as it may have gets no other: Ray Serve would give it those as well that are kept
free for live sessions, since it knows one limit for both.
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
            max_images: Of each replica.
            max_sessions: Of all.
            max_imbalance: In requests.
            max_requests: What a replica takes, without live sessions (`Concurrency.per_replica`).
            max_waiting: What may wait here (`Concurrency.queued`).
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
        """Requests that are looked at, at the same time: all that wait.

        Ray Serve's two for each replica would let a few requests of a session whose replica is full
        stand before all others.
        """
        return self._max_waiting

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        """Returns replicas in groups, best first; Ray Serve takes the first that is not full."""
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
        home = self._affinity.session_home(session) if session else None
        context.session = context.session or session_state(session, home, replicas)
        free = [name for name in replicas if context.is_live or self._inflight.num_requests(name) < self._max_requests]
        if home in replicas:
            return [[replicas[home]]] if home in free else []
        tie_key = session or next(iter(images), pending_request.metadata.internal_request_id)
        order = preference(hits, {name: self._load(replicas[name]) for name in free}, self._max_imbalance, tie_key)
        if self._enabled and order:
            # Before the answer of the replica, so that requests that come meanwhile follow.
            self._affinity.remember(order[0], session, images)
        # A new session is bound at once: two requests of it that come together must not be divided.
        return [[replicas[replica]] for replica in (order[:1] if session else order)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray Serve when a replica has accepted a request."""
        context = find_context(pending_request.args)
        if context is None:
            return
        context.replica = replica_id.unique_id
        self._inflight.add(context)
        if replica_id not in self.curr_replicas:
            self._tell_departures()
        if context.session:
            self._sessions_counter.inc(tags={"result": context.session})
        if context.images:
            self._count_images(context)
        if self._enabled:
            self._affinity.remember(context.replica, digest(pending_request.metadata.session_id), context.images)

    def update_replicas(self, replicas: list[Any]) -> None:
        """Called by Ray Serve when replicas came or went."""
        super().update_replicas(replicas)
        self._affinity.keep_only(replica_id.unique_id for replica_id in self.curr_replicas)
        self._tell_departures()

    def _tell_departures(self) -> None:
        for context in self._inflight.keep_only(replica_id.unique_id for replica_id in self.curr_replicas):
            if context.departure is not None:
                context.departure.notify()

    def _load(self, replica: Any) -> int:
        """Returns a replica's requests and sessions: what it said last, or what it has from here if that is more."""
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


def session_state(session: str, home: str | None, replicas: dict[str, Any]) -> str:
    """Returns what the client is told about its session; "" without one."""
    if not session:
        return ""
    if home is None:
        return "new"
    return "kept" if home in replicas else "moved"
