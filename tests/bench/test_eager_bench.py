"""`casa bench` with the eager model: what it counts is what the cache must hold, whatever the clock says."""

import json
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from casa_bench.cli import WORKLOADS, main
from casa_bench.report import read_report
from casa_bench.stream import STREAM
from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config
from originals import candidate_names, original_model, write_original
from web import site

TURNS, SIDE_PX = 12, 112
IMAGE_TOKENS = (SIDE_PX // 28) ** 2
# Of tiny-llama: keys and values, one head of 32 values of 4 bytes, in 3 layers.
TOKEN_BYTES = 2 * 32 * 4 * 3
# Of a turn: 15 forwarded tokens of 16, the stop token, two delimiters.
TURN_TOKENS = 18


def bench(tmp_path, *arguments):
    """Run `casa bench`; return its report, or the exit status where there is none."""
    prefix = tmp_path / "report"
    status = main([*map(str, arguments), "--output", str(prefix)])
    return read_report(prefix.with_suffix(".json")) if status == 0 else status


def stream(tmp_path, folder, *options):
    """Run the published workload, small; return its run."""
    size = ("--turns", TURNS, "--image-size", SIDE_PX)
    (run,) = bench(tmp_path, "stream", folder, "--backend", "eager", *size, *options)["runs"]
    return run


def test_a_fresh_stream_beside_a_long_one_keeps_its_own(checkpoint, tmp_path):
    rows = stream(tmp_path, checkpoint("ca"), "--paired-turns", 2)["rows"]
    assert [row["turn"] for row in rows] == list(range(TURNS + 2))
    kept = [row["kv_tokens"] for row in rows]
    assert [after - before for before, after in pairwise(kept)] == [TURN_TOKENS] * (TURNS + 1)
    fresh = [row["fresh"] for row in rows if "fresh" in row]
    assert [(row["turn"], row["kv_tokens"]) for row in fresh] == list(enumerate(kept[:2]))


@pytest.mark.parametrize(
    ("fusion", "tokens", "text_caches"), [("ca", TURN_TOKENS, 1), ("ca_tv", TURN_TOKENS, 2), ("insertion", 34, 1)]
)
def test_a_stream_holds_what_its_fusion_keeps(fusion, tokens, text_caches, checkpoint, tmp_path, capsys):
    run = stream(tmp_path, checkpoint(fusion))
    rows = run["rows"]
    assert [row["turn"] for row in rows] == list(range(TURNS))
    assert {row["tokens"] for row in rows} == {16}
    kept = [row["kv_tokens"] for row in rows]
    assert [after - before for before, after in pairwise(kept)] == [tokens] * (TURNS - 1)
    window = 0 if fusion == "insertion" else IMAGE_TOKENS
    assert [row["kv_bytes"] for row in rows] == [(text_caches * each + window) * TOKEN_BYTES for each in kept]
    for name in ("ttft_ms", "decode_ms", "prepare_ms", "cpu_ms", "memory_bytes", "tokens_per_s"):
        assert all(row[name] > 0 for row in rows), name

    printed, report = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert report in printed
    header, _, line, *_ = report.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", "fusion", "backend", *STREAM.columns]
    assert line.startswith(f"| {fusion} | {fusion} | eager | {TURNS} | ")
    assert f"| {kept[-1]:,} | {rows[-1]['kv_bytes']:,} |" in line
    assert "| CASA-Helium1-VL-2B | 256 | 64 -> 64 | 59.2 -> 58.9 | 4,629 | 6.4 |" in report
    plot = (tmp_path / "report.svg").read_text()
    assert plot.startswith("<svg ")
    assert plot.count("<polyline") == 4


def test_a_report_says_what_was_measured_and_on_what(checkpoint, tmp_path):
    run = stream(tmp_path, checkpoint("ca"), "--api-key", "secret", "--name", "mine")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["format"], report["version"], report["workload"]) == ("casa-bench", 1, "stream")
    assert (run["name"], run["backend"], run["complete"]) == ("mine", "eager", True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert run["about"] == {"fusion": "ca", "device": device, "dtype": "float32"}
    assert run["settings"]["turns"] == TURNS
    assert {"python", "casa-engine", "torch", "transformers"} <= set(run["versions"])
    assert {"cpu", "cores", "memory"} <= set(run["machine"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", run["date"])
    assert "--turns 12" in run["command"]
    for path in tmp_path.iterdir():
        assert "secret" not in path.read_text()


def test_auto_is_the_dtype_of_the_checkpoint(tmp_path, capsys):
    write_random_checkpoint(preset_config("tiny-llama", fusion="ca"), tmp_path / "ca", dtype=torch.bfloat16)
    run = stream(tmp_path, tmp_path / "ca", "--turns", 2)
    assert run["about"]["dtype"] == "bfloat16"
    row = run["rows"][-1]
    assert row["kv_bytes"] == (row["kv_tokens"] + IMAGE_TOKENS) * TOKEN_BYTES // 2
    assert f"device {run['about']['device']}, dtype bfloat16" in capsys.readouterr().out
    run = stream(tmp_path, tmp_path / "ca", "--turns", 2, "--dtype", "float32")
    assert run["about"]["dtype"] == "float32"


def test_reports_are_put_together_in_their_order(checkpoint, tmp_path):
    for fusion in ("ca", "insertion"):
        (tmp_path / fusion).mkdir()
        stream(tmp_path / fusion, checkpoint(fusion))
    paths = [str(tmp_path / fusion / "report.json") for fusion in ("ca", "insertion")]
    assert main(["report", *paths, "--output", str(tmp_path / "both")]) == 0
    both = read_report(tmp_path / "both.json")
    assert [run["about"]["fusion"] for run in both["runs"]] == ["ca", "insertion"]
    assert (tmp_path / "both.svg").read_text().count("<polyline") == 8
    assert (tmp_path / "both.md").read_text().count("| eager |") == 2


def test_chat_and_reuse_on_the_eager_model(checkpoint, tmp_path):
    folder, size = checkpoint("ca"), ("--image-size", SIDE_PX, "--tokens", 4, "--backend", "eager")
    (run,) = bench(tmp_path, "chat", folder, *size, "--concurrency", 1, "--turns", 3)["runs"]
    assert [row["turn"] for row in run["rows"]] == [0, 1, 2]
    assert all(0 < row["ttft_ms"][0] < row["total_ms"][0] < 1000 * row["seconds"] for row in run["rows"])
    assert run["summary"]["concurrency"] == 1
    (run,) = bench(tmp_path, "reuse", folder, *size, "--images", 2, "--questions", 3)["runs"]
    assert [len(row["ttft_ms"]) for row in run["rows"]] == [3, 3]
    summary = run["summary"]
    assert summary["second_of_first"] == pytest.approx(summary["second_ms"] / summary["first_ms"])


def test_what_was_measured_is_kept_when_it_is_interrupted(checkpoint, tmp_path):
    command = [Path(sys.executable).parent / "casa-bench", "stream", checkpoint("ca"), "--backend", "eager"]
    size = ["--turns", "10000", "--image-size", str(SIDE_PX), "--output", "kept"]
    with subprocess.Popen([*command, *size], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("stream: 3 of"):
                break
        process.send_signal(signal.SIGINT)
        words = process.stderr.read()
    assert process.returncode == 1
    assert "casa-bench: interrupted." in words
    assert "Traceback" not in words
    (run,) = read_report(tmp_path / "kept.json")["runs"]
    assert run["complete"] is False
    assert 3 <= len(run["rows"]) < 10_000
    assert "ca (interrupted)" in (tmp_path / "kept.md").read_text()


MISTAKES = [
    (["stream", "CA", "--backend", "endpoint"], "expected the address of a server"),
    (["stream", "http://127.0.0.1:9/v1", "--backend", "eager"], "expected a checkpoint's folder"),
    (["stream", "http://127.0.0.1:9/v1", "--turns", "2"], "does not answer as an OpenAI-compatible server does"),
    (["stream", "http://127.0.0.1:9/v1", "--turns", "512"], "show fewer or smaller images"),
    (["stream", "ftp://127.0.0.1", "--turns", "2"], "is not the address of a server"),
    (["chat", "CA", "--backend", "eager", "--concurrency", "2"], "answers one conversation at a time"),
    (["live", "CA"], "start casa serve"),
    (["live", "http://127.0.0.1:9", "--seconds", "1"], "cannot be used"),
    (["live", "http://127.0.0.1:9", "--load", "vss", "--seconds", "9.9"], "asks its first question after 10 s"),
    (["stream", "nowhere", "--backend", "eager"], "has no config.json"),
    (["stream", "nowhere"], "does not exist"),
    (["stream", "CA", "--output", "no/such/folder"], "make it first"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence(arguments, sentence, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [str(checkpoint("ca")) if word == "CA" else word for word in arguments]
    assert main(given, "casa bench") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("casa bench: ")]
    assert sentence in line
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_a_model_is_told_by_the_option_that_there_is(tmp_path, capsys):
    with site() as empty:
        empty.bodies["/v1/models"] = b'{"data": []}'
        assert main(["stream", empty.url("/v1"), "--turns", "2", "--output", str(tmp_path / "none")]) == 1
    assert "lists no model; expected one: name it with --served-model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--turns", "1"],
        ["--turns", "10001"],
        ["--turns", "ten"],
        ["--tokens", "1"],
        ["--image-size", "27"],
        ["--image-size", "100000"],
        ["--kv-cache-gib", "nan"],
        ["--backend", "other"],
    ],
)
def test_work_is_bounded_before_it_begins(options, capsys):
    with pytest.raises(SystemExit) as left:
        main(["stream", "nowhere", *options])
    assert left.value.code == 2
    assert f"error: argument {options[0]}: " in capsys.readouterr().err


def test_every_workload_explains_itself(capsys):
    for name, workload in WORKLOADS.items():
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        assert workload.summary in capsys.readouterr().out


def test_an_original_is_measured_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_original(original_model("helium"), "helium", tmp_path / "original", candidate_names("helium"))
    before = sorted(folder.iterdir())
    assert len(stream(tmp_path, folder)["rows"]) == TURNS
    # Nothing is written beside it, and its own code, which would write there, is not run.
    assert sorted(folder.iterdir()) == before
