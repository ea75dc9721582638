"""What the three graphs take and give: every tensor's name, dtype and axes.

    vision     pixel_values, positions, attention windows  -> image_embeds
    image_kv   image_embeds (padded rows)                  -> image_key.L, image_value.L     for each CA layer L
    decoder    input_ids, positions, windows, caches       -> logits, caches with the new tokens

One table drives everything that must agree: the example inputs and dynamic shapes of the export, the names in the
files, the manifest, TensorRT's optimisation profiles and the runtimes. A dynamic axis is a name of `AXES`; an axis
of the form `4*image_tokens` is a multiple of one; `past+tokens` is a sum (outputs only). Only caches have the
model's dtype: what a program reads or writes itself is int64 or float32, whichever dtype the weights have.
"""

from dataclasses import dataclass

from casa_engine.configuration import CasaConfig

AXES = {
    "batch": "conversations in one call",
    "image_tokens": "image tokens of one image (vision) or of all windows of a call (image_kv, decoder), padded",
    "windows": "attention windows of the vision encoder",
    "window_slots": "image tokens of the largest attention window of the vision encoder",
    "tokens": "new text tokens of one call, padded",
    "logits": "positions among the new tokens that get logits",
    "past": "text tokens in the self-attention cache",
    "window_past": "text tokens in the CA cache (ca_tv)",
}
Axis = str | int


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: Its name in the file.
        dtype: `int64`, `float32`, `float16` or `bfloat16`.
        axes: A number for a fixed axis, a name or expression for a dynamic one.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its name and its tensors in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def axis_size(axis: Axis, sizes: dict[str, int]) -> int:
    """Return the size of an axis when the named ones have these sizes.

    Args:
        axis: A number, a name, `factor*name` or `name+name`.
        sizes: Size of each named axis.
    """
    if isinstance(axis, int):
        return axis
    if "+" in axis:
        return sum(sizes[name] for name in axis.split("+"))
    factor, _, name = axis.rpartition("*")
    return int(factor or 1) * sizes[name]


def vision_spec(config: CasaConfig) -> GraphSpec:
    """Return the graph from the pixels of ONE image (one frame) to its image tokens."""
    vision = config.vision_config
    unit = vision.spatial_merge_size**2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return GraphSpec(
        "vision",
        (
            TensorSpec("pixel_values", "float32", (f"{unit}*image_tokens", patch)),
            TensorSpec("patch_positions", "int64", (f"{unit}*image_tokens", 2)),
            TensorSpec("vision_windows", "int64", ("windows", "window_slots")),
            TensorSpec("vision_slots", "int64", ("image_tokens",)),
        ),
        (TensorSpec("image_embeds", "float32", ("image_tokens", config.text_config.hidden_size)),),
    )


def image_kv_spec(config: CasaConfig, dtype: str) -> GraphSpec:
    """Return the graph from image tokens to the keys and values of every CA layer."""
    inputs = [TensorSpec("image_embeds", "float32", ("batch", "image_tokens", config.text_config.hidden_size))]
    if config.sees_window_text:
        inputs.append(TensorSpec("image_positions", "int64", (3, "batch", "image_tokens")))
    return GraphSpec("image_kv", tuple(inputs), _caches(config, "image", "image_tokens", dtype))


def decoder_spec(config: CasaConfig, dtype: str) -> GraphSpec:
    """Return the graph from new text tokens to logits; caches in and out."""
    text = ("batch", "tokens")
    inputs = [
        TensorSpec("input_ids", "int64", text),
        TensorSpec("positions", "int64", text),
        TensorSpec("window_starts", "int64", text),
        TensorSpec("image_starts", "int64", ("batch", "image_tokens")),
        TensorSpec("past_positions", "int64", ("batch", "past")),
    ]
    if config.sees_window_text:
        inputs.append(TensorSpec("window_past_positions", "int64", ("batch", "window_past")))
    inputs.append(TensorSpec("logits_indices", "int64", ("logits",)))
    outputs = [TensorSpec("logits", "float32", ("batch", "logits", config.text_config.vocab_size))]
    inputs += _caches(config, "past", "past", dtype)
    outputs += _caches(config, "present", "past+tokens", dtype)
    if config.sees_window_text:
        inputs += _caches(config, "window_past", "window_past", dtype)
        outputs += _caches(config, "window_present", "window_past+tokens", dtype)
    inputs += _caches(config, "image", "image_tokens", dtype)
    return GraphSpec("decoder", tuple(inputs), tuple(outputs))


def graph_specs(config: CasaConfig, dtype: str) -> dict[str, GraphSpec]:
    """Return the three graphs of a model."""
    specs = (vision_spec(config), image_kv_spec(config, dtype), decoder_spec(config, dtype))
    return {spec.name: spec for spec in specs}


def cache_layers(config: CasaConfig, kind: str) -> list[int]:
    """Return the layers that have a kind of cache: `past`/`present` with self-attention, all other kinds with CA."""
    if kind in ("past", "present"):
        return [layer for layer in range(config.text_config.num_hidden_layers) if config.has_sa(layer)]
    return config.cross_attention_layers


def cache_names(config: CasaConfig, kind: str) -> list[str]:
    """Return the names of the cache tensors of a kind: key and value of each layer in turn."""
    return [f"{kind}_{part}.{layer}" for layer in cache_layers(config, kind) for part in ("key", "value")]


def _caches(config: CasaConfig, kind: str, axis: str, dtype: str) -> tuple[TensorSpec, ...]:
    shape = ("batch", config.text_config.num_key_value_heads, axis, config.head_dim)
    return tuple(TensorSpec(name, dtype, shape) for name in cache_names(config, kind))
