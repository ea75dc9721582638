"""Settings of uvicorn's server, which vLLM creates and has no options for.

vLLM stores uvicorn's server in the app's state before it starts. Its configuration is read for
each connection, so that settings made when the application starts apply to all of them.
"""

from __future__ import annotations

from argparse import Namespace

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from casa_serving.options.live_options import LiveOptions


def configure_server(server: uvicorn.Server, args: Namespace) -> None:
    """Set the limits of HTTP and WebSocket connections.

    Mutates:
        server: its configuration.
    """
    config = server.config
    # The bounds on headers (--h11-max-...) exist for this parser only.
    config.http_protocol_class = H11Protocol
    # Frames are compressed images already; without deflate no message of 16 kB inflates to 16 MB.
    config.ws_per_message_deflate = False
    config.ws_max_size = LiveOptions.from_arguments(vars(args)).max_message_bytes
