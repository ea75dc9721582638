"""The requests and sessions in flight from one ingress at each replica, counted by their contexts.

Ray Serve's own queue lengths expire some seconds after a replica's last report, and a replica that
does not report because it is full would then look idle. Contexts are referenced weakly, so that a
request that is gone, however it ended, no longer counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

from casa_serving.cluster.routing_context import RoutingContext


class InflightTracker:
    """The contexts of requests and live sessions by replica."""

    def __init__(self) -> None:
        # Keyed by identity: two contexts may be equal.
        self._contexts: dict[str, WeakValueDictionary[int, RoutingContext]] = {}

    def add(self, context: RoutingContext) -> None:
        """Record that `context.replica` has accepted the request."""
        self._contexts.setdefault(context.replica, WeakValueDictionary())[id(context)] = context

    def num_requests(self, replica: str) -> int:
        """Return the requests in flight at the replica, without live sessions."""
        return sum(not context.is_live for context in self._at(replica))

    def num_sessions(self, replica: str) -> int:
        """Return how many live sessions the replica has."""
        return sum(context.is_live for context in self._at(replica))

    def keep_only(self, replicas: Iterable[str]) -> list[RoutingContext]:
        """Drop replicas that are gone; return the contexts that were in flight at them."""
        gone = self._contexts.keys() - set(replicas)
        left = [context for replica in gone for context in self._at(replica)]
        for replica in gone:
            del self._contexts[replica]
        return left

    def _at(self, replica: str) -> list[RoutingContext]:
        contexts = list(self._contexts.get(replica, {}).values())
        return [context for context in contexts if context.replica == replica and not context.finished]
