"""The context that the ingress passes to the router with a request, and that the router fills in.

Ray Serve's router runs in the ingress process and sees the arguments of the call before they are
sent. One of them carries the digests of the images, so that the router reads no body, and the router
stores its decision in it for the ingress.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from casa_serving.cluster.live.session_ticket import ReplicaShutdown

REPLICA_HEADER = "x-casa-replica"
SESSION_HEADER = "x-casa-session"
IMAGES_HEADER = "x-casa-images"


@dataclass
class RoutingContext:
    """A request's images, and the router's decision.

    Attributes:
        images: Digests of its images (`digest_images`).
        hits: Images that each replica had seen when the request was first routed; None before.
        promised: The replica that is about to see the images, and those that will be new to it.
        replica: The replica that accepted the request.
        session: "new", "kept" or "moved" (its replica is gone); "" for a request without a session.
        affinity: "hit" (the replica had all images), "partial", "miss"; "" without images.
        avoid: Replicas that rejected it or died; chosen only if there is no other.
        replica_shutdown: Notified by the router when the replica shuts down; stays in the ingress. Live sessions only.
        finished: Whether the request has ended and no longer counts as in flight.
    """

    images: tuple[str, ...] = ()
    hits: Mapping[str, int] | None = None
    promised: tuple[str, tuple[str, ...]] = ("", ())
    replica: str = ""
    session: str = ""
    affinity: str = field(default="")
    avoid: frozenset[str] = frozenset()
    replica_shutdown: ReplicaShutdown | None = None
    finished: bool = False

    @property
    def is_live(self) -> bool:
        """Whether it is of a live session, not of a request."""
        return self.replica_shutdown is not None

    def reset_for_retry(self) -> None:
        """Reset the decision after the replica has died, for another one. Mutates this context.

        The session counts as moved, whatever the router has recorded.
        """
        self.avoid |= {self.replica}
        self.session = "moved" if self.session else ""
        self.hits, self.promised = None, ("", ())
        self.replica = self.affinity = ""

    def __getstate__(self) -> dict[str, Any]:
        """Return what is sent to the replica: an event loop's event cannot be pickled."""
        return {**self.__dict__, "replica_shutdown": None}

    def response_headers(self) -> dict[str, str]:
        """Return the response headers; empty values are omitted."""
        headers = {REPLICA_HEADER: self.replica, SESSION_HEADER: self.session, IMAGES_HEADER: self.affinity}
        return {name: value for name, value in headers.items() if value}

    def response_header_pairs(self) -> list[tuple[bytes, bytes]]:
        """Return the response headers in ASGI's format."""
        return [(name.encode(), value.encode("latin-1")) for name, value in self.response_headers().items()]


def find_context(arguments: list) -> RoutingContext | None:
    """Return the context among a call's arguments, or None."""
    return next((argument for argument in arguments if isinstance(argument, RoutingContext)), None)
