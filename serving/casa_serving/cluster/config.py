"""The cluster configuration: the keys of the YAML file, with defaults that serve the embedded model.

Unknown keys are rejected, and an invalid value gets one error message that names
the key. Everything else about the engine is vLLM's own option under `engine`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from casa_engine.errors import InputError
from casa_serving.options.image_limits import ImageLimits
from casa_serving.options.live_options import LOWEST, LiveOptions
from casa_serving.options.request_limits import RequestLimits

PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Set by the cluster itself; naming them under `engine` would contradict it.
RESERVED_ENGINE_OPTIONS = (
    "model",
    "served_model_name",
    "tensor_parallel_size",
    "media_io_kwargs",
    "max_num_seqs",
    "allowed_media_domains",
    "logits_processors",
)


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Replicas(Section):
    """Number of replicas and autoscaling.

    Attributes:
        min: Lower bound; 0 is not supported, because a cold start takes longer than clients wait.
        max: Upper bound.
        target_ongoing_requests: Target of running and queued requests per replica.
        target_live_sessions: Target of live sessions per replica.
        target_late_frames: Share of late frames of live sessions, above which a replica is added.
        upscale_delay_s: How long the load must be higher before a replica is added.
        downscale_delay_s: How long it must be lower before one is drained.
        drain_timeout_s: How long a replica that is removed may finish its requests.
        surge: Whether a new configuration starts a new replica before it stops an old one, which needs resources for
            one more than are running: without them, both wait forever. None: if the nodes have resources for
            `max` and one more.
    """

    min: PositiveInt = 1
    max: PositiveInt = 1
    target_ongoing_requests: PositiveNumber = 8
    target_live_sessions: PositiveNumber = 4
    target_late_frames: Annotated[float, Field(gt=0, le=1)] = 0.1
    upscale_delay_s: PositiveNumber = 5
    downscale_delay_s: PositiveNumber = 60
    drain_timeout_s: PositiveNumber = 60
    surge: bool | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class Concurrency(Section):
    """Requests that a replica accepts, and those that are queued.

    Attributes:
        running: Requests that a replica's engine runs at once; with the live sessions this is vLLM's
            `max_num_seqs`.
        waiting: Requests that a replica queues beyond these, so that its batch stays full.
        queued: Requests that wait in each ingress while all replicas are full; more are rejected with 429.
            A request still counts here while it is being sent to a replica.
        retry_after_s: `Retry-After` of that error.
    """

    running: PositiveInt = 16
    waiting: Annotated[int, Field(ge=0)] = 4
    queued: PositiveInt = 64
    retry_after_s: PositiveNumber = 1

    @property
    def per_replica(self) -> int:
        """Requests that one replica accepts, without live sessions."""
        return self.running + self.waiting


class Routing(Section):
    """Choice of the replica for a request.

    Attributes:
        affinity: Whether images and sessions are considered; otherwise the least loaded replica is chosen.
        max_images: Images that the router records for each replica; the oldest are dropped.
        max_sessions: Sessions that the router records; the oldest are dropped.
        max_imbalance: A replica that has the images is passed over when it has this many requests
            more than the least loaded one.
    """

    affinity: bool = True
    max_images: PositiveInt = 4096
    max_sessions: PositiveInt = 100_000
    max_imbalance: PositiveInt = 8


class IngressBase(Section):
    """The processes that parse requests and route them.

    Attributes:
        replicas: Their number. Each records its own sessions; a session always gets the same ingress.
        cpus: Ray's logical CPUs for each.
    """

    replicas: PositiveInt = 1
    cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0

    @model_validator(mode="after")
    def _limits_fit_together(self) -> IngressBase:
        self.request_limits()
        return self

    def request_limits(self) -> RequestLimits:
        """Return the limits on requests as `RequestLimits`."""
        return RequestLimits.from_options(self.model_dump())


# Limits are declared once, in `options/`; their names and defaults are taken from there.
Ingress = create_model(
    "Ingress",
    __base__=IngressBase,
    **{
        field.name: (PositiveInt if isinstance(field.default, int) else PositiveNumber, field.default)
        for field in fields(RequestLimits)
    },
)


class ImagesBase(Section):
    """Limits on images; casa-serve's options of these names (docs/limits.md)."""

    allowed_media_domains: tuple[str, ...] = ()

    def limits(self) -> ImageLimits:
        """Return the limits as `ImageLimits`."""
        return ImageLimits.from_options(self.model_dump())


Images = create_model(
    "Images", __base__=ImagesBase, **{field.name: (PositiveInt, field.default) for field in fields(ImageLimits)}
)


# The option of casa-serve for each key under `live`, whose names say which are seconds.
LIVE_OPTIONS = {
    field.name.removeprefix("live_") + ("_s" if isinstance(field.default, float) else ""): field.name
    for field in fields(LiveOptions)
}


class LiveBase(Section):
    """Live sessions of one replica; casa-serve's options `--live-...` (docs/limits.md)."""

    def options(self, max_image_bytes: int) -> LiveOptions:
        """Return them as `LiveOptions`."""
        given = {option: getattr(self, key) for key, option in LIVE_OPTIONS.items()}
        return LiveOptions.from_arguments({**given, "max_image_bytes": max_image_bytes})


def live_type(option: str) -> Any:
    """Return the type of a key under `live`, by its option."""
    default = getattr(LiveOptions, option)
    if isinstance(default, float):
        return PositiveNumber
    kind = PositiveInt if LOWEST[option] else NonNegativeInt
    return kind | None if default is None else kind


Live = create_model(
    "Live",
    __base__=LiveBase,
    **{key: (live_type(option), getattr(LiveOptions, option)) for key, option in LIVE_OPTIONS.items()},
)


class ClusterConfig(Section):
    """A deployment of one checkpoint on Ray Serve.

    Attributes:
        checkpoint: Its folder, the same on every node; None for the model in the package.
        model: The name that clients use; None for the folder's name.
        device: "cpu", "gpu", or "auto": a GPU where the cluster has one.
        accelerator_type: Ray's name of a kind of GPU, such as H100; None for any.
        tensor_parallel_size: GPUs (or CPU processes) of one replica.
        cpus: Ray's logical CPUs for each of these.
        wait_for_nodes: Start although no node has the resources, because a cluster autoscaler will add one.
            Otherwise that is an error.
        engine: vLLM's engine arguments by name.
        environment: Environment variables of the replicas.
    """

    checkpoint: Path | None = None
    model: str | None = None
    device: Literal["auto", "cpu", "gpu"] = "auto"
    accelerator_type: str | None = None
    tensor_parallel_size: PositiveInt = 1
    cpus: PositiveNumber = 1
    wait_for_nodes: bool = False
    replicas: Replicas = Replicas()
    concurrency: Concurrency = Concurrency()
    routing: Routing = Routing()
    ingress: Ingress = Ingress()
    images: Images = Images()
    live: Live = Live()
    engine: dict[str, Any] = {}
    environment: dict[str, str] = {}

    @model_validator(mode="after")
    def _engine_is_free(self) -> ClusterConfig:
        taken = sorted(set(RESERVED_ENGINE_OPTIONS) & set(self.engine))
        if taken:
            raise ValueError(f"engine sets {taken}, which other keys decide (docs/cluster.md)")
        return self


def parse_config(args: dict[str, Any]) -> ClusterConfig:
    """Validate a mapping.

    Raises:
        InputError: Names the first invalid key.
    """
    try:
        return ClusterConfig.model_validate(args)
    except ValidationError as error:
        raise InputError(f"The cluster configuration is wrong: {'; '.join(map(sentence, error.errors()))}.") from error


def sentence(problem: dict[str, Any]) -> str:
    """Return one problem that pydantic found as `key: what is wrong, got what`."""
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"there is no key {key!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"
