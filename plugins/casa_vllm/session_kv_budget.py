"""The KV-cache pages of live sessions, which limit their number in an engine, and what they weigh.

An idle session keeps its pages and cannot be preempted. So the number of sessions is limited by the most pages that all
of them may need: a full text budget in every text group, two frames in every image group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from casa_engine.configuration import CasaConfig

FRAMES_PER_SESSION = 2


@dataclass(frozen=True)
class PageCosts:
    """Pages that a session needs in an engine.

    Attributes:
        block_size: Tokens in a page.
        text_groups: Number of KV-cache groups with every text token.
        image_groups: Number of KV-cache groups with every image token of a frame.
        page_bytes: Bytes of a page, keys and values of all layers of its group, on all ranks.
        token_bytes: Bytes of a token that every layer has, as one that is inserted into the text.
    """

    block_size: int
    text_groups: int
    image_groups: int
    page_bytes: int
    token_bytes: int

    @classmethod
    def of_engine(cls, config: CasaConfig, vllm_config: VllmConfig) -> PageCosts:
        """Return the costs in an engine: vLLM divides layers into groups of equal size, one kind of cache in each."""
        block_size = vllm_config.cache_config.block_size
        num_layers = config.text_config.num_hidden_layers
        layer_bytes = layer_token_bytes(vllm_config)
        token_bytes = num_layers * layer_bytes
        if not config.is_cross_attention:
            return cls(block_size, 1, 0, block_size * token_bytes, token_bytes)
        num_image = len(config.cross_attention_layers)
        num_text = sum(config.has_sa(layer) for layer in range(num_layers))
        if config.sees_window_text:
            num_text += num_image
        fewest, most = sorted((num_image, num_text))
        layers = most if most < 1.5 * fewest else fewest
        page_bytes = block_size * layers * layer_bytes
        return cls(block_size, ceil(num_text / layers), ceil(num_image / layers), page_bytes, token_bytes)

    def image_pages(self, num_image_tokens: int) -> int:
        """Return the pages of one frame."""
        return self.image_groups * ceil(num_image_tokens / self.block_size)

    def session_pages(self, text_budget: int, max_image_tokens: int) -> int:
        """Return the most pages of a session."""
        text = self.text_groups * ceil(text_budget / self.block_size)
        return text + FRAMES_PER_SESSION * self.image_pages(max_image_tokens)

    def session_bytes(self, num_text_tokens: int, num_image_tokens: int) -> int:
        """Return the bytes of the pages of a session with this text and one frame."""
        text = self.text_groups * ceil(num_text_tokens / self.block_size)
        return self.page_bytes * (text + self.image_pages(num_image_tokens))

    def insertion_bytes(self, num_image_tokens: int) -> int:
        """Return the bytes that a frame's tokens would take, and keep, if they were inserted into the text."""
        return self.token_bytes * num_image_tokens


def layer_token_bytes(vllm_config: VllmConfig) -> int:
    """Return the bytes of one token's keys and values in one layer, on all ranks."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    kind = vllm_config.cache_config.cache_dtype
    # Quantised caches, which have names of their own, take a byte.
    dtype = model.dtype if kind == "auto" else getattr(torch, kind, torch.uint8)
    heads = model.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    return 2 * heads * model.get_head_size() * dtype.itemsize
