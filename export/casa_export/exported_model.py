"""`ExportedModel`: an exported folder with the eager model's interface, over any `Backend`.

    call(ids, images) -> vision graph, once an image
                      -> for each piece of the prompt:  plan windows -> image_kv graph (if other images are seen now)
                                                        -> decoder graph -> caches
                      -> logits

Conversations are `ExportedCache` objects passed in, so that any number go on at once over the same graphs;
`casa_engine.streaming.CasaStream` runs on this class as on the eager model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from casa_engine.cache_argument import output_with_cache
from casa_engine.checkpoints import read_config
from casa_engine.configuration import CasaConfig
from casa_engine.errors import InputError
from casa_engine.rope import image_positions, image_token_counts
from casa_export.backend import Backend
from casa_export.exported_cache import ExportedCache, SeenImage
from casa_export.graph_spec import cache_names
from casa_export.manifest import Manifest, check_files, read_manifest
from casa_export.ort_backend import OrtBackend
from casa_export.plan import PADDING, RowPlan, cuts, plan_row, vision_inputs


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
        """Loads an exported folder into ONNX Runtime.

        Args:
            folder: What `casa-export` wrote.
            device: `cpu` or `cuda`.
            num_threads: Threads within an operation; 0 lets ONNX Runtime choose.
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
        """An empty cache, for conversations fed piece by piece."""
        return ExportedCache()

    def __call__(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        insertion_points: Tensor | None = None,
        image_rows: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ExportedCache | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits of the new tokens; arguments as of `CasaForConditionalGeneration.forward`.

        Returns:
            logits float32 (B, T or logits_to_keep, V), and the cache.

        Raises:
            InputError: A limit of the export is exceeded, or images and insertion points do not fit together.
        """
        cache = ExportedCache() if past_key_values is None else past_key_values
        ids = input_ids.numpy()
        real = np.ones_like(ids) if attention_mask is None else attention_mask[:, -ids.shape[1] :].numpy()
        positions = self._begin(cache, ids, real > 0)
        new = self._encode(positions, cache, pixel_values, image_grid_thw, insertion_points, image_rows)
        columns = [] if insertion_points is None else insertion_points.tolist()
        outputs = []
        wanted = logits_to_keep or ids.shape[1]
        for piece in self._pieces(cache, ids.shape[1], columns, new):
            for images, of_row in zip(cache.images, new, strict=True):
                images += [image for column, image in of_row if _in_piece(column, piece, ids.shape[1])]
            keep = np.arange(max(piece.start, ids.shape[1] - wanted), piece.stop) - piece.start
            logits = self._decode(cache, ids[:, piece], positions[:, piece], keep)
            if len(keep):
                outputs.append(torch.from_numpy(logits))
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
        """Generates greedily; takes what `CasaProcessor` returns, as the eager model's `generate` does.

        Args:
            input_ids: int64 (B, T), padded on the left.
            attention_mask: int64 (B, T).
            max_new_tokens: At most so many a row, the stop token included.
            eos_token_id: Ends a row; the checkpoint's stop tokens where not given.
            pad_token_id: Follows a row's end; the checkpoint's where not given.
            do_sample: Only False.
            **images: `pixel_values`, `image_grid_thw`, `insertion_points`, `image_rows`.

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
        """Yields the new tokens (B, 1) of each step of `generate` as they come."""
        generation = self.generation_config
        end = generation.eos_token_id if eos_token_id is None else eos_token_id
        end = torch.tensor([end] if isinstance(end, int) else list(end or []), dtype=torch.long)
        pad = generation.pad_token_id if pad_token_id is None else pad_token_id
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(dim=1).max())
        self.limits.check_text(longest + max_new_tokens)
        cache = self.new_cache()
        output = self(input_ids, attention_mask=attention_mask, past_key_values=cache, logits_to_keep=1, **images)
        running = torch.ones(len(input_ids), 1, dtype=torch.bool)
        for step in range(max_new_tokens):
            tokens = torch.where(running, output.logits[:, -1].argmax(dim=-1, keepdim=True), pad or 0)
            yield tokens
            running &= ~torch.isin(tokens, end)
            if not running.any() or step + 1 == max_new_tokens:
                return
            output = self(tokens, past_key_values=cache, logits_to_keep=1)

    def encode_image(self, pixel_values: np.ndarray, grid: np.ndarray) -> np.ndarray:
        """Runs the vision graph on one image, frame by frame.

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

    def _begin(self, cache: ExportedCache, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Checks a call's sizes, sets up an empty cache and returns the (B, T) positions of its tokens."""
        self.limits.check_batch(len(ids))
        if cache.positions is None:
            cache.positions = cache.window_positions = np.zeros((len(ids), 0), dtype=np.int64)
            cache.images = [[] for _ in ids]
            text = self.config.text_config
            shape = (len(ids), text.num_key_value_heads, 0, self.config.head_dim)
            cache.text = {name: self.backend.empty(shape) for name in self._names["past"]}
            cache.window_text = {name: self.backend.empty(shape) for name in self._window_names("window_past")}
        if len(cache.positions) != len(ids):
            raise InputError(f"the cache has {len(cache.positions)} conversations; got {len(ids)} rows of ids.")
        self.limits.check_text(cache.positions.shape[1] + ids.shape[1])
        return np.where(real, real.cumsum(axis=1) - 1 + cache.num_tokens()[:, None], PADDING).astype(np.int64)

    def _window_names(self, kind: str) -> list[str]:
        return self._names[kind] if self.config.sees_window_text else []

    def _encode(self, positions, cache, pixels, grids, points, rows) -> list[list[tuple[int, SeenImage]]]:
        """Image tokens of a call's new images: for each row the column of insertion and the image."""
        new: list[list[tuple[int, SeenImage]]] = [[] for _ in positions]
        if (pixels is None) != (grids is None):
            raise InputError("pixel_values and image_grid_thw must be given together.")
        if grids is None:
            return new
        if points is None or len(points) != len(grids):
            raise InputError(
                f"{len(grids)} images with {'no' if points is None else len(points)} insertion points; expected one "
                "for each image (CasaProcessor returns them)."
            )
        if rows is None and len(positions) > 1:
            raise InputError(f"images for a batch of {len(positions)} rows need image_rows, the row of each image.")
        rows = torch.zeros(len(grids), dtype=torch.long) if rows is None else rows
        counts = image_token_counts(grids, self.config.vision_config.spatial_merge_size)
        for index, count in enumerate(counts):
            self.limits.check_image(index, count)
        patches = np.split(pixels.float().numpy(), np.cumsum(grids.prod(dim=-1).numpy())[:-1])
        num_seen = cache.num_tokens()
        for index, (row, column) in enumerate(zip(rows.tolist(), points.tolist(), strict=True)):
            point = int(num_seen[row] + (positions[row, :column] >= 0).sum())
            embeds = self.encode_image(patches[index], grids[index].numpy())
            new[row].append((column, SeenImage(point, embeds, image_positions(grids[index], self.config).numpy())))
        return new

    def _pieces(self, cache, num_tokens: int, columns: list[int], new) -> list[slice]:
        """Cuts the call; at images only where together they are more than a decoder call takes."""
        of_rows = [sum(len(image.embeds) for image in kept) for kept in cache.images]
        totals = [total + sum(len(image.embeds) for _, image in row) for total, row in zip(of_rows, new, strict=True)]
        fits = max(totals) <= self.limits.call_image_tokens
        points = np.array([] if fits else columns, dtype=np.int64)
        return cuts(num_tokens, self.limits.call_tokens, points)

    def _decode(self, cache: ExportedCache, ids: np.ndarray, positions: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Runs the decoder graph on one piece. Mutates `cache`. Returns logits (B, len(keep) or 1, V)."""
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
            "image_starts": _padded([_starts_of(images) for images in seen]),
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
        """Makes `cache.image_kv` that of these images, running the graph only if they are others than before."""
        if cache.image_kv_of == seen:
            return
        longest = max(sum(len(image.embeds) for image in images) for images in seen)
        if longest > self.limits.call_image_tokens:
            raise InputError(
                f"one window has {longest} image tokens; these graphs take up to {self.limits.call_image_tokens}. "
                "Put text between the images, make them smaller, or export with a larger --max-call-image-tokens."
            )
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
        """Empties the CA text cache where every row's window starts after all it holds: nothing reads it again."""
        starts = np.array([plan.first_start for plan in plans])[:, None]
        if cache.window_positions.shape[1] and (cache.window_positions < starts).all():
            cache.window_positions = np.zeros((len(plans), 0), dtype=np.int64)
            shape = (len(plans), self.config.text_config.num_key_value_heads, 0, self.config.head_dim)
            cache.window_text = {name: self.backend.empty(shape) for name in self._names["window_past"]}


def _in_piece(column: int, piece: slice, num_tokens: int) -> bool:
    """Whether an image inserted at a column belongs to a piece; one at the end belongs to the last."""
    return piece.start <= column < piece.stop or column == piece.stop == num_tokens


def _starts_of(images: list[SeenImage]) -> np.ndarray:
    """int64 (N,): for each image token the start of its window, which is its image's insertion point."""
    return np.concatenate([np.full(len(i.embeds), i.point, dtype=np.int64) for i in images] or [np.zeros(0, np.int64)])


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out
