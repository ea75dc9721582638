"""How live sessions are added and counted on a GPU (benchmarks/gpu/live_ramp.py), with sessions that only wait."""

import asyncio
import importlib.util
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from casa_engine.live.settings import LiveSettings

pytestmark = pytest.mark.unit
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


def module(name, alias):
    spec = importlib.util.spec_from_file_location(alias, FOLDER / f"{name}.py")
    loaded = sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


live_ramp = module("live_ramp", "gpu_live_ramp")


class Sessions:
    """Sessions whose frames take so long; those of some places fail at a frame."""

    def __init__(self, seconds=0.0, failing=()):
        self.seconds, self.failing = seconds, failing
        self.opened, self.closed = [], []
        self.ramp = live_ramp.Ramp(self.open, self.caption)

    async def open(self, place):
        async def close():
            self.closed.append(place)

        self.opened.append(place)
        return SimpleNamespace(place=place, close=close)

    async def caption(self, session, timestamp, due_s):
        if session.place in self.failing:
            raise RuntimeError("the engine lost a session")
        await asyncio.sleep(self.seconds)
        return SimpleNamespace(delay_ms=1e3 * self.seconds, num_tokens=20, trimmed=session.place == 0)


def run(scenario):
    """A scenario by a clock that jumps to whatever is waited for: loads of the machine make nothing late."""

    class Loop(asyncio.SelectorEventLoop):
        now = 100.0

        def time(self):
            return self.now

        def _run_once(self):
            if not self._ready and self._scheduled:
                self.now = max(self.now, self._scheduled[0].when())
            super()._run_once()

    loop = Loop()
    clock, live_ramp.time = live_ramp.time, SimpleNamespace(monotonic=loop.time)
    try:
        return loop.run_until_complete(scenario)
    finally:
        live_ramp.time = clock
        loop.close()


def test_sessions_stay_open_and_the_difference_is_added():
    sessions = Sessions()

    async def scenario():
        await sessions.ramp.grow(3, 1.0)
        first = await sessions.ramp.count(2.0)
        await sessions.ramp.grow(5, 1.0)
        # The last one begins up to a frame after the time over which they are spread.
        await asyncio.sleep(1.0)
        second = await sessions.ramp.count(2.0)
        assert not sessions.closed
        return first, second, await sessions.ramp.close()

    first, second, num_failed = run(scenario())
    assert sessions.opened == [0, 1, 2, 3, 4] and sorted(sessions.closed) == sessions.opened
    assert num_failed == 0
    assert (first.num_due, second.num_due) == (12, 20)
    assert len(second.frames) == 20 and second.late_share == 0
    assert sum(frame.num_tokens for frame in second.frames) == 400
    assert sum(frame.is_trimmed for frame in second.frames) == 4


def test_sessions_begin_one_by_one():
    sessions, starts = Sessions(), []

    async def scenario():
        opened = sessions.ramp._open

        async def note(place):
            starts.append(asyncio.get_running_loop().time() - 100.0)
            return await opened(place)

        sessions.ramp._open = note
        await sessions.ramp.grow(64, 3.0)
        await asyncio.sleep(0.5)
        await sessions.ramp.close()

    run(scenario())
    phases = sorted(start % (1 / live_ramp.FPS) for start in starts)
    assert 2.5 < max(starts) < 3.5
    assert max(later - earlier for earlier, later in itertools.pairwise(phases)) < 0.05


def test_frames_behind_are_dropped_and_late():
    sessions = Sessions(seconds=1.2)

    async def scenario():
        await sessions.ramp.grow(2, 1.0)
        await asyncio.sleep(1.0)
        count = await sessions.ramp.count(4.0)
        await sessions.ramp.close()
        return count

    count = run(scenario())
    assert count.num_due == 16 and len(count.frames) < 8
    assert count.late_share == 1


def test_a_session_that_fails_is_late_from_then_on(capsys):
    sessions = Sessions(failing={1})

    async def scenario():
        await sessions.ramp.grow(2, 1.0)
        await asyncio.sleep(0.5)
        count = await sessions.ramp.count(2.0)
        return count, await sessions.ramp.close()

    count, num_failed = run(scenario())
    assert count.late_share == 0.5 and num_failed == 1
    assert "the engine lost a session" in capsys.readouterr().err
    assert sorted(sessions.closed) == [0, 1]


class Live:
    """An engine that is fast enough for so many sessions at once."""

    def __init__(self, most):
        self.most, self.num_open, self.opened = most, 0, []
        self.defaults = LiveSettings()

    def capacity(self, settings):
        return 77

    async def open(self, settings, history):
        self.num_open += 1
        self.opened.append(history)
        return self

    async def close(self):
        self.num_open -= 1


@pytest.mark.parametrize(
    ("most", "expected", "counted"), [(5, 4, [2, 4, 6]), (9, 8, [2, 4, 6, 8]), (1, 1, [2, 1]), (0, 0, [2, 1])]
)
def test_sessions_are_added_until_frames_are_late(most, expected, counted, monkeypatch):
    """Fewer are tried where the first number is too many."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(sys.modules, "live_ramp", live_ramp)
    sessions = module("sessions", "gpu_sessions")
    live, rows = Live(most), []

    async def result_of(session, frame, timestamp, due_s):
        await asyncio.sleep(0.1 if live.num_open <= most else 0.8)
        delay_ms = 1e3 * (asyncio.get_running_loop().time() - due_s)
        return SimpleNamespace(delay_ms=delay_ms, num_tokens=20, trimmed=False)

    monkeypatch.setattr(sessions, "result_of", result_of)
    load = sessions.Load(8, (2, 4, 6, 8), (1,), 2.0, 1.0, 1.0, 2.0, 60, 10, 60.0)
    table = SimpleNamespace(add=lambda *row: rows.append(row))
    run(sessions.measure_sessions(live, load, table, "model"))
    values = {row[:2]: row[2] for row in rows}
    assert values["sessions that fit into the engine", "model"] == 77
    assert values["sessions within the bound", "model"] == expected
    late = [row for row in rows if row[0] == "late or dropped"]
    assert [int(row[1].split(", ")[1].split()[0]) for row in late] == counted
    assert live.num_open == 0
    if expected > 1:
        assert len({len(history) for history in live.opened}) == counted[-1], (
            "texts begin in all phases between two trims"
        )
        assert len({history[0].caption for history in live.opened}) == counted[-1], "the engine has read none of them"
