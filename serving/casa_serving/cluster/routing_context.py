"""What travels with a request from the ingress to the router, and back.

Ray Serve's router runs in the ingress process and sees the arguments of the call before they are
sent. One of them carries the names of the images, so that the router reads no body, and takes down
the router's decision for the ingress.
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
    """A request's images, and where it went.

    Attributes:
        images: Names of its images (`image_keys`).
        hits: Images that each replica had seen when the request was first looked at; None before.
        replica: The replica that took the request.
        session: "new", "kept" or "moved" (its replica is gone); "" for a request without a session.
        affinity: "hit" (the replica had all images), "partial", "miss"; "" without images.
        avoid: Replicas that were asked already and refused; taken only where there is no other.
        departure: Told by the router when the replica leaves; stays in the ingress. Live sessions have one.
        finished: The ingress is done with it, and it no longer counts as the replica's work.
    """

    images: tuple[str, ...] = ()
    hits: Mapping[str, int] | None = None
    replica: str = ""
    session: str = ""
    affinity: str = field(default="")
    avoid: frozenset[str] = frozenset()
    departure: ReplicaShutdown | None = None
    finished: bool = False

    @property
    def is_live(self) -> bool:
        """Whether it is a live session's and not a request's."""
        return self.departure is not None

    def reset_for_retry(self) -> None:
        """Makes ready for another replica, after the one that had taken the request has died. Mutates this context.

        The session has lost its home then, whatever the router still believes.
        """
        self.avoid |= {self.replica}
        self.session = "moved" if self.session else ""
        self.hits = None
        self.replica = self.affinity = ""

    def __getstate__(self) -> dict[str, Any]:
        """Returns what travels to the replica: a loop's event cannot."""
        return {**self.__dict__, "departure": None}

    def response_headers(self) -> dict[str, str]:
        """Returns what the client is told; empty values are left out."""
        headers = {REPLICA_HEADER: self.replica, SESSION_HEADER: self.session, IMAGES_HEADER: self.affinity}
        return {name: value for name, value in headers.items() if value}

    def response_header_pairs(self) -> list[tuple[bytes, bytes]]:
        """Returns the same as ASGI takes it."""
        return [(name.encode(), value.encode("latin-1")) for name, value in self.response_headers().items()]


def find_context(arguments: list) -> RoutingContext | None:
    """Returns the context among a call's arguments; calls that are no requests have none."""
    return next((argument for argument in arguments if isinstance(argument, RoutingContext)), None)
