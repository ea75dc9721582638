"""Check that the replicas fit on the cluster, for which Ray Serve would wait forever."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from casa_engine.errors import InputError


def cluster_has_gpu() -> bool:
    """Return whether a node of the cluster has a GPU; of this machine if no cluster runs."""
    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) > 0
    import torch

    return torch.cuda.is_available()


def check_capacity(worker: Mapping[str, float], num_workers: int, min_replicas: int) -> None:
    """Reject a replica that fits on no node, and more replicas than fit on all.

    Args:
        worker: Resources of one worker of a replica.
        num_workers: Workers of a replica, all on one node.
        min_replicas: Replicas that must run at once.

    Raises:
        InputError: Names the required and the available resources. Nothing is checked if no cluster runs.
    """
    if not ray.is_initialized() or count_fitting(worker, num_workers) >= min_replicas:
        return
    need = replica_needs(worker, num_workers)
    shown = ", ".join(describe({name: node.get(name, 0) for name in need}) for node in node_resources())
    raise InputError(
        f"The cluster cannot hold {min_replicas} replicas of {describe(need)} each: its nodes have {shown}. Lower "
        "replicas.min, cpus or tensor_parallel_size, add nodes, or set wait_for_nodes where a cluster "
        "autoscaler adds them."
    )


def count_fitting(worker: Mapping[str, float], num_workers: int) -> int:
    """Return how many replicas fit on the cluster's nodes while these run nothing else; 0 if no cluster runs."""
    if not ray.is_initialized():
        return 0
    need = replica_needs(worker, num_workers)
    return sum(replicas_on(node, need) for node in node_resources())


def replica_needs(worker: Mapping[str, float], num_workers: int) -> dict[str, float]:
    """Return the resources of a replica."""
    return {name: amount * num_workers for name, amount in worker.items()}


def node_resources() -> list[Mapping[str, float]]:
    """Return the resources of each running node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def replicas_on(node: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Return how many replicas fit on a node that runs nothing else."""
    return min(int(node.get(name, 0) / amount + 1e-9) for name, amount in need.items())


def describe(resources: Mapping[str, float]) -> str:
    """Return resources as text, such as `2 CPU + 1 GPU`."""
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items())
