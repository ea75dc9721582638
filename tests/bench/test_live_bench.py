"""`casa bench live` says why it has ended: a bound, the places of the server, or the number that was asked for."""

import asyncio

import pytest

from casa_bench.cli import main
from casa_bench.live import WARMUP_FRAMES
from casa_bench.report import read_report
from casa_serving.live.client import LiveClient
from scripted_live import scripted_server
from waiting import soon

LOAD = ("--seconds", "1", "--fps", "2", "--image-size", "28", "--bound-ms", "60000")


@pytest.fixture
def bench(tmp_path):
    """Run `casa bench live` beside the server's event loop; return its run, None where it fails."""

    async def measured(server, *options):
        prefix = tmp_path / "live"
        status = await asyncio.to_thread(main, ["live", server.url, *LOAD, *options, "--output", str(prefix)])
        return read_report(prefix.with_suffix(".json"))["runs"][0] if status == 0 else None

    return measured


async def test_a_server_without_more_places_is_not_at_its_bound(bench, capsys):
    async with scripted_server(max_sessions=2) as server:
        run = await bench(server, "--max-sessions", "8")
    assert [(row["sessions"], row["holds"], row["ended_by"]) for row in run["rows"]] == [
        (1, True, None),
        (2, True, "places"),
    ]
    assert (run["summary"]["most_sessions"], run["summary"]["stopped_at"]) == (2, None)
    assert "| 2 | - | places |" in capsys.readouterr().out


async def test_the_largest_number_is_not_the_bound(bench, capsys):
    async with scripted_server() as server:
        run = await bench(server, "--max-sessions", "1")
    (row,) = run["rows"]
    assert (row["holds"], row["ended_by"]) == (True, "max_sessions")
    assert row["sent_late_p95_ms"] >= 0
    assert "| 1 | - | max_sessions |" in capsys.readouterr().out


async def test_frames_that_are_not_shown_pass_the_bound(bench, capsys):
    async with scripted_server() as server:
        server.engine.gate.clear()
        measured = asyncio.create_task(bench(server, "--fps", "10"))
        # More than those of the warm-up.
        await soon(lambda: (server.metric("casa:live_frames_total", result="dropped") or 0) > WARMUP_FRAMES)
        server.engine.gate.set()
        run = await measured
    (row,) = run["rows"]
    assert row["dropped"] > 0
    assert (row["holds"], row["ended_by"]) == (False, "bound")
    assert "| 0 | 1 | bound |" in capsys.readouterr().out


async def test_a_server_without_any_place_is_an_error(bench, tmp_path, capsys):
    async with scripted_server(max_sessions=1) as server, LiveClient(server.url) as client:
        await client.create()
        assert await bench(server) is None
    words = capsys.readouterr().err
    assert "has no place for a single live session: All places are taken" in words
    assert list(tmp_path.iterdir()) == []
