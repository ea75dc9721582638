"""The training forward: CA over windows as a batch of their own.

The eager reference masks one large attention over all images of a row. In a stream of a hundred frames nearly all of
that is masked away, and on a CPU it is most of a step. Here each window is a row of a small batch, of its own few
tokens and its images:

    rows of text      a a|b b b|c c     d d d|e e           | = an image before this token
    rows of windows   a a .   b b b   c c .   d d d   e e . , the last four with an image's tokens before them

`casa_engine.windows` decides which tokens and images a window has. An image shown often is projected once. A test holds
the result to that of `CasaForConditionalGeneration`.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from casa_digits.conversations import IGNORED, NOTE_CLASSES, NOTES, UNSEEN, Conversation
from casa_digits.frames import FramePool
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.padding import pad_rows
from casa_engine.rope import axes_rotary_tables, image_positions, rotary_tables, rotate
from casa_engine.windows import plan_windows

WINDOW_LENGTHS = (4, 8, 16, 32, 64, 4096)


@dataclass(frozen=True)
class Window:
    """One window of a row.

    Attributes:
        tokens: int64 (L,), index of each of its tokens in the flattened (B * T) text.
        images: int64 (N,), index of each token of its images among the image tokens.
    """

    tokens: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class WindowGroup:
    """Windows of similar length.

    Attributes:
        tokens: (W, L) int64, index into the flattened (B * T) text; 0 where `mask` hides it.
        images: (W, N) int64, index into the image tokens; 0 likewise.
        bias: (W, 1, L, N + L) float32, 0 where a token sees a key, else -inf.
        real: (W, L) bool.
    """

    tokens: Tensor
    images: Tensor
    bias: Tensor
    real: Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """Rows of text, and their windows.

    Attributes:
        input_ids, labels: (B, T) int64, right-padded.
        relative: (B, T) int64, position of each token in its window.
        image_tokens: (M, C), of each distinct image once.
        image_positions: (3, M) int64.
        groups: all windows.
        notes: (N, 3) int64, index into the flattened text, kind and class of each note.
    """

    input_ids: Tensor
    labels: Tensor
    relative: Tensor
    image_tokens: Tensor
    image_positions: Tensor
    groups: list[WindowGroup]
    notes: Tensor


def build_batch(
    model: CasaForConditionalGeneration, conversations: list[Conversation], pool: FramePool
) -> TrainingBatch:
    """Build a batch of conversations and their encoded images."""
    input_ids = pad_rows([talk.ids for talk in conversations], model.config.text_config.pad_token_id)
    labels = pad_rows([talk.labels for talk in conversations], IGNORED)
    relative = np.zeros_like(input_ids)
    distinct = sorted({image for talk in conversations for image in talk.images if image != UNSEEN})
    ends = np.cumsum([len(pool.tokens[image]) for image in distinct]).tolist()
    image_tokens = {UNSEEN: np.arange(0)} | {
        image: np.arange(end - len(pool.tokens[image]), end) for image, end in zip(distinct, ends, strict=True)
    }
    windows: list[Window] = []
    for row, talk in enumerate(conversations):
        positions = np.arange(len(talk.ids))
        plan = plan_windows(positions, np.array(talk.points))
        relative[row, : len(positions)] = positions - plan.starts
        for start, end in itertools.pairwise([*np.flatnonzero(np.diff(plan.starts, prepend=-1)), len(positions)]):
            shown = [image_tokens[image] for image in talk.images[plan.first_images[start] : plan.end_images[start]]]
            tokens = row * input_ids.shape[1] + positions[start:end]
            windows.append(Window(tokens, np.concatenate(shown or [tokens[:0]])))
    image_rope = [_positions(model, pool, image) for image in distinct]
    return TrainingBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(relative),
        torch.cat([pool.tokens[image] for image in distinct] or [torch.zeros(0, model.config.text_config.hidden_size)]),
        torch.cat(image_rope or [torch.zeros(3, 0, dtype=torch.long)], dim=1),
        _group(windows),
        torch.tensor(
            [
                (row * input_ids.shape[1] + token, kind, value)
                for row, talk in enumerate(conversations)
                for token, kind, value in talk.notes
            ],
            dtype=torch.long,
        ).view(-1, 3),
    )


def _positions(model: CasaForConditionalGeneration, pool: FramePool, image: int) -> Tensor:
    merge, grid = model.config.vision_config.spatial_merge_size, pool.grids[image]
    return image_positions(torch.tensor([1, grid.rows * merge, grid.columns * merge]), model.config)


def _group(windows: list[Window]) -> list[WindowGroup]:
    """Split windows by length and lay out each group."""
    groups, shortest = [], 0
    for length in WINDOW_LENGTHS:
        chosen = [window for window in windows if shortest < len(window.tokens) <= length]
        shortest = length
        if not chosen:
            continue
        tokens, images = pad_rows([each.tokens for each in chosen], -1), pad_rows([each.images for each in chosen], -1)
        real, shown = tokens >= 0, images >= 0
        causal = np.broadcast_to(np.tri(tokens.shape[1], dtype=bool), (*tokens.shape, tokens.shape[1]))
        sees = np.concatenate([np.broadcast_to(shown[:, None], (*real.shape, images.shape[1])), causal], axis=2)
        groups.append(
            WindowGroup(
                torch.from_numpy(tokens.clip(min=0)),
                torch.from_numpy(images.clip(min=0)),
                torch.from_numpy(np.where(sees, 0.0, -np.inf).astype(np.float32))[:, None],
                torch.from_numpy(real),
            )
        )
    return groups


def loss_of(
    model: CasaForConditionalGeneration, batch: TrainingBatch, note_head: nn.Linear | None = None, note_layer: int = 0
) -> Tensor:
    """Compute the cross-entropy of the learned tokens; only their positions go through the output layer.

    Args:
        model: The model.
        batch: The batch.
        note_head: Reads notes from the hidden states, C to `NOTES` times `NOTE_CLASSES`; its loss is added, half as
            heavy. None: notes are not learned.
        note_layer: Of how many layers those hidden states are.
    """
    labels = batch.labels[:, 1:]
    learned = labels != IGNORED
    states = hidden_states(model, batch)
    loss = functional.cross_entropy(model.lm_head(states[-1][:, :-1][learned]), labels[learned])
    if note_head is None or not len(batch.notes):
        return loss
    tokens, kinds, classes = batch.notes.unbind(1)
    read = note_head(states[note_layer].flatten(0, 1)[tokens]).unflatten(1, (NOTES, NOTE_CLASSES))
    return loss + 0.5 * functional.cross_entropy(read[torch.arange(len(tokens)), kinds], classes)


def hidden_states(model: CasaForConditionalGeneration, batch: TrainingBatch) -> list[Tensor]:
    """Compute the hidden states for `ca_tv` with own weights, in parallel, in every layer.

    Returns:
        (B, T, C) each: before the first layer, after each of them, and last of all normalised.
    """
    language, config = model.model.language_model, model.config
    inv_freq = language.rotary_emb.inv_freq
    text_rope = rotary_tables(torch.arange(batch.input_ids.shape[1]), inv_freq)
    window_rope = tuple(table[:, None] for table in rotary_tables(batch.relative, inv_freq))
    image_rope = axes_rotary_tables(batch.image_positions, inv_freq, config.mrope_section)
    x = language.embed_tokens(batch.input_ids)
    states = [x]
    for layer in language.layers:
        h = layer.input_layernorm(x)
        query = rotate(layer.self_attn.query(h), *text_rope)
        key, value = layer.self_attn.key_value(h)
        attended = functional.scaled_dot_product_attention(
            query, rotate(key, *text_rope), value, is_causal=True, enable_gqa=True
        )
        x = (
            x
            + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
            + _cross(layer, h, batch, window_rope, image_rope)
        )
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        states.append(x)
    return [*states, language.norm(x)]


def _cross(layer, h: Tensor, batch: TrainingBatch, window_rope: tuple, image_rope: tuple) -> Tensor:
    project = layer.cross_attn
    query = _flat(rotate(project.query(h), *window_rope))
    key, value = project.key_value(h)
    key, value = _flat(rotate(key, *window_rope)), _flat(value)
    image_key, image_value = project.key_value(layer.input_layernorm(batch.image_tokens)[None])
    image_key, image_value = _flat(rotate(image_key, *image_rope)), _flat(image_value)
    output = torch.zeros_like(query)
    for group in batch.groups:
        keys = torch.cat([image_key[group.images], key[group.tokens]], dim=1).transpose(1, 2)
        values = torch.cat([image_value[group.images], value[group.tokens]], dim=1).transpose(1, 2)
        queries = query[group.tokens].unflatten(2, (keys.shape[1], -1)).permute(0, 2, 3, 1, 4)
        attended = _attend(queries, keys[:, :, None], values[:, :, None], group.bias[:, None])
        attended = attended.permute(0, 3, 1, 2, 4).flatten(2, 3)
        output = output.index_put((group.tokens[group.real],), attended[group.real])
    return project.o_proj(output.flatten(1)).view_as(h)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
    return scores.softmax(dim=-1) @ value


def _flat(heads: Tensor) -> Tensor:
    """Flatten (B, H, T, D) to (B * T, H, D)."""
    return heads.transpose(1, 2).flatten(0, 1)
