"""From the cluster configuration to a Ray Serve application.

The application is like that of `ray.serve.llm.build_openai_app`, an ingress in front of an
`LLMConfig`'s deployment, built from the same public parts. Ray's own ingress parses requests into its
own models and formats its own errors; this one forwards requests to the replica unchanged.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment

from casa_engine.checkpoints import read_config
from casa_engine.errors import InputError
from casa_engine.originals.views import resolve_checkpoint
from casa_serving.cluster.config import ClusterConfig, parse_config
from casa_serving.cluster.engine_arguments import check_engine_arguments
from casa_serving.cluster.ingress import ingress_class
from casa_serving.cluster.replica import CasaServer
from casa_serving.cluster.resources import check_capacity, cluster_has_gpu, count_fitting
from casa_serving.cluster.tenancy import INGRESS
from casa_serving.engine_defaults import (
    CONNECTOR,
    EMBEDDED_NAME,
    HTTP_PLUGIN,
    embedded_checkpoint,
    engine_arguments,
    plugins_with,
    read_checkpoint,
    server_arguments,
)
from casa_serving.live.web_files import page_model
from casa_serving.options.image_limits import ALLOW_LOOPBACK

ROUTER = "casa_serving.cluster.router:CasaRequestRouter"
POLICY = "casa_serving.cluster.autoscaling:LoadPolicy"
SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# Installs the limits on images.
SAFETY = {"VLLM_MEDIA_CONNECTOR": CONNECTOR}
# Ray Serve rounds a surge up to whole replicas.
ONE_MORE = 1
# Pushed to the controller this often; Ray Serve's default of 10 s would double every reaction.
METRICS_INTERVAL_S = 2.0
# An ingress that is replaced by a new version keeps its live sessions until their replicas are replaced too and close
# them. With Ray Serve's default of 20 s their connections would be aborted.
INGRESS_DRAIN_S = 600.0


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application; see `casa_serving.cluster.build_app`.

    Raises:
        InputError: See there; or Ray Serve LLM rejects it, such as an unknown kind of GPU.
    """
    config = check_config(args)
    on_gpu = config.device == "gpu" or (config.device == "auto" and cluster_has_gpu())
    worker = worker_needs(config, on_gpu=on_gpu)
    if not config.wait_for_nodes:
        check_capacity(worker, config.tensor_parallel_size, config.replicas.min)
    surge = config.replicas.surge
    if surge is None:
        surge = count_fitting(worker, config.tensor_parallel_size) > config.replicas.max
    try:
        llm_config = llm_config_of(config, on_gpu=on_gpu, surge=surge)
    except ValidationError as error:
        reasons = "; ".join(problem["msg"] for problem in error.errors())
        raise InputError(f"Ray Serve LLM does not take the cluster configuration: {reasons}.") from error
    model = build_llm_deployment(
        llm_config,
        deployment_cls=CasaServer,
        bind_kwargs={"live_options": config.live.options(config.images.max_image_bytes)},
    )
    has_live = config.live.max_sessions > 0
    routes = ingress_class(
        config.ingress.request_limits(),
        max_prompt_chars(config, llm_config),
        page_model=page_model(llm_config.model_id, checkpoint_folder(config)) if has_live else None,
    )
    ingress = serve.deployment(routes, **ingress_options(config, surge=surge))
    return ingress.bind(model)


def check_config(args: dict[str, Any]) -> ClusterConfig:
    """Check all of a configuration that can be checked without a cluster.

    Raises:
        InputError: A key is unknown, or a value is invalid.
        CheckpointError: The checkpoint is invalid.
    """
    config = parse_config(args)
    check_engine_arguments(config.engine)
    read_checkpoint(checkpoint_folder(config))
    return config


def checkpoint_folder(config: ClusterConfig) -> Path:
    """Return the folder of the model that is served; of an original, its view."""
    return embedded_checkpoint() if config.checkpoint is None else resolve_checkpoint(config.checkpoint)


def max_prompt_chars(config: ClusterConfig, llm_config: LLMConfig) -> int:
    """Return the characters of the longest text that can fit into the model's context."""
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(checkpoint_folder(config)))
    return llm_config.engine_kwargs["max_model_len"] * tokenizer.max_chars_per_token


def llm_config_of(config: ClusterConfig, *, on_gpu: bool, surge: bool) -> LLMConfig:
    """Return Ray Serve LLM's configuration of the replicas.

    Args:
        config: The cluster configuration.
        on_gpu: Whether they run on GPUs.
        surge: Whether there is room for one more than are deployed.
    """
    embedded = config.checkpoint is None
    checkpoint = checkpoint_folder(config)
    name = config.model or (EMBEDDED_NAME if embedded else config.checkpoint.resolve().name)
    arguments, defaults = engine_arguments(
        read_config(checkpoint),
        embedded=embedded,
        on_cpu=not on_gpu,
        live=config.live.max_sessions > 0,
        given={
            **server_arguments(embedded=embedded),
            # Each live session takes one sequence, whether it is captioning or waiting for its next frame.
            "max_num_seqs": config.concurrency.running + config.live.max_sessions,
            "tensor_parallel_size": config.tensor_parallel_size,
            "media_io_kwargs": {"image": media_limits(config)},
            "allowed_media_domains": list(config.images.allowed_media_domains),
            **copy.deepcopy(config.engine),
        },
    )
    # Ray Serve LLM sets it to `name`.
    arguments.pop("served_model_name", None)
    variables = {**defaults, **config.environment, **SAFETY}
    # Only the HTTP plugin: a replica's live sessions have a server of their own.
    variables["VLLM_PLUGINS"] = plugins_with([HTTP_PLUGIN], variables.get("VLLM_PLUGINS"))
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(checkpoint.resolve())},
        accelerator_type=config.accelerator_type if on_gpu else None,
        accelerator_config={"kind": "gpu" if on_gpu else "cpu"},
        placement_group_config={"bundle_per_worker": bundle(config, on_gpu=on_gpu), "strategy": "STRICT_PACK"},
        engine_kwargs={key: asdict(value) if is_dataclass(value) else value for key, value in arguments.items()},
        deployment_config=deployment_options(config, surge=surge),
        runtime_env={"env_vars": variables},
        log_engine_metrics=True,
    )


def media_limits(config: ClusterConfig) -> dict[str, Any]:
    """Return the limits on images as the media connector takes them."""
    return {**config.images.limits().as_options(), ALLOW_LOOPBACK: False}


def bundle(config: ClusterConfig, *, on_gpu: bool) -> dict[str, float]:
    """Return the resources of one worker of a replica."""
    return {"CPU": config.cpus, "GPU": 1} if on_gpu else {"CPU": config.cpus}


def worker_needs(config: ClusterConfig, *, on_gpu: bool) -> dict[str, float]:
    """Return the resources of a node for one worker: its bundle, and a trace of Ray's resource for the kind of GPU."""
    kind = {f"accelerator_type:{config.accelerator_type}": 0.001} if on_gpu and config.accelerator_type else {}
    return {**bundle(config, on_gpu=on_gpu), **kind}


def deployment_options(config: ClusterConfig, *, surge: bool) -> dict[str, Any]:
    """Return Ray Serve's options of the deployment of replicas.

    Args:
        config: The cluster configuration.
        surge: Whether there is room for one more than are deployed.
    """
    replicas, concurrency = config.replicas, config.concurrency
    return {
        # A live session is one request to Ray, from its first message to its last.
        "max_ongoing_requests": concurrency.per_replica + config.live.max_sessions,
        "max_queued_requests": concurrency.queued,
        "backpressure_config": {"status_code": 429, "retry_after_s": concurrency.retry_after_s},
        "graceful_shutdown_timeout_s": replicas.drain_timeout_s,
        "max_surge_percent": ONE_MORE if surge else 0,
        # An engine that does not start will not start at the twentieth try either, Ray Serve's default.
        "max_constructor_retry_count": 3,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        # The bundle reserves the CPUs; the actor itself requests no more.
        "ray_actor_options": {"num_cpus": 0},
        "request_router_config": {
            "request_router_class": ROUTER,
            "request_router_kwargs": {
                **config.routing.model_dump(),
                "max_requests": concurrency.per_replica,
                "max_waiting": concurrency.queued,
            },
        },
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.target_ongoing_requests,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            "metrics_interval_s": METRICS_INTERVAL_S,
            "look_back_period_s": max(METRICS_INTERVAL_S * 2, replicas.upscale_delay_s),
            "policy": {
                "policy_function": POLICY,
                "policy_kwargs": {
                    "target_live_sessions": replicas.target_live_sessions,
                    "target_late_frames": replicas.target_late_frames,
                },
            },
        },
    }


def ingress_options(config: ClusterConfig, *, surge: bool) -> dict[str, Any]:
    """Return Ray Serve's options of the ingress; a session always gets the same one, which records it.

    Args:
        config: The cluster configuration.
        surge: Whether there is room for one more than are deployed.
    """
    return {
        "name": INGRESS,
        "num_replicas": config.ingress.replicas,
        # It only forwards requests; overload is rejected by the queue behind it.
        "max_ongoing_requests": 10_000,
        "graceful_shutdown_timeout_s": INGRESS_DRAIN_S,
        # One that requests no CPU fits on every node. A new version then serves before the old one stops.
        "max_surge_percent": ONE_MORE if surge or config.ingress.cpus == 0 else 0,
        "ray_actor_options": {"num_cpus": config.ingress.cpus},
        "request_router_config": {"request_router_class": SESSION_ROUTER},
    }
