"""What the hardware allows at best: bytes over bandwidth, operations over peak.

Decode reads every weight once a step, whatever the number of sequences, and each sequence's keys
and values. The first token of a frame costs the vision encoder, the image's keys and values of all
CA layers, and a prefill of little text, which reads the weights once more.
"""

from dataclasses import dataclass

import torch

from casa_engine.configuration import CasaConfig

BYTES_PER_VALUE = 2  # bf16


@dataclass(frozen=True)
class Hardware:
    """Measured peaks of a device.

    Attributes:
        bytes_per_s: Memory bandwidth that a plain copy reaches.
        flop_per_s: bf16 operations a second that a large matrix product reaches.
    """

    bytes_per_s: float
    flop_per_s: float


# Measured on such machines, not read from a data sheet.
H200 = Hardware(bytes_per_s=4.3e12, flop_per_s=790e12)
H100 = Hardware(bytes_per_s=3.0e12, flop_per_s=790e12)


def hardware() -> Hardware:
    """Return the peaks of the device at hand; of an H200 where it is no H100."""
    is_h100 = torch.cuda.is_available() and "H100" in torch.cuda.get_device_name()
    return H100 if is_h100 else H200


@dataclass(frozen=True)
class DecodeWork:
    """What one decode step of some sequences reads."""

    weight_bytes: int
    kv_bytes: int

    def floor_ms(self, hardware: Hardware) -> float:
        """Least time of the step."""
        return (self.weight_bytes + self.kv_bytes) / hardware.bytes_per_s * 1e3


def attention_weights(config: CasaConfig) -> int:
    """Values in one attention's query, key, value and output projections."""
    text = config.text_config
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    return text.hidden_size * heads * config.head_dim


def decode_weights(config: CasaConfig, *, is_plain: bool = False) -> int:
    """Values that a decode step reads: decoder layers and output layer, no embedding table.

    `ca` computes no key and value for text in its CA layers.

    Args:
        config: The model.
        is_plain: Whether it is the text decoder alone, with self-attention in every layer.
    """
    text, total = config.text_config, 0
    for layer in range(text.num_hidden_layers):
        total += 3 * text.hidden_size * text.intermediate_size
        if is_plain or config.has_sa(layer):
            total += attention_weights(config)
        if not is_plain and config.has_ca(layer) and config.ca_weights == "own":
            unused = 0
            if not config.sees_window_text:
                unused = 2 * text.hidden_size * text.num_key_value_heads * config.head_dim
            total += attention_weights(config) - unused
    return total + text.hidden_size * text.vocab_size


def decode_work(
    config: CasaConfig, num_seqs: int, image_tokens: int, text_tokens: int, *, is_plain: bool = False
) -> DecodeWork:
    """Bytes of one decode step.

    Args:
        config: The model.
        num_seqs: Sequences in the step.
        image_tokens: Image tokens in each one's window.
        text_tokens: Text in each one's stream, all of it in the window for `ca_tv`.
        is_plain: See `decode_weights`.
    """
    text = config.text_config
    key_value = 2 * text.num_key_value_heads * config.head_dim
    values = 0
    for layer in range(text.num_hidden_layers):
        if is_plain or config.has_sa(layer):
            values += text_tokens * key_value
        if not is_plain and config.has_ca(layer):
            values += (image_tokens + text_tokens * config.sees_window_text) * key_value
    return DecodeWork(decode_weights(config, is_plain=is_plain) * BYTES_PER_VALUE, num_seqs * values * BYTES_PER_VALUE)


def vision_flop(config: CasaConfig, side: int) -> float:
    """Operations of the vision encoder for one square frame of `side` pixels."""
    vision = config.vision_config
    patches = (side // vision.patch_size) ** 2
    window = (vision.window_size // vision.patch_size) ** 2
    linear = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
    flop = 0.0
    for block in range(vision.depth):
        seen = patches if block in vision.fullatt_block_indexes else min(window, patches)
        flop += patches * (2 * linear + 4 * seen * vision.hidden_size)
    merged = vision.hidden_size * vision.spatial_merge_size**2
    tokens = patches // vision.spatial_merge_size**2
    return flop + 2 * tokens * (merged**2 + merged * config.text_config.hidden_size)


def first_token_floor_ms(config: CasaConfig, side: int, text_tokens: int, hardware: Hardware) -> float:
    """Least time from a frame's patches to the first token.

    Encoder and image keys and values are bound by operations, the few text tokens by reading the
    weights (or, for many of them, by operations).
    """
    text = config.text_config
    tokens = (side // (config.vision_config.patch_size * config.vision_config.spatial_merge_size)) ** 2
    key_value = 2 * text.hidden_size * text.num_key_value_heads * config.head_dim
    image = vision_flop(config, side) + 2 * tokens * key_value * len(config.cross_attention_layers)
    weights = decode_weights(config)
    prefill_s = max(
        weights * BYTES_PER_VALUE / hardware.bytes_per_s,
        2 * weights * text_tokens / hardware.flop_per_s,
    )
    return (image / hardware.flop_per_s + prefill_s) * 1e3
