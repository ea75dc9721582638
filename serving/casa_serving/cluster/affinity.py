"""The router's records: the replica of each session, and the images that each replica has seen.

Plain bookkeeping without Ray. It records what was sent, not what the replicas still have cached: a
page may have been evicted since. `max_images` limits it to about what a replica can cache.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping


class Affinity:
    """Sessions and images by replica; replicas are plain strings.

    Args:
        max_images: Images remembered for each replica.
        max_sessions: Sessions remembered.
    """

    def __init__(self, max_images: int, max_sessions: int) -> None:
        self._max_images = max_images
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._images: dict[str, OrderedDict[str, None]] = {}

    def session_replica(self, session: str) -> str | None:
        """Return the last replica of the session, whether it still exists or not."""
        return self._sessions.get(session)

    def num_images_on(self, replica: str, images: Iterable[str]) -> int:
        """Return how many of `images` the replica has seen."""
        seen = self._images.get(replica, {})
        return sum(image in seen for image in images)

    def record(self, replica: str, session: str | None, images: Iterable[str]) -> tuple[str, ...]:
        """Record that a request went to the replica.

        Returns:
            Those of the images that it had not seen.
        """
        if session:
            self._sessions[session] = replica
            self._sessions.move_to_end(session)
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)
        seen = self._images.setdefault(replica, OrderedDict())
        new = tuple(image for image in images if image not in seen)
        for image in images:
            seen[image] = None
            seen.move_to_end(image)
            if len(seen) > self._max_images:
                seen.popitem(last=False)
        return new

    def forget(self, replica: str, images: Iterable[str]) -> None:
        """Drop images that the replica was about to see, and did not."""
        for image in images:
            self._images.get(replica, {}).pop(image, None)

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Drop the images of replicas that are gone; their sessions get `moved` with their next request."""
        alive = set(replicas)
        self._images = {replica: seen for replica, seen in self._images.items() if replica in alive}


def preference(hits: Mapping[str, int], loads: Mapping[str, int], max_imbalance: int, tie_key: str) -> list[str]:
    """Order replicas for a request that is not bound to one, best first.

    Args:
        hits: Images of the request that each replica has seen.
        loads: Requests in flight by replica.
        max_imbalance: Requests more than the least loaded replica has, from which on a replica's
            images no longer count.
        tie_key: Equal replicas are ordered by rendezvous hashing of this, so that every ingress
            prefers the same one for the same key.
    """
    lightest = min(loads.values(), default=0)

    def rank(replica: str) -> tuple[int, int, bytes]:
        usable = hits[replica] if loads[replica] - lightest < max_imbalance else 0
        tie = hashlib.blake2b(f"{replica}\0{tie_key}".encode("utf-8", "surrogatepass"), digest_size=8)
        return (-usable, loads[replica], tie.digest())

    return sorted(loads, key=rank)
