"""Connections of uvicorn, which ASGI has no word for."""

from __future__ import annotations

from starlette.types import Scope


def abort_connection(scope: Scope) -> None:
    """Drops the connection of a client that reads nothing.

    Closing would wait until the client has taken what is in the buffer, which it never does. The connection is
    looked up in the server, which whoever runs one keeps in its application's state; behind a server of somebody
    else's, such as Ray Serve's proxy, there is none.

    Args:
        scope: Of the request or the WebSocket, the very object that the server has made.
    """
    server = getattr(scope["app"].state, "server", None)
    for connection in list(server.server_state.connections) if server is not None else []:
        if getattr(connection, "scope", None) is scope:
            connection.transport.abort()
