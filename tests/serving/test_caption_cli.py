"""`casa-caption`: a video's captions are right and in valid files, and what cannot be is said in a sentence."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import av
import numpy as np
import pysubs2
import pytest

from casa_digits.video import make_video, read_truth
from casa_serving.caption import cli as caption_cli
from casa_serving.caption.captioners import block_sigint_in_children
from casa_serving.caption.cli import main
from odd_videos import OddVideos
from scripted_caption import scripted
from serving_process import ENVIRONMENT

ROOT = Path(__file__).parents[2]
CASA_CAPTION = Path(sys.executable).parent / "casa-caption"
SECONDS, FPS = 20, 2
# Of a frame, as docs/live.md names them.
LINE = ["timestamp", "caption", "tokens", "ttft_ms", "delay_ms", "text_tokens", "image_pages"]
LIMIT_S = 900  # Most of it is the start of the engine, on a machine that others use too.


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """A video of digits with its truth."""
    path = tmp_path_factory.mktemp("video") / "digits.mp4"
    make_video(path, SECONDS, 10, seed=1, scale=2)
    return path


@pytest.fixture(scope="session")
def captioned(video, tmp_path_factory):
    """What the real command writes about it, in process, all formats and the burned copy."""
    folder = tmp_path_factory.mktemp("captions")
    run = subprocess.run(
        [CASA_CAPTION, video, "--output", folder / "out", "--burn", folder / "burned.mp4"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert run.returncode == 0, run.stderr
    assert "40 frames" in run.stdout
    return folder


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def accuracy(truth, lines):
    """The acceptance benchmark's own count."""
    spec = importlib.util.spec_from_file_location("caption_accuracy", ROOT / "benchmarks" / "caption_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.compare(read_truth(truth), [(line["timestamp"], line["caption"]) for line in lines])


@pytest.mark.vllm
class TestInProcess:
    def test_the_captions_are_right(self, video, captioned):
        counts = accuracy(video.with_suffix(".json"), read_lines(captioned / "out.jsonl"))
        assert counts.changes >= 5
        assert counts.caught >= counts.changes - 1
        assert counts.repeated <= 1

    def test_every_frame_has_a_line(self, captioned):
        lines = read_lines(captioned / "out.jsonl")
        assert [line["timestamp"] for line in lines] == [number / FPS for number in range(SECONDS * FPS)]
        for line in lines:
            assert list(line) == LINE
            assert 0 < line["ttft_ms"] <= line["delay_ms"]
            assert line["tokens"] >= 1
            assert line["image_pages"] > 0
        assert lines[-1]["image_pages"] == lines[0]["image_pages"]

    @pytest.mark.parametrize("suffix", ["srt", "vtt"])
    def test_subtitles_are_valid_and_say_the_same(self, captioned, suffix):
        spoken = [line for line in read_lines(captioned / "out.jsonl") if line["caption"]]
        events = list(pysubs2.load(str(captioned / f"out.{suffix}"), format_=suffix))
        assert [event.plaintext for event in events] == [line["caption"] for line in spoken]
        assert [event.start for event in events] == [round(1000 * line["timestamp"]) for line in spoken]
        assert all(event.start < event.end for event in events)
        assert events[-1].end == SECONDS * 1000
        assert (captioned / "out.vtt").read_text().startswith("WEBVTT\n")

    def test_the_burned_copy_is_as_long_and_differs_where_the_captions_stand(self, video, captioned):
        before, after = pictures(video), pictures(captioned / "burned.mp4")
        assert len(before) == len(after) == SECONDS * 10
        difference = np.abs(before.astype(int) - after).mean(axis=(0, 2, 3))
        height = len(difference)
        # A box at the bottom; above it only what encoding anew changes.
        assert difference[int(height * 0.85) :].mean() > 10 * difference[: height // 2].mean()

    def test_nothing_else_is_left(self, captioned):
        assert sorted(path.name for path in captioned.iterdir()) == ["burned.mp4", "out.jsonl", "out.srt", "out.vtt"]


@pytest.mark.vllm
def test_a_server_says_the_same(server, video, captioned, tmp_path, capsys):
    # That server's session budget is the default one; the video is too short to reach it.
    assert main([str(video), "--server", server.url, "--output", str(tmp_path / "out"), "--formats", "jsonl"]) == 0
    alone, served = (read_lines(folder / "out.jsonl") for folder in (captioned, tmp_path))
    assert [line["caption"] for line in served] == [line["caption"] for line in alone]
    assert "40 frames" in capsys.readouterr().out


def pictures(path):
    """Every frame, (N, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_ctrl_c_writes_what_is_there(video, tmp_path, monkeypatch, capsys):
    def caption(sample):
        if sample.timestamp == 2.0:
            os.kill(os.getpid(), signal.SIGINT)
        return f"at {sample.timestamp:g}"

    scripted(monkeypatch, caption)
    prefix = tmp_path / "out"
    assert main([str(video), "--output", str(prefix), "--burn", str(tmp_path / "b.mp4")]) == 130
    lines = read_lines(tmp_path / "out.jsonl")
    assert 5 <= len(lines) < 40
    for suffix in ("srt", "vtt"):
        events = pysubs2.load(str(prefix.with_suffix(f".{suffix}")), format_=suffix)
        assert [event.plaintext for event in events] == [line["caption"] for line in lines]
    assert f"{len(lines)} frames" in capsys.readouterr().out
    assert not (tmp_path / "b.mp4").exists()


def test_ctrl_c_does_not_reach_processes_of_the_engine():
    with block_sigint_in_children():
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


def test_a_video_that_breaks_off_leaves_what_was_captioned(video, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, lambda sample: "x" if sample.timestamp < 3 else fail())
    assert main([str(video), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert len(read_lines(tmp_path / "out.jsonl")) == 6
    assert len(pysubs2.load(str(tmp_path / "out.srt"))) == 6
    assert capsys.readouterr().err == "casa-caption: no more\n"


def test_a_run_that_fails_leaves_what_was_there(video, tmp_path, monkeypatch, capsys):
    before = {}
    for name in ("out.jsonl", "out.srt", "out.vtt", "b.mp4", "out.part", "b.part.mp4"):
        before[name] = f"mine: {name}"
        (tmp_path / name).write_text(before[name])
    scripted(monkeypatch, lambda sample: "x" if sample.timestamp < 3 else fail())
    assert main([str(video), "--output", str(tmp_path / "out"), "--burn", str(tmp_path / "b.mp4"), "--quiet"]) == 1
    assert "no more" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_text() for name in before} == before
    added = {path.name for path in tmp_path.iterdir()} - set(before)
    assert added == {"out.partial.jsonl", "out.partial.srt", "out.partial.vtt"}
    assert len(read_lines(tmp_path / "out.partial.jsonl")) == 6


def test_a_run_that_never_begins_leaves_nothing(video, tmp_path, monkeypatch):
    scripted(monkeypatch, lambda sample: fail())
    assert main([str(video), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert not list(tmp_path.iterdir())


def test_all_files_agree_about_a_video_that_begins_late(tmp_path, monkeypatch):
    path = OddVideos(tmp_path).make("late.mp4")
    scripted(monkeypatch, lambda sample: f"at {sample.timestamp:g}")
    assert main([str(path), "--quiet"]) == 0
    times = [3.0 + number / FPS for number in range(8)]
    assert [line["timestamp"] for line in read_lines(tmp_path / "late.jsonl")] == times
    for suffix in ("srt", "vtt"):
        events = pysubs2.load(str(tmp_path / f"late.{suffix}"), format_=suffix)
        assert [event.start for event in events] == [1000 * moment for moment in times]
        assert events[-1].end == 7000


def fail():
    raise OSError("no more")


def test_silence_makes_empty_files_that_are_valid(video, tmp_path, monkeypatch):
    scripted(monkeypatch, lambda sample: "")
    burned = tmp_path / "burned.webm"
    options = ["--max-seconds", "3", "--quiet", "--burn", str(burned)]
    assert main([str(video), "--output", str(tmp_path / "out"), *options]) == 0
    assert len(read_lines(tmp_path / "out.jsonl")) == 6
    for suffix in ("srt", "vtt"):
        assert not pysubs2.load(str(tmp_path / f"out.{suffix}"), format_=suffix)
    assert len(pictures(burned)) == SECONDS * 10


def test_settings_reach_the_session(video, tmp_path, monkeypatch):
    seen = []

    @asynccontextmanager
    async def remember(checkpoint, settings):
        seen.append(settings)
        raise OSError("enough")
        yield

    monkeypatch.setattr(caption_cli, "engine_captioner", remember)
    words = ["--instruction", "Say it.", "--temperature", "0.5", "--seed", "7", "--fps", "4", "--quiet"]
    assert main([str(video), "--output", str(tmp_path / "out"), *words]) == 1
    (settings,) = seen
    assert (settings.instruction, settings.temperature, settings.seed, settings.fps) == ("Say it.", 0.5, 7, 4.0)
    # What is not named comes from the checkpoint.
    assert settings.max_frame_tokens == 16


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def folder(video, tmp_path, monkeypatch):
    """The working folder, with files of every kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.mp4").write_bytes(video.read_bytes())
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    (tmp_path / "head.mp4").write_bytes(video.read_bytes()[:40])
    (tmp_path / "words.txt").write_text("No video, but many words.\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_sound(tmp_path / "sound.m4a")
    (tmp_path / "folder.srt").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("none.mp4", "does not exist"),
        (".", "is not a file"),
        ("words.txt", "is not a video that can be read"),
        ("empty.mp4", "is not a video that can be read"),
        ("head.mp4", "has no video stream; found: nothing"),
        ("sound.m4a", "has no video stream; found: audio"),
        ("cut.mp4", "is truncated: its header says that it ends at 20.0 s"),
        ("good.mp4 --fps 0", "fps is 0.0; expected"),
        ("good.mp4 --fps nan", "fps is nan; expected"),
        ("good.mp4 --max-seconds 0", "--max-seconds is 0"),
        ("good.mp4 --temperature -1", "temperature is -1.0; expected"),
        ("good.mp4 --formats srt,doc", "--formats is 'srt,doc'; expected some of srt, vtt, jsonl"),
        ("good.mp4 --output none/out", "The folder 'none' does not exist"),
        ("good.mp4 --burn none/out.mp4", "The folder 'none' does not exist"),
        ("good.mp4 --output folder", "'folder.srt', which is to be written, is a folder"),
        ("good.mp4 --burn out.gif", "--burn ends in '.gif'"),
        ("good.mp4 --burn good.mp4", "--burn names the video itself"),
        ("good.mp4 --checkpoint none", "The checkpoint 'none' does not exist"),
        ("good.mp4 --checkpoint .", "config.json"),
        ("good.mp4 --server nonsense", "--server is 'nonsense'. Expected http"),
        ("good.mp4 --server http://127.0.0.1:9", "cannot be used"),
        ("/dev/no-such-camera", "The camera '/dev/no-such-camera' cannot be opened"),
        ("/dev/no-such-camera --burn out.mp4", "--burn needs a file or a URL"),
        ("http://elsewhere.test/v.mp4", "'elsewhere.test' is not an allowed domain"),
        ("ftp://elsewhere.test/v.mp4 --allowed-media-domains elsewhere.test", "expected http or https"),
        ("http://127.0.0.1/v.mp4 --allowed-media-domains 127.0.0.1", "private, link-local, loopback"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(folder, capsys, arguments, words):
    before = sorted(folder.iterdir())
    assert main(arguments.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("casa-caption: ")
    assert said.count("\n") == 1
    assert words in said
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("arguments", ["", "good.mp4 --fps many", "good.mp4 --server http://a:1 --checkpoint b", "a b"])
def test_a_command_line_that_makes_no_sense_ends_with_status_2(folder, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert "casa-caption: error: " in capsys.readouterr().err


def test_without_ffmpeg_burning_is_refused_at_once(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert main(["good.mp4", "--burn", "out.mp4"]) == 1
    assert "install ffmpeg, or pip install 'casa-engine[live]'" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "words"), [("av", "PyAV"), ("pysubs2", "pysubs2")])
def test_without_a_library_the_extra_is_named(folder, monkeypatch, capsys, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["good.mp4"]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "pip install 'casa-engine[live]'" in said
