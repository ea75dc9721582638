"""vLLM's real application with our endpoints and middleware, without an engine: for what is decided before it."""

import os
from unittest import mock

from casa_serving import cli
from casa_serving.engine_defaults import environment, set_environment


def build_real_app(*arguments, live=True):
    """Return the FastAPI application of `casa-serve ARGUMENTS`.

    Its routes are those of the server. Whatever passes the guard fails, since nothing behind it is set up.
    """
    with mock.patch.dict(os.environ):
        os.environ.pop("VLLM_PLUGINS", None)
        set_environment(environment(embedded=True, on_cpu=True, eager=True), live=live)
        args, _ = cli.parse(list(arguments))

        from vllm.entrypoints.launchers.app import build_app

        return build_app(args, ("generate",), None)
