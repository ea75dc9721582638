"""The KV-cache pages of live sessions, which limit their number in an engine.

An idle session keeps its pages and cannot be preempted. So the number of sessions is limited by the most pages that all
of them may need: a full text budget in every text group, two frames in every image group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

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
    """

    block_size: int
    text_groups: int
    image_groups: int

    @classmethod
    def of_engine(cls, config: CasaConfig, vllm_config: VllmConfig) -> PageCosts:
        """Returns the costs in an engine: vLLM divides layers into groups of equal size, one kind of cache in each."""
        block_size = vllm_config.cache_config.block_size
        if not config.is_cross_attention:
            return cls(block_size, 1, 0)
        num_image = len(config.cross_attention_layers)
        num_text = sum(config.has_sa(layer) for layer in range(config.text_config.num_hidden_layers))
        if config.sees_window_text:
            num_text += num_image
        fewest, most = sorted((num_image, num_text))
        layers = most if most < 1.5 * fewest else fewest
        return cls(block_size, ceil(num_text / layers), ceil(num_image / layers))

    def image_pages(self, num_image_tokens: int) -> int:
        """Returns the pages of one frame."""
        return self.image_groups * ceil(num_image_tokens / self.block_size)

    def session_pages(self, text_budget: int, max_image_tokens: int) -> int:
        """Returns the most pages of a session."""
        text = self.text_groups * ceil(text_budget / self.block_size)
        return text + FRAMES_PER_SESSION * self.image_pages(max_image_tokens)
