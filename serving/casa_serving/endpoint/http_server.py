"""What is set on the HTTP server itself, which vLLM makes and gives no options for.

vLLM keeps uvicorn's server in the app's state before it starts. Its configuration is read for
each connection, so that what is set when the application starts counts for all of them.
"""

from __future__ import annotations

from argparse import Namespace

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from casa_serving.options.live_options import LiveOptions


def configure_server(server: uvicorn.Server, args: Namespace) -> None:
    """Sets the bounds of the protocols.

    Mutates:
        server: its configuration.
    """
    config = server.config
    # The bounds on headers (--h11-max-...) hold for this parser only; the other one has none.
    config.http_protocol_class = H11Protocol
    # Frames are compressed images; what inflates is an attack: 16 kB become 16 MB.
    config.ws_per_message_deflate = False
    config.ws_max_size = LiveOptions.from_arguments(vars(args)).max_message_bytes
