"""The engine's real scheduler over a worker that computes symbols. Test support only.

A page holds what was written into it, by name: a text slot the hash of everything before it, an image page the image's
content. Every page that a step reads is compared with what the request ought to see there, and a sampled token is a
function of it, so that a page that nobody wrote, or somebody else, is found at once. There is no model: a step takes a
fraction of a millisecond.
"""

import random
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from casa_engine.windows import last_window
from casa_vllm.image_cache_spec import ImageCacheSpec
from casa_vllm.request_images import RequestImages
from casa_vllm.scheduler import create_scheduler
from casa_vllm.window_states import WindowStates

BLOCK_SIZE = 8
MAX_MODEL_LEN = 128
VOCABULARY = 50


@dataclass(frozen=True)
class Picture:
    """An image of `num_tokens` tokens, attached to text position `point` of its chunk; `pixels` identify it."""

    pixels: int
    num_tokens: int
    point: int

    @property
    def content(self) -> tuple[int, int]:
        return self.pixels, self.num_tokens


@dataclass
class Chunk:
    """A prompt, or a session's next part of one."""

    tokens: list[int]
    pictures: list[Picture] = field(default_factory=list)
    max_tokens: int = 1


@dataclass
class Client:
    """Who sent a request, and what came back.

    Attributes:
        chunks: Those still to be sent; an ordinary request has one.
        pending: Those sent and not answered.
        answered: Those answered; `answers` are the tokens, the last one's perhaps not all of them.
        refused: Reasons of refused chunks.
        error: Why the request ended with an error.
    """

    name: str
    chunks: list[Chunk]
    is_session: bool
    closes: bool
    priority: int
    salt: str | None
    pending: deque[Chunk] = field(default_factory=deque)
    answered: list[Chunk] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=lambda: [[]])
    refused: list[str] = field(default_factory=list)
    error: str | None = None
    is_done: bool = False


def prefix_hash(before: int, token: int, images: tuple) -> int:
    """What a text slot holds: everything that its token can see."""
    return hash((before, token, images))


def sample(state: int) -> int:
    """The "model": a token from the last slot's content."""
    return state % VOCABULARY


def prefix_hashes(tokens: list[int], pictures: list[Picture]) -> list[int]:
    """Content of each text slot. Images count when the first token after them is computed."""
    hashes, state, index = [], 0, 0
    for position, token in enumerate(tokens):
        images = []
        while index < len(pictures) and pictures[index].point <= position:
            images.append(pictures[index].content)
            index += 1
        state = prefix_hash(state, token, tuple(images))
        hashes.append(state)
    return hashes


def expected_answers(chunks: list[Chunk]) -> list[list[int]]:
    """What a request or session answers; the last token of an answer is not part of the session."""
    tokens: list[int] = []
    pictures: list[Picture] = []
    answers = []
    for chunk in chunks:
        pictures += [replace(picture, point=picture.point + len(tokens)) for picture in chunk.pictures]
        tokens = tokens + chunk.tokens
        answer = []
        for _ in range(chunk.max_tokens):
            answer.append(sample(prefix_hashes(tokens, pictures)[-1]))
            tokens = [*tokens, answer[-1]]
            if len(tokens) >= MAX_MODEL_LEN:
                break
        answers.append(answer)
        tokens = tokens[:-1]
    return answers


class SymbolicWorker:
    """Does with a scheduler's output what the model runners do, on symbols."""

    def __init__(self, groups: list[Any]) -> None:
        self._groups = groups
        self._pages: list[dict[int, Any]] = [{} for _ in groups]
        self._requests: dict[str, SimpleNamespace] = {}
        self._image_specs = {gid: spec for gid, spec in enumerate(groups) if isinstance(spec, ImageCacheSpec)}

    def execute(self, output: Any) -> ModelRunnerOutput:
        for name in [*output.finished_req_ids, *(output.preempted_req_ids or ())]:
            if name in output.finished_req_ids:
                self._requests.pop(name, None)
        for data in output.scheduled_new_reqs:
            tokens = data.prefill_token_ids if data.prefill_token_ids is not None else data.prompt_token_ids
            self._send_row(data.req_id, list(tokens), data.mm_features, data.block_ids, data.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            state = self._requests[name]
            if name in cached.all_token_ids:
                state.tokens = list(cached.all_token_ids[name])
            if name in cached.resumed_req_ids:
                computed = cached.num_computed_tokens[index]
                self._send_row(name, state.tokens, state.features, cached.new_block_ids[index], computed)
            elif cached.new_block_ids[index] is not None:
                for row, ids in zip(state.rows, cached.new_block_ids[index], strict=True):
                    row.extend(ids)
            state.computed = cached.num_computed_tokens[index]
        self._encode(output.scheduled_encoder_inputs)
        sampled = [self._run(name, count) for name, count in output.num_scheduled_tokens.items()]
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(names, {name: index for index, name in enumerate(names)}, sampled)

    def num_computed(self, name: str) -> int:
        """Tokens that were computed before the request's latest step: behind its first, those that were cached."""
        return self._requests[name].computed

    def _send_row(self, name: str, tokens: list[int], features: list, rows: Any, computed: int) -> None:
        self._requests[name] = SimpleNamespace(
            tokens=tokens, features=features, rows=[list(row) for row in rows], computed=computed
        )
        windows = {
            gid: WindowStates(1, spec.row_pages, spec.step_pages, spec.block_size)
            for gid, spec in self._image_specs.items()
        }
        for states in windows.values():
            states.add_row(0, features, computed)
        self._requests[name].windows = windows

    def _image_pages(self, name: str, gid: int, image: int) -> list[int]:
        state = self._requests[name]
        return state.rows[gid][state.windows[gid].pages_of(0, image)]

    def _encode(self, scheduled: dict[str, list[int]]) -> None:
        for name, images in scheduled.items():
            for image in images:
                feature = self._requests[name].features[image]
                assert feature.data is not None, "pixels were not sent"
                for gid, spec in self._image_specs.items():
                    pages = self._image_pages(name, gid, image)
                    assert len(pages) == -(-feature.mm_position.get_num_embeds() // spec.block_size) and all(pages)
                    for index, page in enumerate(pages):
                        self._write(gid, page)[0] = (content_of(feature), index)

    def _write(self, gid: int, page: int) -> dict[int, Any]:
        """The slots of a page that this group writes; another group's content is lost."""
        for other, pages in enumerate(self._pages):
            if other != gid:
                pages.pop(page, None)
        return self._pages[gid].setdefault(page, {})

    def _run(self, name: str, num_tokens: int) -> list[int]:
        state = self._requests[name]
        end = state.computed + num_tokens
        assert end <= len(state.tokens), "a token is scheduled before it exists"
        images = RequestImages.from_features(state.features)
        pictures = [
            Picture(*content_of(feature), feature.mm_position.offset)  # The real pixels, whatever the identifier is.
            for feature in state.features
        ]
        hashes = prefix_hashes(state.tokens[:end], pictures)
        for gid, spec in enumerate(self._groups):
            row = state.rows[gid]
            if isinstance(spec, ImageCacheSpec):
                self._read_images(name, gid, images, state.computed, end)
                continue
            for position in range(state.computed, end):
                page = row[position // BLOCK_SIZE]
                assert page, "text is written to the null page"
                self._write(gid, page)[position % BLOCK_SIZE] = hashes[position]
            for position in range(end):
                held = self._pages[gid].get(row[position // BLOCK_SIZE], {}).get(position % BLOCK_SIZE)
                assert held == hashes[position], f"{name}: text slot {position} of group {gid} holds something else"
        if end < len(state.tokens):
            return []
        state.tokens.append(sample(hashes[-1]))
        return [state.tokens[-1]]

    def _read_images(self, name: str, gid: int, images: RequestImages, start: int, end: int) -> None:
        features = self._requests[name].features
        windows = {last_window(position, images.points)[1:] for position in range(start, end)}
        for first, stop in windows:
            for image in range(first, stop):
                pages = self._image_pages(name, gid, image)
                assert pages, f"{name}: image {image} has no pages in its row"
                for index, page in enumerate(pages):
                    held = self._pages[gid].get(page, {}).get(0)
                    wanted = (content_of(features[image]), index)
                    assert held == wanted, f"{name}: page {index} of image {image} holds {held}, not {wanted}"


def content_of(feature: MultiModalFeatureSpec) -> tuple[int, int]:
    """What is in the image; survives that the scheduler drops its pixels."""
    return int(feature.mm_hash), feature.mm_position.get_num_embeds()


class Simulation:
    """A scheduler with its worker, and clients.

    Args:
        folder: A checkpoint, for vLLM's configuration.
        num_text_groups: 1 for `ca`, 2 for `ca_tv`.
        is_async: Two steps in flight.
        is_v2: What the scheduler sends is for Model Runner V2.
        extra_blocks: Pages beyond the fewest that vLLM starts with.
        **options: Of vLLM's engine.
    """

    def __init__(
        self,
        folder: Path,
        num_text_groups: int = 1,
        is_async: bool = False,
        is_v2: bool = False,
        extra_blocks: int = 0,
        **options: Any,
    ) -> None:
        settings = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "max_model_len": MAX_MODEL_LEN}
        config = EngineArgs(model=str(folder), dtype="float32", **(settings | options)).create_engine_config()
        config.scheduler_config.async_scheduling = is_async
        self.config = config
        self._depth = 2 if is_async else 1
        size = {"block_size": BLOCK_SIZE, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
        limits = {"step_tokens": 128, "max_prompt_tokens": 512, "max_prompt_images": 24}
        images = ImageCacheSpec(**size, **limits)
        specs = [FullAttentionSpec(**size) for _ in range(num_text_groups)] + [images]
        num_blocks = num_text_groups * MAX_MODEL_LEN // BLOCK_SIZE + images.max_pages_in_use(self._depth) + 1
        groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
        config.cache_config.num_gpu_blocks = num_blocks + extra_blocks
        init_none_hash(hash_fn := get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo))
        self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_fn)
        self.scheduler = create_scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks + extra_blocks, [], groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        self.scheduler.use_v2_model_runner = is_v2
        self.scheduler.max_num_encoder_input_tokens = limits["step_tokens"]
        self.worker = SymbolicWorker(specs)
        self.clients: dict[str, Client] = {}
        self._in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self._count = 0
        self.num_free_blocks = self.free_blocks()

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def open(self, chunks: list[Chunk], *, is_session: bool = False, closes: bool = True, **options: Any) -> Client:
        """Send a request, or a session's first chunk."""
        self._count += 1
        defaults = {"priority": 0, "salt": None}
        client = Client(f"{self._count}", list(chunks), is_session, closes, **(defaults | options))
        self.clients[client.name] = client
        self.send_next(client)
        return client

    def send_next(self, client: Client) -> None:
        """Send the next chunk, or the end of the session."""
        if client.chunks:
            chunk = client.chunks.pop(0)
            client.pending.append(chunk)
            self.scheduler.add_request(self._request(client, chunk))
        elif client.closes:
            self.close(client)

    def close(self, client: Client) -> None:
        """End a session the way `AsyncLLM` does when no more chunks come."""
        client.is_done = True
        self.scheduler.add_request(self._request(client, Chunk([0]), resumable=False))

    def abort(self, client: Client) -> None:
        client.is_done = True
        self.scheduler.finish_requests(client.name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> bool:
        """One turn of the engine's loop; False where there is nothing to do."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self._in_flight.append((output, self.worker.execute(output)))
            if len(self._in_flight) < self._depth and self.scheduler.has_requests():
                return True
        if not self._in_flight:
            return False
        outputs = self.scheduler.update_from_output(*self._in_flight.popleft())
        for client in outputs.values():
            for output in client.outputs:
                self._receive(output)
        return True

    def _receive(self, output: Any) -> None:
        client = self.clients[output.request_id]
        if client.is_done:
            return
        client.answers[-1] += output.new_token_ids
        if output.finish_reason is None:
            return
        if output.finish_reason == FinishReason.ERROR:
            assert output.stop_reason, "an error without a reason"
            if output.request_id not in self.scheduler.requests:
                client.error, client.is_done = output.stop_reason, True
                return
            assert not output.new_token_ids
            client.refused.append(output.stop_reason)
            client.pending.popleft()
            return
        client.answered.append(client.pending.popleft())
        client.answers.append([])
        client.is_done = not client.is_session

    def _request(self, client: Client, chunk: Chunk, resumable: bool = True) -> Request:
        features = [
            MultiModalFeatureSpec(
                data={},  # The worker asks only whether it is there.
                modality="image",
                identifier=f"image-{picture.content}",
                mm_position=PlaceholderRange(picture.point, 1, torch.ones(picture.num_tokens, dtype=torch.bool)),
                mm_hash=str(picture.pixels),
            )
            for picture in chunk.pictures
        ]
        caching = self.config.cache_config.enable_prefix_caching
        return Request(
            client.name,
            list(chunk.tokens),
            SamplingParams(temperature=0, max_tokens=chunk.max_tokens, ignore_eos=True),
            None,
            arrival_time=float(self._count),
            mm_features=features,
            cache_salt=client.salt,
            priority=client.priority,
            block_hasher=self._hasher if caching else None,
            resumable=client.is_session and resumable,
        )


def random_chunk(rng: random.Random, room: int, is_first: bool) -> Chunk:
    """Text with images out of few, at the sizes where something ends: pages, windows, steps."""
    num_text = rng.choice([1, 1, 2, 3, 7, 8, 9, 20, 63, 64, 65])
    num_text = max(min(num_text, room - 2), 1)
    prefix = [1, 2, 3, 4, 5, 6, 7, 8] * 9
    tokens = prefix[:num_text] if is_first and rng.random() < 0.6 else [rng.randrange(9) for _ in range(num_text)]
    pictures = []
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        point = rng.choice([0, num_text, num_text, rng.randrange(num_text + 1)])
        size = rng.choice([1, 7, 8, 9, 18, 48, 64, 127, 128])
        number = rng.choice([1, 1, 1, 2, 5]) if size < 20 else 1
        # The same picture several times in a window, or several pictures.
        first = rng.randrange(4)
        pictures += [Picture(first + rng.randrange(2), size, point) for _ in range(number)]
    pictures.sort(key=lambda picture: picture.point)
    fitting: list[Picture] = []
    for picture in pictures:
        window = [other.num_tokens for other in fitting if other.point == picture.point]
        if sum(window) + picture.num_tokens <= 128 and len(window) < 16 and len(fitting) < 24:
            fitting.append(picture)
    return Chunk(tokens, fitting, max_tokens=rng.choice([1, 1, 2, 5, 12]))


def random_client(rng: random.Random) -> dict[str, Any]:
    """Arguments of `Simulation.open`."""
    is_session = rng.random() < 0.4
    chunks, room = [], MAX_MODEL_LEN
    for _ in range(rng.randrange(1, 6) if is_session else 1):
        chunk = random_chunk(rng, room, not chunks)
        room -= len(chunk.tokens) + chunk.max_tokens
        chunks.append(chunk)
        if room < 10 and rng.random() < 0.8:
            break
        room = max(room, 3)
    return {
        "chunks": chunks,
        "is_session": is_session,
        "closes": rng.random() < 0.7,
        "priority": rng.randrange(3),
        "salt": rng.choice([None, None, None, "tenant"]),
    }
