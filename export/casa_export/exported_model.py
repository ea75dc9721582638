"""`ExportedModel`: an exported folder with the eager model's interface, over any `Backend`.

    call(ids, images) -> vision graph, once an image
                      -> for each piece of the prompt:  plan windows -> image_kv graph (if other images are seen now)
                                                        -> decoder graph -> caches
                      -> logits

Conversations are `ExportedCache` objects passed in, so that any number go on at once over the same graphs;
`casa_engine.streaming.CasaStream` runs on this class as on the eager model.
"""

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from casa_engine.cache_argument import output_with_cache
from casa_engine.call_inputs import CallInputs, check_inputs, pad_left
from casa_engine.call_options import check_logits_to_keep
from casa_engine.checkpoints import read_config
from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_engine.padding import pad_rows
from casa_engine.rope import image_positions
from casa_engine.token_ids import list_token_ids
from casa_export.backend import Backend
from casa_export.exported_cache import ExportedCache, SeenImage
from casa_export.graph_spec import cache_names
from casa_export.manifest import Manifest, check_files, read_manifest
from casa_export.ort_backend import OrtBackend
from casa_export.plan import PADDING, RowPlan, cut_columns, plan_row, vision_inputs


class ExportedModel:
    """A CASA model whose graphs run in a runtime.

    Attributes:
        config: The model's configuration.
        manifest: What was exported, with its limits.
        generation_config: As the checkpoint's; gives the stop tokens.
        device: Where inputs and outputs of calls lie: always the CPU.
    """

    device = torch.device("cpu")

    def __init__(self, config: CasaConfig, manifest: Manifest, generation: GenerationConfig, backend: Backend) -> None:
        self.config, self.manifest, self.generation_config, self.backend = config, manifest, generation, backend
        self.limits = manifest.limits
        self._names = {
            kind: cache_names(config, kind) for kind in ("past", "present", "window_past", "window_present", "image")
        }

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", num_threads: int = 0, check_hashes: bool = True) -> Self:
        """Load an exported folder into ONNX Runtime.

        Args:
            folder: What `casa-export` wrote.
            device: `cpu` or `cuda`.
            num_threads: Threads within an operation; 0 chooses by the size of the graphs.
            check_hashes: Whether to read every file once to compare its hash.

        Raises:
            ManifestError: The folder is incomplete, damaged or of a newer version.
            RunnerError: This machine or this ONNX Runtime cannot run it.
        """
        manifest = read_manifest(folder)
        if check_hashes:
            check_files(folder, manifest)
        backend = OrtBackend(Path(folder), manifest, device, num_threads)
        return cls(read_config(folder), manifest, GenerationConfig.from_pretrained(folder), backend)

    def new_cache(self) -> ExportedCache:
        """Return an empty cache, for conversations fed piece by piece."""
        return ExportedCache()

    def __call__(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        insertion_points: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ExportedCache | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the new tokens; arguments as of `CasaForConditionalGeneration.forward`.

        Returns:
            logits float32 (B, T or logits_to_keep, V), and the cache.

        Raises:
            InputError: An input is of the wrong kind, a limit of the export is exceeded, or images and insertion
                points do not fit together. The cache is as it was.
        """
        cache = ExportedCache() if past_key_values is None else past_key_values
        if not isinstance(cache, ExportedCache):
            raise InputError(f"the cache is a {type(cache).__name__}; expected one that new_cache() made.")
        check_logits_to_keep(logits_to_keep)
        inputs = check_inputs(
            self.config,
            self.device,
            input_ids,
            attention_mask,
            None if cache.positions is None else torch.from_numpy(cache.positions),
            pixel_values,
            image_grid_thw,
            insertion_points,
        )
        ids, positions = input_ids.long().numpy(), inputs.positions.numpy()
        self._check_limits(ids, inputs, cache)
        pieces = self._pieces(cache, inputs)
        self._check_windows(cache, inputs, pieces)
        # All that follows works on a copy, so that a call that fails leaves the conversation as it was.
        going_on = cache.copy() if cache.positions is not None else self._empty_cache(len(ids))
        new = self._encode(inputs, pixel_values)
        outputs = []
        wanted = logits_to_keep or ids.shape[1]
        for piece, shown in pieces:
            for images, of_row, chosen in zip(going_on.images, new, shown, strict=True):
                images += of_row[chosen]
            keep = np.arange(max(piece.start, ids.shape[1] - wanted), piece.stop) - piece.start
            logits = self._decode(going_on, ids[:, piece], positions[:, piece], keep)
            if len(keep):
                outputs.append(torch.from_numpy(logits))
        cache.assign(going_on)
        return output_with_cache(torch.cat(outputs, dim=1), cache)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool = False,
        **images: Tensor,
    ) -> Tensor:
        """Generate greedily; take what `CasaProcessor` returns, as the eager model's `generate` does.

        Args:
            input_ids: int64 (B, T), padded on either side.
            attention_mask: int64 (B, T).
            max_new_tokens: At most so many a row, the stop token included.
            eos_token_id: Ends a row; the checkpoint's stop tokens where not given.
            pad_token_id: Follows a row's end; the checkpoint's where not given.
            do_sample: Only False.
            **images: `pixel_values`, `image_grid_thw`, `insertion_points`.

        Returns:
            int64 (B, T + new): prompts and what follows them.
        """
        if do_sample:
            raise InputError("do_sample is True; exported models generate greedily only.")
        steps = self.steps(input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id, **images)
        return torch.cat([input_ids, *steps], dim=1)

    def steps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **images: Tensor,
    ) -> Iterator[Tensor]:
        """Yield the new tokens (B, 1) of each step of `generate` as they come."""
        generation = self.generation_config
        end = generation.eos_token_id if eos_token_id is None else eos_token_id
        end = torch.tensor(list_token_ids(end), dtype=torch.long)
        pad = generation.pad_token_id if pad_token_id is None else pad_token_id
        inputs = check_inputs(self.config, self.device, input_ids, attention_mask, None, **images)
        self.limits.check_text(int(inputs.real.sum(dim=1).max()) + max_new_tokens)
        cache = self.new_cache()
        ids, mask = pad_left(input_ids, attention_mask)
        output = self(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1, **images)
        running = torch.ones(len(input_ids), 1, dtype=torch.bool)
        for step in range(max_new_tokens):
            tokens = torch.where(running, output.logits[:, -1].argmax(dim=-1, keepdim=True), pad or 0)
            yield tokens
            running &= ~torch.isin(tokens, end)
            if not running.any() or step + 1 == max_new_tokens:
                return
            output = self(tokens, past_key_values=cache, logits_to_keep=1)

    def encode_image(self, pixel_values: np.ndarray, grid: np.ndarray) -> np.ndarray:
        """Run the vision graph on one image, frame by frame.

        Args:
            pixel_values: float32 (P, 1176).
            grid: int64 (3,).

        Returns:
            float32 (N, C).
        """
        frames = []
        for patches in np.split(pixel_values, int(grid[0])):
            host = {"pixel_values": np.ascontiguousarray(patches, dtype=np.float32)}
            host |= vision_inputs(self.config, np.array([1, *grid[1:]]))
            frames.append(self.backend.run("vision", host, {}, "image_embeds")[0])
        return np.concatenate(frames)

    def _empty_cache(self, num_rows: int) -> ExportedCache:
        """Return the cache of `num_rows` empty conversations."""
        shape = (num_rows, self.config.text_config.num_key_value_heads, 0, self.config.head_dim)
        return ExportedCache(
            positions=np.zeros((num_rows, 0), dtype=np.int64),
            window_positions=np.zeros((num_rows, 0), dtype=np.int64),
            text={name: self.backend.empty(shape) for name in self._names["past"]},
            window_text={name: self.backend.empty(shape) for name in self._window_names("window_past")},
            images=[[] for _ in range(num_rows)],
        )

    def _window_names(self, kind: str) -> list[str]:
        return self._names[kind] if self.config.sees_window_text else []

    def _check_limits(self, ids: np.ndarray, inputs: CallInputs, cache: ExportedCache) -> None:
        """Raise InputError if the call is larger than what was exported."""
        self.limits.check_batch(len(ids))
        num_cached = 0 if cache.positions is None else cache.positions.shape[1]
        self.limits.check_text(num_cached + ids.shape[1])
        for index, count in enumerate(inputs.images.counts):
            self.limits.check_image(index, count)

    def _pieces(self, cache: ExportedCache, inputs: CallInputs) -> list[tuple[slice, list[slice]]]:
        """Cut the call; at images only where together they are more than a decoder call takes.

        Returns:
            Each piece's columns, and for each row which of its new images come with it.
        """
        num_tokens, images = inputs.real.shape[1], inputs.images
        columns = [_columns(real, points) for real, points in zip(inputs.real.numpy(), images.points, strict=True)]
        totals = [sum(images.counts[image] for image in row) for row in images.by_row]
        if cache.images:
            totals = [total + _image_tokens_of(kept) for total, kept in zip(totals, cache.images, strict=True)]
        fits = max(totals) <= self.limits.call_image_tokens
        points = np.array([] if fits else [column for row in columns for column in row], dtype=np.int64)
        pieces = cut_columns(num_tokens, self.limits.call_tokens, points)
        return [(piece, [_in_piece(row, piece, num_tokens) for row in columns]) for piece in pieces]

    def _check_windows(self, cache: ExportedCache, inputs: CallInputs, pieces: list[tuple[slice, list[slice]]]) -> None:
        """Raise InputError if a piece of the call sees more image tokens than a decoder call takes."""
        old = cache.images or [[] for _ in inputs.num_seen]
        for row, num_seen in enumerate(inputs.num_seen):
            counts = [len(image.embeds) for image in old[row]]
            points = [image.point for image in old[row]]
            new = [
                (inputs.images.counts[i], inputs.images.points[row][k] + num_seen)
                for k, i in enumerate(inputs.images.by_row[row])
            ]
            for piece, shown in pieces:
                for count, point in new[shown[row]]:
                    counts.append(count)
                    points.append(point)
                positions = inputs.positions[row, piece].numpy()
                plan = plan_row(positions, num_seen, np.array(points, dtype=np.int64))
                num_seen += int((positions >= 0).sum())
                self.limits.check_window(sum(counts[slice(*plan.seen)]))
                counts, points = counts[slice(*plan.kept)], points[slice(*plan.kept)]

    def _encode(self, inputs: CallInputs, pixel_values: Tensor | None) -> list[list[SeenImage]]:
        """Encode the new images of each row."""
        if pixel_values is None:
            return [[] for _ in inputs.num_seen]
        images = inputs.images
        patches = [part.float().numpy() for part in pixel_values.split(images.patches)]
        return [
            [
                SeenImage(
                    point + num_seen,
                    self.encode_image(patches[image], images.grids[image].numpy()),
                    image_positions(images.grids[image], self.config).numpy(),
                )
                for image, point in zip(own, points, strict=True)
            ]
            for own, points, num_seen in zip(images.by_row, images.points, inputs.num_seen, strict=True)
        ]

    def _decode(self, cache: ExportedCache, ids: np.ndarray, positions: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Run the decoder graph on one piece; return logits (B, len(keep) or 1, V). Mutates `cache`."""
        plans = [
            plan_row(positions[row], seen, np.array([image.point for image in cache.images[row]], dtype=np.int64))
            for row, seen in enumerate(cache.num_tokens())
        ]
        seen = [images[slice(*plan.seen)] for images, plan in zip(cache.images, plans, strict=True)]
        self._compute_image_kv(cache, seen)
        host = {
            "input_ids": np.ascontiguousarray(ids),
            "positions": np.ascontiguousarray(positions),
            "window_starts": np.stack([plan.starts for plan in plans]),
            "image_starts": pad_rows([_starts_of(images) for images in seen], PADDING),
            "past_positions": cache.positions,
            "logits_indices": keep if len(keep) else np.zeros(1, dtype=np.int64),
        }
        if self.config.sees_window_text:
            self._drop_passed_windows(cache, plans)
            host["window_past_positions"] = cache.window_positions
        resident = cache.text | cache.window_text | cache.image_kv
        logits, values = self.backend.run("decoder", host, resident, "logits")
        cache.text = {old: values[new] for old, new in zip(self._names["past"], self._names["present"], strict=True)}
        cache.positions = np.concatenate([cache.positions, positions], axis=1)
        if self.config.sees_window_text:
            names = zip(self._names["window_past"], self._names["window_present"], strict=True)
            cache.window_text = {old: values[new] for old, new in names}
            cache.window_positions = np.concatenate([cache.window_positions, positions], axis=1)
        cache.images = [images[slice(*plan.kept)] for images, plan in zip(cache.images, plans, strict=True)]
        return logits

    def _compute_image_kv(self, cache: ExportedCache, seen: list[list[SeenImage]]) -> None:
        """Make `cache.image_kv` that of these images, running the graph only if they are others than before."""
        if cache.image_kv_of == seen:
            return
        longest = max(map(_image_tokens_of, seen))
        text = self.config.text_config
        cache.image_kv_of = seen
        if not longest:
            shape = (len(seen), text.num_key_value_heads, 0, self.config.head_dim)
            cache.image_kv = {name: self.backend.empty(shape) for name in self._names["image"]}
            return
        embeds = np.zeros((len(seen), longest, text.hidden_size), dtype=np.float32)
        positions = np.zeros((3, len(seen), longest), dtype=np.int64)
        for row, images in enumerate(seen):
            if images:
                whole = np.concatenate([image.embeds for image in images])
                embeds[row, : len(whole)] = whole
                positions[:, row, : len(whole)] = np.concatenate([image.positions for image in images], axis=1)
        host = {"image_embeds": embeds} | ({"image_positions": positions} if self.config.sees_window_text else {})
        cache.image_kv = self.backend.run("image_kv", host, {}, None)[1]

    def _drop_passed_windows(self, cache: ExportedCache, plans: list[RowPlan]) -> None:
        """Empty the CA text cache if every row's window starts after all of it: nothing reads it again."""
        starts = np.array([plan.first_start for plan in plans])[:, None]
        if cache.window_positions.shape[1] and (cache.window_positions < starts).all():
            cache.window_positions = np.zeros((len(plans), 0), dtype=np.int64)
            shape = (len(plans), self.config.text_config.num_key_value_heads, 0, self.config.head_dim)
            cache.window_text = {name: self.backend.empty(shape) for name in self._names["window_past"]}


def _image_tokens_of(images: list[SeenImage]) -> int:
    """Return the number of image tokens of these images together."""
    return sum(len(image.embeds) for image in images)


def _columns(real: np.ndarray, points: list[int]) -> list[int]:
    """Return the column of the first token after each image: of the row's real token `point`, or one past all."""
    columns = [*np.flatnonzero(real).tolist(), len(real)]
    return [columns[point] for point in points]


def _in_piece(columns: list[int], piece: slice, num_tokens: int) -> slice:
    """Return which of a row's images, at ascending columns, belong to a piece; one at the end is in the last."""
    last = num_tokens + 1 if piece.stop == num_tokens else piece.stop
    return slice(bisect_left(columns, piece.start), bisect_left(columns, last))


def _starts_of(images: list[SeenImage]) -> np.ndarray:
    """Return each image token's window start, its image's insertion point, int64 (N,)."""
    return np.concatenate([np.full(len(i.embeds), i.point, dtype=np.int64) for i in images] or [np.zeros(0, np.int64)])
