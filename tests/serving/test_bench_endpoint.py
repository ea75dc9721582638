"""`casa bench` against a real server: streams, chats, reuse and live sessions, a few requests each."""

import pytest

from casa_bench.cli import main
from casa_bench.live import WARMUP_FRAMES
from casa_bench.report import read_report

pytestmark = pytest.mark.vllm
SIZE = ("--image-size", "56")


def bench(tmp_path, *arguments):
    """Run `casa bench`, which must succeed; return its one run."""
    assert main([*map(str, arguments), "--output", str(tmp_path / "report")]) == 0
    (run,) = read_report(tmp_path / "report.json")["runs"]
    assert run["backend"] == "endpoint"
    assert run["complete"]
    return run


def test_a_stream_is_sent_again_each_turn(server, tmp_path):
    run = bench(tmp_path, "stream", server.url, "--turns", 4, "--tokens", 4, *SIZE)
    assert run["name"] == "casa-tiny-digits"
    rows = run["rows"]
    assert [row["tokens"] for row in rows] == [4] * 4
    assert all(row["ttft_ms"] > 0 and row["prepare_ms"] > 0 for row in rows)
    kept = [row["kv_tokens"] for row in rows]
    assert kept == sorted(set(kept))
    # What cannot be seen from outside is no figure.
    assert {row[name] for row in rows for name in ("kv_bytes", "cpu_ms", "memory_bytes")} == {None}
    assert "| - |" in (tmp_path / "report.md").read_text()


def test_chats_and_reuse(server, tmp_path):
    run = bench(tmp_path, "chat", f"{server.url}/v1", "--turns", 2, "--concurrency", 3, "--tokens", 4, *SIZE)
    assert [row["tokens"] for row in run["rows"]] == [[4, 4, 4]] * 2
    run = bench(tmp_path, "reuse", server.url, "--images", 1, "--questions", 2, "--tokens", 4, *SIZE)
    assert [len(row["ttft_ms"]) for row in run["rows"]] == [2]


def test_live_sessions_by_the_clock(server, tmp_path):
    encoded = server.metric("casa:vision_encoder_runs_total")
    load = ("--max-sessions", 2, "--seconds", 4, "--bound-ms", 60_000, "--fps", 2, "--seed", 15)
    run = bench(tmp_path, "live", server.url, *load, *SIZE)
    assert [row["sessions"] for row in run["rows"]] == [1, 2][: len(run["rows"])]
    assert run["rows"][-1]["ended_by"] == ("max_sessions" if run["rows"][-1]["holds"] else "bound")
    # Every frame that is captioned is one that the server has never seen; those of the warm-up are not in the rows.
    shown = sum(row["frames"] - row["dropped"] for row in run["rows"])
    warmup = WARMUP_FRAMES * sum(row["sessions"] for row in run["rows"])
    assert shown <= server.metric("casa:vision_encoder_runs_total") - encoded <= shown + warmup
    first = run["rows"][0]
    assert first["frames"] == 8
    assert first["answers"] == 0
    # One of eight is more than a twentieth.
    assert first["holds"] is (first["dropped"] == 0)


def test_the_load_of_vss_asks_about_ten_seconds(server, tmp_path):
    run = bench(tmp_path, "live", server.url, "--max-sessions", 1, "--seconds", 10, "--load", "vss", *SIZE)
    (row,) = run["rows"]
    assert row["fps"] == 8
    assert row["frames"] == 80
    assert row["answers"] == 1
    assert row["answer_p95_ms"] > 0


def test_a_server_that_refuses_is_one_sentence(server, tmp_path, capsys):
    output = ["--output", str(tmp_path / "report")]
    assert main(["reuse", server.url, "--served-model", "other", *SIZE, *output], "casa bench") == 1
    assert "casa bench: " in (words := capsys.readouterr().err)
    assert "refuses a request" in words
    assert not list(tmp_path.iterdir())
