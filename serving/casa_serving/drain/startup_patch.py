"""Replaces `run_server` in vLLM's command, for vLLM 0.29.0: a signal stops a server that is still starting.

vLLM's handler raises KeyboardInterrupt at SIGTERM, which is lost while the engine starts (`zmq_socket_ctx` catches it
and stops waiting for the engine): the server then waits ten minutes for an engine that waits for the server. An
exception within a destructor is lost too. There is no hook: the handler is installed in the first lines of the
function. The replacement does the same without them.
"""

from __future__ import annotations

import argparse
import inspect
import signal
from collections.abc import Callable

from casa_serving.drain.processes import ENDING_SIGNALS

REPLACED = "signal.signal(signal.SIGTERM, _interrupt_init)"


def replace_run_server(on_signal: Callable[[], None]) -> None:
    """Make SIGINT and SIGTERM call `on_signal` until the server is ready; then `ServerShutdown` handles them.

    Raises:
        RuntimeError: vLLM's function is not the one that this was written for.
    """
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.utils.system_utils import decorate_logs

    if REPLACED not in inspect.getsource(serve.run_server):
        raise RuntimeError("vLLM's run_server has changed: see what casa_serving.drain.startup_patch does to it.")

    async def run_server(args: argparse.Namespace) -> None:
        decorate_logs("APIServer", skip_if_decorated=True)
        for number in ENDING_SIGNALS:
            signal.signal(number, lambda *_: on_signal())
        listen_address, sock = serve.setup_server(args, reuse_port=False)
        await run_server_worker(listen_address, sock, args)

    serve.run_server = run_server
