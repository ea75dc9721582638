"""What one ingress has at each replica at this moment, counted by the contexts that its requests carry.

Ray Serve's own lengths of queues are forgotten after some seconds without news from a replica, and
a replica that is silent because it is full would then look idle. A context that nobody holds any more
counts no longer, so that nothing can be left over.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

from casa_serving.cluster.routing_context import RoutingContext


class InflightTracker:
    """The contexts of requests and live sessions by replica."""

    def __init__(self) -> None:
        # By identity: two contexts may say the same.
        self._contexts: dict[str, WeakValueDictionary[int, RoutingContext]] = {}

    def add(self, context: RoutingContext) -> None:
        """Records that `context.replica` has taken the request."""
        self._contexts.setdefault(context.replica, WeakValueDictionary())[id(context)] = context

    def num_requests(self, replica: str) -> int:
        """Returns how many requests the replica works on, without live sessions."""
        return sum(not context.is_live for context in self._at(replica))

    def num_sessions(self, replica: str) -> int:
        """Returns how many live sessions the replica has."""
        return sum(context.is_live for context in self._at(replica))

    def keep_only(self, replicas: Iterable[str]) -> list[RoutingContext]:
        """Forgets replicas that are gone; returns the contexts of what they still had."""
        gone = self._contexts.keys() - set(replicas)
        left = [context for replica in gone for context in self._at(replica)]
        for replica in gone:
            del self._contexts[replica]
        return left

    def _at(self, replica: str) -> list[RoutingContext]:
        contexts = list(self._contexts.get(replica, {}).values())
        return [context for context in contexts if context.replica == replica and not context.finished]
