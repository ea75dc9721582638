"""Entry point `vllm.general_plugins`: makes the image guard known in every server process.

vLLM runs it in each process it starts, also in those of several API servers and in the
engine's own. It costs nothing where `casa-serve` did not ask for the guard.
"""

from __future__ import annotations

import os

from casa_serving.engine_defaults import CONNECTOR


def register() -> None:
    """Registers the connector and the loader of images; safe to call twice."""
    if os.environ.get("VLLM_MEDIA_CONNECTOR") != CONNECTOR:
        return
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.multimodal.media.connector import MODALITY_IO_MAP

    from casa_serving.endpoint.media import GuardedImageIO, GuardedMediaConnector

    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(GuardedMediaConnector)
    # vLLM asks the modality's class whether a request may change how images are loaded.
    MODALITY_IO_MAP["image"] = GuardedImageIO
