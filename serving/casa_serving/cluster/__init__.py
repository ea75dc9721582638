"""CASA on Ray Serve: several replicas behind one OpenAI-compatible endpoint.

Nothing here is imported by `casa-serve` unless `--ray` is given. `build_app` is what `serve run`
and a Serve config file name; `casa_serving.cluster.embedded:app` is what `serve build` names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def build_app(args: dict[str, Any]) -> Application:
    """Build the application from a cluster configuration (`ClusterConfig`, docs/cluster.md).

    Args:
        args: The configuration as a mapping; empty for the embedded model on one replica.

    Raises:
        InputError: A key is unknown, a value is invalid, or no node has the resources asked for.
        CheckpointError: The checkpoint is not one.
    """
    from casa_serving.cluster.application import build

    return build(args)
