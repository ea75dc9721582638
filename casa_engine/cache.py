"""`CasaCache`: everything a CASA conversation carries from one forward call to the next.

    text KV         self-attention keys and values of every text token (grows)
    CA text KV      `ca_tv` only: CA keys and values of the text, rotated relative to their windows (grows)
    window KV       CA keys and values of the images of each row's LAST window (bounded: earlier images are gone)

Key positions are kept so that rows of a padded batch know which cached keys are theirs.
"""

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError


class CasaCache(DynamicCache):
    """Cache of B conversations.

    Attributes:
        key_positions: int64 (B, S). Text-stream index of each cached text token, -1 for padding; None when empty.
        next_rope: int64 (B,). Rotary position of each row's next token (differs from its index for M-RoPE insertion).
        insertion_points: For each row, the insertion points of the images of its last window.
        token_images: int64 (B, Nw). For each kept image token, which image of the row's last window it belongs to;
            -1 for padding.
        window_keys, window_values: Per CA layer, (B, Hkv, Nw, D).
    """

    def __init__(self, config: CasaConfig) -> None:
        super().__init__(config=config.text_config)
        self.ca_text = [DynamicLayer() for _ in range(config.text_config.num_hidden_layers)]
        self.key_positions: Tensor | None = None
        self.next_rope: Tensor | None = None
        self.insertion_points: list[list[int]] | None = None
        self.token_images: Tensor | None = None
        self.window_keys: dict[int, Tensor] = {}
        self.window_values: dict[int, Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached text positions, padding included (the same for all layers, replaced ones too)."""
        return 0 if self.key_positions is None else self.key_positions.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuses beam search: rows of image windows cannot change places."""
        raise InputError("beam search is not supported; use num_beams=1.")

    @property
    def is_croppable(self) -> bool:
        """Whether text can be forgotten (transformers asks): no, an earlier window's images may be gone already."""
        return False

    def crop(self, *args: int, **kwargs: int) -> None:
        """Refuses to forget text. The argument's name and meaning differ between versions of transformers."""
        raise InputError("the cache cannot be cropped: images of earlier windows are gone; start a new conversation.")

    def num_tokens(self) -> Tensor:
        """int64 (B,): text tokens seen by each row, padding excluded."""
        return (self.key_positions >= 0).sum(dim=1)

    def append_positions(self, positions: Tensor) -> Tensor:
        """Adds the (B, T) positions of new tokens and returns those of all cached tokens, (B, S)."""
        known = [] if self.key_positions is None else [self.key_positions]
        self.key_positions = torch.cat([*known, positions], dim=1)
        return self.key_positions

    def with_window(
        self, layer: int, keys: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Image keys and values of a layer: those of the last window, then new ones (B, Hkv, N, D)."""
        if layer not in self.window_keys:
            return keys, values
        if keys is None:
            return self.window_keys[layer], self.window_values[layer]
        return torch.cat([self.window_keys[layer], keys], dim=2), torch.cat([self.window_values[layer], values], dim=2)

    def keep_window(self, layer: int, keys: Tensor, values: Tensor, kept: Tensor) -> None:
        """Stores of (B, Hkv, N, D) image keys and values those at `kept`, int64 (B, Nw), index -1 for padding."""
        index = kept.clamp(min=0)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.window_keys[layer] = keys.gather(2, index)
        self.window_values[layer] = values.gather(2, index)
