"""`CasaCache`: everything a CASA conversation carries from one forward call to the next.

    text KV         self-attention keys and values of every text token (grows)
    CA text KV      `ca_tv` only: CA keys and values of the text, rotated relative to their windows (grows)
    window KV       CA keys and values of the images of each row's LAST window (bounded: earlier images are gone)
    what was read   ids and insertion points, so that a grown conversation is known to be this one's continuation

Key positions are kept to tell which cached keys belong to a row of a padded batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_engine.image_inputs import VIRTUAL_TOKENS

ROW_TENSORS = ("key_positions", "token_ids", "next_rope", "token_images")
ROW_LISTS = ("insertion_points", "seen_points")


class CasaCache(DynamicCache):
    """Cache of B conversations.

    Attributes:
        key_positions: int64 (B, S). Text-stream index of each cached text token, -1 for padding; None when empty.
        token_ids: int64 (B, S). The ids of the same tokens.
        next_rope: int64 (B,). Rotary position of each row's next token (differs from its index for M-RoPE insertion).
        insertion_points: For each row, the insertion points of the images of its last window.
        seen_points: For each row, the insertion points of all its images (`insertion`: of their first tokens).
        token_images: int64 (B, Nw). For each kept image token, which image of the row's last window it belongs to;
            -1 for padding.
        window_keys, window_values: Per CA layer, (B, Hkv, Nw, D).
    """

    def __init__(self, config: CasaConfig) -> None:
        super().__init__(config=config.text_config)
        self.config = config
        self.ca_text = [DynamicLayer() for _ in range(config.text_config.num_hidden_layers)]
        self.key_positions: Tensor | None = None
        self.token_ids: Tensor | None = None
        self.next_rope: Tensor | None = None
        self.insertion_points: list[list[int]] | None = None
        self.seen_points: list[list[int]] | None = None
        self.token_images: Tensor | None = None
        self.window_keys: dict[int, Tensor] = {}
        self.window_values: dict[int, Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached text positions, padding included (the same for all layers)."""
        return 0 if self.key_positions is None else self.key_positions.shape[1]

    def reset(self) -> None:
        """Empty the cache."""
        self.__init__(self.config)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row `beam_idx[i]`; int64 (B,)."""
        super().reorder_cache(beam_idx)
        for layer in self.ca_text:
            layer.reorder_cache(beam_idx)
        self._take_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)), beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, int64 or bool as for indexing."""
        super().batch_select_indices(indices)
        for layer in self.ca_text:
            layer.batch_select_indices(indices)
        num_rows = 0 if self.key_positions is None else len(self.key_positions)
        rows = torch.arange(num_rows, device=indices.device)[indices].tolist()
        self._take_rows(lambda tensor: tensor[indices.to(tensor.device)], rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; copies are adjacent."""
        num_rows = 0 if self.key_positions is None else len(self.key_positions)
        super().batch_repeat_interleave(repeats)
        for layer in self.ca_text:
            layer.batch_repeat_interleave(repeats)
        rows = [row for row in range(num_rows) for _ in range(repeats)]
        self._take_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0), rows)

    def _take_rows(self, take: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        """Select rows of all state outside the layers: of tensors by `take`, of lists by index."""
        for name in ROW_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, take(tensor))
        for name in ROW_LISTS:
            if (lists := getattr(self, name)) is not None:
                setattr(self, name, [list(lists[row]) for row in rows])
        for kept in (self.window_keys, self.window_values):
            kept.update({layer: take(tensor) for layer, tensor in kept.items()})

    @property
    def is_croppable(self) -> bool:
        """Whether text can be taken back (read by transformers): all that came after the last image."""
        return True

    def crop(self, count: int, /) -> None:
        """Take back the last columns of text; as it was if the call raises.

        Args:
            count: -n for the last n columns, 0 for none; n keeps the first n, as transformers before 5.24 calls it.

        Raises:
            InputError: An image stands in what would be taken back: those of the window before are gone.
        """
        length = self.get_seq_length()
        num_kept = min(count, length) if count > 0 else length + count
        if num_kept < 0:
            raise InputError(f"{-count} columns of text are to be taken back; the cache has {length}.")
        if num_kept == length:
            return
        kept = self.key_positions[:, :num_kept]
        num_real = (kept >= 0).sum(dim=1).tolist()
        for row, points in enumerate(self.seen_points or []):
            if points and num_real[row] < self._text_end_of_images(row, points):
                raise InputError(
                    f"row {row} cannot be cropped to {num_real[row]} tokens: it has an image at {points[-1]}, and "
                    "those of the window before are gone; start a new conversation."
                )
        if self.next_rope is not None:
            removed = (self.key_positions[:, num_kept:] >= 0).sum(dim=1)
            self.next_rope = self.next_rope - removed.to(self.next_rope.device)
        self.key_positions, self.token_ids = kept, self.token_ids[:, :num_kept]
        for layer in (*self.layers, *self.ca_text):
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, :num_kept], layer.values[:, :, :num_kept]

    def _text_end_of_images(self, row: int, points: list[int]) -> int:
        """Return how many of a row's tokens stand before, or with `insertion` belong to, its last image."""
        if self.config.is_cross_attention:
            return points[-1]
        ids = self.row_ids(row)
        return max(index for index, token in enumerate(ids) if token == self.config.image_token_id) + 1

    def row_ids(self, row: int) -> list[int]:
        """Return the ids of a row's cached text, padding excluded."""
        return self.token_ids[row][self.key_positions[row] >= 0].tolist()

    def hide_last_tokens(self, row: int, count: int) -> None:
        """Turn a row's last `count` tokens into padding; no image may follow them."""
        if not count:
            return
        self.key_positions = self.key_positions.clone()
        self.key_positions[row, (self.key_positions[row] >= 0).nonzero().flatten()[-count:]] = -1
        if self.next_rope is not None:
            self.next_rope = self.next_rope.clone()
            self.next_rope[row] -= count

    def append_text(self, positions: Tensor, token_ids: Tensor) -> Tensor:
        """Add the (B, T) positions and ids of new tokens and return the positions of all cached tokens, (B, S)."""
        known = self.key_positions is not None
        self.key_positions = torch.cat([self.key_positions, positions], dim=1) if known else positions
        self.token_ids = torch.cat([self.token_ids, token_ids], dim=1) if known else token_ids
        return self.key_positions

    def append_points(self, points: list[list[int]]) -> None:
        """Add the insertion points of each row's new images."""
        known = self.seen_points or [[] for _ in points]
        self.seen_points = [[*old, *new] for old, new in zip(known, points, strict=True)]

    def with_window(
        self, layer: int, keys: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return image keys and values of a layer: those of the last window, then new ones (B, Hkv, N, D)."""
        if layer not in self.window_keys:
            return keys, values
        if keys is None:
            return self.window_keys[layer], self.window_values[layer]
        return torch.cat([self.window_keys[layer], keys], dim=2), torch.cat([self.window_values[layer], values], dim=2)

    def keep_window(self, layer: int, keys: Tensor, values: Tensor, kept: Tensor) -> None:
        """Store those of the (B, Hkv, N, D) image keys and values at index `kept`, int64 (B, Nw), -1 for padding."""
        index = kept.clamp(min=0)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.window_keys[layer] = keys.gather(2, index)
        self.window_values[layer] = values.gather(2, index)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Restore the cache if the block raises: out of memory, an interrupt, an error of the model.

        The text KV is truncated to its former length rather than copied, so that no step needs it twice.
        """
        length = self.get_seq_length()
        before = {name: getattr(self, name) for name in (*ROW_TENSORS, *ROW_LISTS)}
        windows = dict(self.window_keys), dict(self.window_values)
        layers = (*self.layers, *self.ca_text)
        unused = {layer: dict(vars(layer)) for layer in layers if not layer.is_initialized}
        try:
            yield
        except BaseException:
            for layer in layers:
                if layer in unused:
                    vars(layer).clear()
                    vars(layer).update(unused[layer])
                elif layer.get_seq_length() > length:
                    layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            for name, value in before.items():
                setattr(self, name, value)
            self.window_keys, self.window_values = windows
            raise


def check_cache(cache: object) -> None:
    """Raise InputError unless it is a `CasaCache`, or None."""
    if cache is not None and not isinstance(cache, CasaCache):
        raise InputError(
            f"the cache is a {type(cache).__name__}; expected a CasaCache: make one with new_cache(). One that PEFT's "
            f"prefix tuning made is refused: {VIRTUAL_TOKENS}."
        )
