"""Access to uvicorn's connections, which ASGI does not expose."""

from __future__ import annotations

from starlette.types import Scope


def abort_connection(scope: Scope) -> None:
    """Abort the connection of a client that does not read.

    Closing it would wait until the client has read the send buffer, which it never does. The connection is looked up
    in `app.state.server`; behind another server, such as Ray Serve's proxy, there is none and nothing happens.

    Args:
        scope: ASGI scope of the request or the WebSocket, the same object that the server created.
    """
    server = getattr(scope["app"].state, "server", None)
    for connection in list(server.server_state.connections) if server is not None else []:
        if getattr(connection, "scope", None) is scope:
            connection.transport.abort()
