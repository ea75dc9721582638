"""What one ingress has at each replica at this moment, counted by the notes that its requests carry.

Ray Serve's own lengths of queues are forgotten after some seconds without news from a replica, and
a replica that is silent because it is full would then look idle. A note that nobody holds any more
counts no longer, so that nothing can be left over.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

from casa_serving.cluster.routing_context import RoutingNote


class InWork:
    """The notes of requests and live sessions by replica."""

    def __init__(self) -> None:
        # By identity: two notes may say the same.
        self._notes: dict[str, WeakValueDictionary[int, RoutingNote]] = {}

    def add(self, note: RoutingNote) -> None:
        """Records that `note.replica` has taken the request."""
        self._notes.setdefault(note.replica, WeakValueDictionary())[id(note)] = note

    def num_requests(self, replica: str) -> int:
        """Returns how many requests the replica works on, without live sessions."""
        return sum(not note.is_live for note in self._at(replica))

    def num_sessions(self, replica: str) -> int:
        """Returns how many live sessions the replica has."""
        return sum(note.is_live for note in self._at(replica))

    def keep_only(self, replicas: Iterable[str]) -> list[RoutingNote]:
        """Forgets replicas that are gone; returns the notes of what they still had."""
        gone = self._notes.keys() - set(replicas)
        left = [note for replica in gone for note in self._at(replica)]
        for replica in gone:
            del self._notes[replica]
        return left

    def _at(self, replica: str) -> list[RoutingNote]:
        notes = list(self._notes.get(replica, {}).values())
        return [note for note in notes if note.replica == replica and not note.finished]
