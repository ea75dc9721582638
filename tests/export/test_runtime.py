"""What the ONNX Runtime model promises beyond right answers: no copies, no work twice, many conversations."""

import itertools
import threading

import numpy as np
import pytest
import torch

from casa_engine.streaming import CasaStream
from casa_export.plan import cut_columns

GRID = torch.tensor([[1, 4, 4]])


def frame(seed: int) -> torch.Tensor:
    return torch.randn(16, 1176, generator=torch.Generator().manual_seed(seed))


def counted(exported, monkeypatch) -> list[str]:
    """Names of the graphs that run from now on."""
    runs: list[str] = []
    original = exported.backend.run
    monkeypatch.setattr(exported.backend, "run", lambda graph, *rest: (runs.append(graph), original(graph, *rest))[1])
    return runs


def test_caches_are_bound_not_copied(exported, monkeypatch):
    """The very OrtValues that one step returns are the inputs of the next."""
    seen = []
    original = exported.backend.run

    def run(graph, host, resident, fetch):
        fetched, values = original(graph, host, resident, fetch)
        if graph == "decoder":
            seen.append(([resident["past_key.0"], resident["window_past_value.0"]], list(values.values())))
        return fetched, values

    monkeypatch.setattr(exported.backend, "run", run)
    stream = CasaStream(exported, stop_token_ids=[])
    stream.feed([5, 6, 7])
    stream.generate(3)
    assert len(seen) == 4
    for (_, outputs), (inputs, _) in itertools.pairwise(seen):
        assert all(any(value is output for output in outputs) for value in inputs)


def test_image_kv_is_computed_once_a_window(exported, monkeypatch):
    runs = counted(exported, monkeypatch)
    stream = CasaStream(exported, stop_token_ids=[])
    stream.feed([5, 6, 7], frame(0), GRID, [1])
    stream.generate(6)
    assert runs == ["vision", "image_kv"] + ["decoder"] * 7


def test_text_of_passed_windows_is_dropped(exported):
    stream = CasaStream(exported, stop_token_ids=[])
    for turn in range(5):
        stream.feed([5, 6, 7, 8], frame(turn), GRID, [0])
        assert stream.cache.window_positions.shape == (1, 4)
    assert stream.cache.positions.shape == (1, 20)


def test_conversations_in_turns_and_in_threads_do_not_mix(exported):
    def talk(seed: int) -> list[int]:
        stream = CasaStream(exported, stop_token_ids=[])
        for turn in range(3):
            stream.feed([5 + seed, 6, 7], frame(10 * seed + turn), GRID, [1])
            stream.generate(4)
        return stream.token_ids

    alone = [talk(seed) for seed in range(3)]
    streams = [CasaStream(exported, stop_token_ids=[]) for _ in range(3)]
    for turn in range(3):
        for seed, stream in enumerate(streams):
            stream.feed([5 + seed, 6, 7], frame(10 * seed + turn), GRID, [1])
            stream.generate(4)
    assert [stream.token_ids for stream in streams] == alone
    found: dict[int, list[int]] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: talk(seed)})) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(3)] == alone


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "points", "expected"),
    [
        (5, 8, [], [(0, 5)]),
        (20, 8, [], [(0, 8), (8, 16), (16, 20)]),
        (20, 8, [3, 3, 12], [(0, 3), (3, 11), (11, 12), (12, 20)]),
        (4, 8, [0, 4], [(0, 4)]),
        (1, 8, [], [(0, 1)]),
    ],
)
def test_cuts(num_tokens, max_tokens, points, expected):
    pieces = cut_columns(num_tokens, max_tokens, np.array(points, dtype=int))
    assert [(piece.start, piece.stop) for piece in pieces] == expected
