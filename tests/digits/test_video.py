"""Generated videos: what they show is what their truth says, in a form that browsers play."""

import json
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image

from casa_digits.data import load_samples
from casa_digits.video import HOLD_S, caption_spans, draw_scenes, frames, main, make_video, read_truth

FPS = 10


def scenes(seconds, seed=0):
    return draw_scenes(np.random.default_rng(seed), seconds * FPS, FPS)


def test_scenes_fill_the_time_and_hold_as_long_as_they_should():
    drawn = scenes(60)
    held = [scene.num_frames / FPS for scene in drawn]
    assert sum(held) == 60
    assert all(HOLD_S[0] <= seconds <= HOLD_S[1] for seconds in held[:-1])
    texts = [scene.image.text for scene in drawn]
    assert all(before != after for before, after in pairwise(texts))


def test_all_digits_are_held_out_ones():
    held_out = load_samples(held_out=True)
    for scene in scenes(60):
        assert tuple(held_out.labels[scene.image.layout.samples]) == scene.image.digits


def test_spans_follow_each_other_without_a_gap():
    truth = caption_spans(scenes(20), FPS)
    assert truth[0].start == 0.0
    assert truth[-1].end == 20.0
    assert all(before.end == after.start for before, after in pairwise(truth))


def test_a_seed_gives_one_video_and_another_seed_another():
    assert caption_spans(scenes(20), FPS) == caption_spans(scenes(20), FPS)
    assert caption_spans(scenes(20), FPS) != caption_spans(scenes(20, seed=1), FPS)


def test_noise_is_in_every_frame_anew():
    drawn = scenes(2)
    still, noisy = list(frames(drawn)), list(frames(drawn, noise=3.0))
    assert np.array_equal(still[0], still[1])
    assert not np.array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0].astype(int) - still[0]).mean() < 5


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "h264"), ("v.webm", "vp9")])
def test_files_are_as_browsers_like_them(tmp_path, name, codec):
    make_video(tmp_path / name, 2.0, FPS, scale=2)
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name in (codec, f"lib{codec}", "libvpx-vp9")
        assert (stream.width, stream.height, stream.pix_fmt) == (448, 224, "yuv420p")
        assert stream.average_rate == Fraction(FPS)
        times = [float(frame.pts * frame.time_base) for frame in container.decode(stream)]
    assert times == pytest.approx([number / FPS for number in range(20)], abs=1e-3)


@pytest.mark.parametrize("name", ["v.mp4", "v.webm"])
def test_what_the_model_sees_is_what_was_drawn(tmp_path, name):
    """Encoded, decoded and shrunk, every frame is close to its scene; a wrong colour matrix would be seen at once."""
    make_video(tmp_path / name, 6.0, FPS, seed=3, scale=4)
    drawn = draw_scenes(np.random.default_rng(3).spawn(2)[0], 60, FPS)
    expected = [scene.image.pixels for scene in drawn for _ in range(scene.num_frames)]
    with av.open(str(tmp_path / name)) as container:
        for picture, frame in zip(expected, container.decode(video=0), strict=True):
            seen = np.asarray(frame.to_image().resize((224, 112), Image.Resampling.BICUBIC))
            assert np.abs(seen.astype(int) - picture).mean() < 3


def test_the_command_writes_video_and_truth(tmp_path, capsys):
    assert main([str(tmp_path / "v.mp4"), "--seconds", "5", "--scale", "1"]) == 0
    assert "5 s" in capsys.readouterr().out
    truth = read_truth(tmp_path / "v.json")
    assert truth[-1].end == 5.0
    assert set(json.loads((tmp_path / "v.json").read_text())[0]) == {"start", "end", "text"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["v.avi"], "expected .mp4 or .webm"),
        (["nowhere/v.mp4"], "does not exist"),
        (["v.mp4", "--fps", "0"], "--fps is 0; expected 1 to 60"),
        (["v.mp4", "--seconds", "-1"], "--seconds is -1.0"),
        (["v.mp4", "--seconds", "nan"], "--seconds is nan"),
        (["v.mp4", "--scale", "0"], "--scale is 0"),
    ],
)
def test_bad_options_are_named(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_pyav_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from casa_digits.video import main\n"
        f"sys.exit(main([{str(tmp_path / 'v.mp4')!r}, '--seconds', '1']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "pip install 'casa-engine[digits]'" in run.stderr
    assert "Traceback" not in run.stderr
