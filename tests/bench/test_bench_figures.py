"""The figures of the tables, and reports that are none."""

import json
import math

import numpy as np
import pytest

from casa_bench.chat import CHAT
from casa_bench.cli import main
from casa_bench.live import is_within, load_of
from casa_bench.live import summarize as summarize_live
from casa_bench.model_options import without_key
from casa_bench.plot import PANELS, POINTS, points
from casa_bench.published import published_tables
from casa_bench.report import markdown, read_report
from casa_bench.reuse import summarize as summarize_reuse
from casa_bench.statistics import first_and_last, percentile
from casa_bench.stream import STREAM
from casa_bench.stream import summarize as summarize_stream
from casa_engine.errors import InputError

pytestmark = pytest.mark.unit


def turn(number, **fields):
    """A row of a stream."""
    times = {"ttft_ms": 1.0, "decode_ms": 1.0, "tokens_per_s": 1.0, "total_ms": 2.0, "prepare_ms": 0.1, "cpu_ms": 2.0}
    return {"turn": number, **times, "kv_tokens": number, "kv_bytes": number, "memory_bytes": 2**20, **fields}


@pytest.mark.parametrize("count", [1, 2, 3, 20, 101])
@pytest.mark.parametrize("percent", [0, 5, 50, 95, 100])
def test_percentiles_are_linear_between_two_values(count, percent):
    values = np.random.default_rng(count).normal(size=count).tolist()
    ordered, place = sorted(values), (count - 1) * percent / 100
    below, above = math.floor(place), math.ceil(place)
    expected = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    assert percentile(values, percent) == pytest.approx(expected)


def test_a_percentile_of_nothing_is_none():
    assert percentile([], 50) is None


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (0, 0)), (2, (0, 1)), (9, (0, 8)), (19, (0, 18)), (20, (0.5, 18.5)), (256, (12, 243))]
)
def test_first_and_last_are_means_over_a_tenth(count, expected):
    assert first_and_last(range(count)) == expected


def test_what_was_not_seen_is_no_figure():
    assert first_and_last([1.0, None]) is None
    assert first_and_last([]) is None
    summary = summarize_stream([turn(0, kv_bytes=None, cpu_ms=None)])
    assert (summary["kv_bytes"], summary["cpu_ms"]) == (None, None)


def test_summary_of_a_stream():
    rows = [turn(number, ttft_ms=float(number)) for number in range(100)]
    summary = summarize_stream(rows)
    assert (summary["turns"], summary["kv_tokens"], summary["kv_bytes"]) == (100, 99, 99)
    assert summary["ttft_ms"] == (4.5, 94.5)
    assert set(summary["beside_fresh"].values()) == {None}


def test_neighbours_tell_growth_from_the_machines_own_speed():
    alone = [turn(number, ttft_ms=float(number)) for number in range(100)]
    # The machine is ten times slower in the second half; the long stream is 1.5x the fresh one all along.
    speeds = [1.0] * 5 + [10.0] * 5
    paired = [
        turn(100 + number, ttft_ms=6.0 * speed, cpu_ms=None, fresh=turn(number, ttft_ms=4.0 * speed))
        for number, speed in enumerate(speeds)
    ]
    summary = summarize_stream(alone + paired)
    assert (summary["turns"], summary["kv_tokens"], summary["ttft_ms"]) == (100, 99, (4.5, 94.5))
    assert summary["beside_fresh"] == {"ttft_ms": 1.5, "total_ms": 1.0, "cpu_ms": None}
    assert STREAM.cells(summary)[-1] == "1.50 / 1.00 / -"


def test_summary_of_reuse():
    rows = [{"image": 1, "ttft_ms": [100.0, 10.0, 20.0]}, {"image": 2, "ttft_ms": [300.0, 30.0, 40.0]}]
    summary = summarize_reuse(rows)
    assert (summary["first_ms"], summary["second_ms"], summary["later_ms"]) == (200.0, 20.0, 25.0)
    assert summary["second_of_first"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("late", "total", "expected"), [(0, 1, True), (5, 100, True), (6, 100, False), (1, 19, False), (0, 0, False)]
)
def test_p95_is_within_a_bound_that_a_twentieth_passes(late, total, expected):
    assert is_within(late, total) is expected


def test_most_sessions_are_the_last_number_within_the_bound():
    rows = [{"sessions": number, "holds": number < 4} for number in (1, 2, 4)]
    assert summarize_live(rows)["most_sessions"] == 2
    assert summarize_live(rows)["stopped_at"] == 4
    assert summarize_live([*rows[:2], rows[2] | {"ended_by": "bound"}])["ended_by"] == "bound"
    assert summarize_live(rows[:2])["stopped_at"] is None


def test_a_load_is_bounded_by_the_time_between_frames_and_vss_by_its_chunk():
    options = {"load": "captions", "fps": None, "bound_ms": None}
    assert (load_of(options).fps, load_of(options).bound_ms) == (2.0, 500.0)
    assert load_of(options | {"fps": 8.0}).bound_ms == 125.0
    vss = load_of(options | {"load": "vss"})
    assert (vss.fps, vss.bound_ms, vss.question_s) == (8.0, 10_000.0, 10.0)
    assert (vss.settings["max_frame_tokens"], vss.settings["max_answer_tokens"]) == (1, 100)
    assert load_of(options | {"load": "vss", "bound_ms": 99.0}).bound_ms == 99.0


@pytest.mark.parametrize("count", [1, 5, 64, 65, 256, 10_000])
def test_a_line_has_few_points_and_all_turns(count):
    line = points(PANELS[0], [turn(number, ttft_ms=number + 1.0) for number in range(count)])
    size = math.ceil(count / POINTS)
    assert len(line) == math.ceil(count / size) <= POINTS
    assert all(value == place for place, value in line)
    # A point is the middle of its turns: together they are all of them.
    sizes = [size] * (len(line) - 1) + [count - size * (len(line) - 1)]
    assert sum(number * place for number, (place, _) in zip(sizes, line, strict=True)) == count * (count + 1) / 2


def test_published_figures_name_their_sources():
    for workload, sources in (("stream", ["kyutai-labs/casa", "H100"]), ("live", ["MOSS-VL", "H200", "NVIDIA VSS"])):
        text = "\n".join(published_tables(workload))
        assert all(source in text for source in sources)
    assert published_tables("chat") == published_tables("reuse") == []


RUN = {
    "name": "a",
    "backend": "eager",
    "about": {},
    "settings": {},
    "command": "",
    "date": "",
    "versions": {},
    "machine": {},
    "complete": True,
    "summary": {},
    "rows": [],
}
GOOD = {"format": "casa-bench", "version": 1, "workload": "stream", "runs": [RUN]}


def test_a_report_tells_apart_what_a_table_cannot_compare():
    runs = [
        RUN | {"about": {"device": "cuda", "dtype": "bfloat16", "enforce_eager": False}},
        RUN | {"about": {"device": "cpu", "dtype": "float32"}},
        RUN | {"about": {"device": ""}},
    ]
    text = markdown(CHAT, [run | {"summary": CHAT.summarize([])} for run in runs])
    told = [line for line in text.splitlines() if line.startswith("- a: ")]
    assert "device cuda, dtype bfloat16, enforce_eager False" in told[0]
    assert "device cpu, dtype float32" in told[1]
    assert not any(word in told[2] for word in ("device", "dtype", "enforce_eager"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "no report of casa bench"),
        (json.dumps(GOOD | {"format": "other"}), "no report of casa bench"),
        (json.dumps(GOOD | {"version": 2}), "measure again"),
        (json.dumps(GOOD | {"runs": []}), "measure again"),
        (json.dumps(GOOD | {"runs": [{"name": "a"}]}), "measure again"),
        (json.dumps(GOOD | {"runs": [RUN | {"rows": "many"}]}), "measure again"),
    ],
)
def test_what_is_no_report_is_refused(text, sentence, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_report(path)


def test_reports_of_different_workloads_are_not_put_together(tmp_path, capsys):
    paths = []
    for name in ("stream", "chat"):
        paths.append(str(tmp_path / f"{name}.json"))
        (tmp_path / f"{name}.json").write_text(json.dumps(GOOD | {"workload": name}))
    assert main(["report", *paths, "--output", str(tmp_path / "both")]) == 1
    assert "the reports are of stream, chat" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none.json"), "--output", str(tmp_path / "both")]) == 1
    assert not list(tmp_path.glob("both*"))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--api-key", "sk-1", "--turns", "2"], ["--api-key", "...", "--turns", "2"]),
        (["--api-key=sk-1"], ["--api-key=..."]),
        (["--api-k", "sk-1"], ["--api-k", "..."]),
        (["--ap=sk-1"], ["--ap=..."]),
        (["--", "x", "--apple", "y"], ["--", "x", "--apple", "y"]),
    ],
)
def test_no_report_holds_a_key(given, kept):
    assert without_key(given) == kept
