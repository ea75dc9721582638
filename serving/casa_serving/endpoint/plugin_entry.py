"""Entry point `vllm.general_plugins`: registers the image guard in every server process.

vLLM runs it in each process it starts: every API server and the engine. It has no effect unless
`casa-serve` selected the guard.
"""

from __future__ import annotations

import os

from casa_serving.engine_environment import CONNECTOR


def register() -> None:
    """Register the connector and the loader of images. Idempotent."""
    if os.environ.get("VLLM_MEDIA_CONNECTOR") != CONNECTOR:
        return
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.multimodal.media.connector import MODALITY_IO_MAP

    from casa_serving.endpoint.media import GuardedImageIO, GuardedMediaConnector

    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(GuardedMediaConnector)
    # vLLM calls the modality's class to merge a request's own options for loading images.
    MODALITY_IO_MAP["image"] = GuardedImageIO
