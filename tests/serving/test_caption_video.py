"""Frames of files, downloads and cameras: the right one at each moment, upright, from where one may read."""

import asyncio
import os
import time
from fractions import Fraction
from io import BytesIO
from itertools import pairwise

import av
import numpy as np
import pysubs2
import pytest
from PIL import Image

from casa_engine.errors import InputError
from casa_serving.caption.burn import burn
from casa_serving.caption.camera import Camera
from casa_serving.caption.captioners import encode, fit, live_url
from casa_serving.caption.download import download
from casa_serving.caption.subtitles import MAX_CAPTION_S, subtitles, write_subtitles
from casa_serving.caption.video import check_complete, sample, scan, upright_size
from casa_serving.live.protocol import Limits
from odd_videos import OddVideos, ffmpeg
from process_memory import peak_bytes, start_peak
from scripted_caption import frame_result
from web import site

CLOCK = Fraction(1, 1000)


@pytest.fixture(scope="module")
def odd_videos(tmp_path_factory):
    return OddVideos(tmp_path_factory.mktemp("odd"))


SUFFIXES = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4", ".gif": "gif"}


def shade(number):
    """A grey that tells which frame it is."""
    return 16 + 10 * (number % 20)


def write(path, times_ms, size=(64, 48)):
    """Frames of one grey each at the times given; the last one lasts as long as the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(SUFFIXES[path.suffix], rate=1000)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        stream.codec_context.time_base = CLOCK
        for number, moment in enumerate(times_ms):
            pixels = np.full((size[1], size[0], 3), shade(number), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = moment, CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(path, fps, max_seconds=None):
    """Which frame each sample shows."""
    samples = list(sample(scan(path), fps, max_seconds))
    assert [item.timestamp for item in samples] == [number / fps for number in range(len(samples))]
    return [round((np.asarray(item.image).mean() - 16) / 10) for item in samples]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_each_sample_shows_the_last_frame_that_has_begun(tmp_path, suffix):
    path = write(tmp_path / f"v{suffix}", [0, 400, 500, 1100, 1200, 1700, 1999])
    assert numbers(path, 2) == [0, 2, 2, 4]
    assert numbers(path, 4, max_seconds=1) == [0, 0, 2, 2]


def test_a_rate_above_the_videos_repeats_frames(tmp_path):
    path = write(tmp_path / "v.mp4", [0, 500, 1000])
    assert numbers(path, 4) == [0, 0, 1, 1, 2, 2]


def test_a_video_that_does_not_begin_at_zero(tmp_path):
    path = write(tmp_path / "v.mkv", [5000, 5500, 6000, 6500])
    assert scan(path).begin_s == 5.0
    assert numbers(path, 2)[:3] == [0, 1, 2]


@pytest.mark.parametrize(
    ("recipe", "late_s"),
    [
        ("late.mp4 -itsoffset 3 -i {v} -i {a} -map 0:v -map 1:a -c copy", 3.0),
        ("late.mkv -itsoffset 3 -i {v} -i {a} -map 0:v -map 1:a -c copy", 3.0),
        ("alone.mp4 -itsoffset 3 -i {v} -c copy", 3.0),
        ("sound.mp4 -i {v} -itsoffset 3 -i {a} -map 0:v -map 1:a -c copy", 0.0),
        ("early.mp4 -itsoffset -0.3 -i {v} -i {a} -map 0:v -map 1:a -c copy", 0.0),
        # The clock of a transport stream begins anywhere; it counts from its first picture or sound.
        ("far.ts -i {v} -c copy -output_ts_offset 26000", 0.0),
        ("far_late.ts -itsoffset 3 -i {v} -i {a} -map 0:v -map 1:a -c copy -output_ts_offset 26000", 3.0),
        ("wrap.ts -i {v} -c copy -output_ts_offset 95440", 0.0),
    ],
)
def test_how_late_a_video_begins(odd_videos, recipe, late_s):
    name, _, words = recipe.partition(" ")
    info = scan(odd_videos.make(name, words))
    assert info.late_s == pytest.approx(late_s, abs=0.1)
    assert not info.is_truncated
    duration_s = 3.7 if name == "early.mp4" else 4.0
    assert info.duration_s == pytest.approx(duration_s, abs=0.01)


def test_frames_without_a_time_are_taken(odd_videos):
    words = "-itsoffset -0.3 -i {v} -i {a} -map 0:v -map 1:a -c copy -avoid_negative_ts disabled"
    assert len(list(sample(scan(odd_videos.make("negative.mkv", words)), 2))) == 7


def test_a_short_video_gives_one_frame(tmp_path):
    assert numbers(write(tmp_path / "v.mp4", [0, 40]), 2) == [0]


def test_a_file_that_does_not_state_its_duration(tmp_path):
    """As browsers record it."""
    whole, live = write(tmp_path / "v.webm", list(range(0, 3000, 100))), tmp_path / "live.webm"
    ffmpeg("-i", whole, "-c", "copy", "-live", "1", live)
    info = scan(live)
    assert info.stated_end_s is None
    assert info.duration_s == pytest.approx(3.0, abs=0.11)
    assert len(list(sample(info, 2))) == len(list(sample(scan(whole), 2)))


@pytest.mark.parametrize("mirror", [[], ["-display_hflip"], ["-display_vflip"]], ids=["", "hflip", "vflip"])
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_frames_are_upright(tmp_path, turn, mirror):
    source, turned = tmp_path / "v.mp4", tmp_path / "turned.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=128x64:rate=10:duration=1", "-pix_fmt", "yuv420p", source)
    ffmpeg("-display_rotation", turn, *mirror, "-i", source, "-c", "copy", turned)
    expected = tmp_path / "expected.png"  # ffmpeg turns by itself.
    ffmpeg("-i", turned, "-frames:v", "1", expected)
    with av.open(str(expected)) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    seen = next(sample(scan(turned), 2)).image
    assert np.asarray(seen).shape == picture.shape
    assert np.abs(np.asarray(seen) - picture).mean() < 4
    assert upright_size(turned) == ((64, 128) if turn % 180 else (128, 64))


def test_colours_follow_the_matrix_that_the_file_names(tmp_path):
    for matrix in ("bt709", "smpte170m"):
        path = tmp_path / f"{matrix}.mp4"
        source = f"color=c=0xC83214:size=64x64:rate=10:duration=1,scale=out_color_matrix={matrix}"
        ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-colorspace", matrix, path)
        assert np.asarray(next(sample(scan(path), 2)).image)[32, 32] == pytest.approx([200, 50, 20], abs=4)


def test_memory_does_not_grow_with_the_video(tmp_path):
    path = tmp_path / "long.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=320x240:rate=10:duration=240", "-preset", "ultrafast", path)
    frames = sample(scan(path), 2)
    for _ in range(40):
        next(frames)
    start_peak(os.getpid())
    before = peak_bytes(os.getpid())
    assert sum(1 for _ in frames) == 440
    # All frames would be 550 MB.
    assert peak_bytes(os.getpid()) - before < 30_000_000


def test_a_truncated_video_may_be_taken_as_far_as_it_goes(tmp_path):
    whole = write(tmp_path / "v.mkv", list(range(0, 20_000, 100)))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    info = scan(cut)
    assert info.is_truncated
    with pytest.raises(InputError, match=r"truncated.*--max-seconds"):
        check_complete(info, None)
    check_complete(info, 5.0)
    assert len(list(sample(info, 2, 5.0))) == 10
    assert not scan(whole).is_truncated


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{video}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{video}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_files_that_name_other_files_are_not_followed(tmp_path, text):
    video = write(tmp_path / "v.mp4", [0, 500])
    for name in ("list.mp4", "list.m3u8", "list.txt", "list.sdp"):
        path = tmp_path / name
        path.write_text(text.format(video=video))
        with pytest.raises(InputError, match="is not a video that can be read"):
            scan(path)


class TestDownload:
    @pytest.fixture
    def videos(self, tmp_path):
        with site() as server:
            server.bodies["/v.mp4"] = write(tmp_path / "v.mp4", [0, 500, 1000]).read_bytes()
            server.redirects["/moved"] = server.url("/v.mp4", "localhost")
            yield server

    def get(self, url, folder, domains=("127.0.0.1", "localhost"), max_bytes=1_000_000, allow_loopback=True):
        return asyncio.run(download(url, list(domains), folder, max_bytes=max_bytes, allow_loopback=allow_loopback))

    def test_a_video_comes_whole(self, videos, tmp_path):
        path = self.get(videos.url("/moved"), tmp_path)
        assert path.read_bytes() == videos.bodies["/v.mp4"]
        assert path.parent == tmp_path

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"domains": ["127.0.0.1"]}, "The video's URL is refused: the host 'localhost' is not an allowed domain"),
            ({"allow_loopback": False}, "private, link-local, loopback"),
            ({"max_bytes": 100}, r"larger than 100 bytes \(--max-download-bytes\)"),
        ],
    )
    def test_the_rules_for_images_hold(self, videos, tmp_path, options, words):
        with pytest.raises(InputError, match=words):
            self.get(videos.url("/moved"), tmp_path, **options)

    @pytest.mark.parametrize(
        ("url", "words"), [("/none", "HTTP status 404"), ("http://127.0.0.1:9/", "connection or the answer broke")]
    )
    def test_what_cannot_be_had_is_said(self, videos, tmp_path, url, words):
        with pytest.raises(InputError, match=f"could not be downloaded .*{words}"):
            self.get(url if "://" in url else videos.url(url), tmp_path)


class TestCamera:
    """FFmpeg's test picture in the place of a camera; the kind of device is the only thing that differs."""

    def test_late_moments_are_skipped_and_the_newest_frame_is_shown(self):
        with Camera("testsrc=size=64x48:rate=20,realtime", "lavfi") as camera:
            begin = time.monotonic()
            times = []
            for item in camera.samples(fps=5, max_seconds=2):
                assert item.image.size == (64, 48)
                assert time.monotonic() - begin - item.timestamp < 0.5
                times.append(item.timestamp)
                if len(times) == 2:
                    time.sleep(1.0)  # A slow model.
        assert len(times) <= 7
        assert all(after > before for before, after in pairwise(times))

    def test_a_camera_that_ends_is_an_error(self):
        with (
            Camera("testsrc=size=64x48:rate=20:duration=0.5,realtime", "lavfi") as camera,
            pytest.raises(InputError, match="delivers no more frames"),
        ):
            list(camera.samples(fps=5))


def test_a_caption_stands_until_the_next_one_but_not_for_ever():
    records = [frame_result(0.0, "a"), frame_result(0.5, ""), frame_result(1.5, "b"), frame_result(30.0, "c")]
    events = list(subtitles(records, end_s=31.0))
    assert [(event.start, event.end) for event in events] == [
        (0, 1500),
        (1500, 1500 + MAX_CAPTION_S * 1000),
        (30_000, 31_000),
    ]


@pytest.mark.parametrize("suffix", ["srt", "vtt", "ass"])
def test_words_are_never_markup(tmp_path, suffix):
    words = "1 --> 2 {b} <i>c</i>\n\n\\N d & e"
    write_subtitles(subtitles([frame_result(0.0, words), frame_result(1.0, "f")], 2.0), tmp_path / f"x.{suffix}")
    events = list(pysubs2.load(str(tmp_path / f"x.{suffix}")))
    assert [event.plaintext for event in events] == ["1 --\u203a 2 (b) \u2039i\u203ac\u2039/i\u203a /N d & e", "f"]


def test_a_frame_is_sent_without_loss_where_that_is_small_enough():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert encode(picture, 100_000).startswith(b"\x89PNG")
    small = encode(picture, 1000)
    assert small.startswith(b"\xff\xd8")
    assert len(small) <= 1000


@pytest.mark.parametrize(
    ("size", "limits", "sent"),
    [
        ((8192, 4096), {}, (5792, 2896)),
        ((20_000, 400), {}, (16_384, 327)),
        ((640, 480), {}, (640, 480)),
        ((640, 480), {"max_frame_pixels": 76_800}, (320, 240)),
    ],
)
def test_a_frame_is_scaled_to_what_the_server_takes(size, limits, sent):
    taken = Limits(max_frame_bytes=20_000_000, idle_timeout_s=60, max_sessions=1, **limits)
    assert Image.open(BytesIO(fit(Image.new("RGB", size), taken))).size == sent


@pytest.mark.parametrize("name", ["late_alone.mp4", "wide_pixels.mp4", "cover_first.mp4", "hflip.mp4"])
def test_captions_are_burned_in_where_they_stand(odd_videos, tmp_path, name):
    video = odd_videos.make(name)
    info = scan(video)
    captions = subtitles([frame_result(info.late_s + 1.0, "MMMMMM")], info.late_s + 2.0)
    burn(info, captions, tmp_path / "burned.mp4")
    before, after = (
        [np.asarray(item.image.crop((0, 90, *item.image.size)), int) for item in sample(scan(path), 2)]
        for path in (video, tmp_path / "burned.mp4")
    )
    differs = [np.abs(one - other).mean() > 4 for one, other in zip(before, after, strict=True)]
    assert differs == [False, False, True, True, False, False, False, False]
    assert [path.name for path in tmp_path.iterdir()] == ["burned.mp4"]


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("http://a:8000", "ws://a:8000/v1/live"),
        ("https://a/", "wss://a/v1/live"),
        ("ws://a/proxy/v1/live", "ws://a/proxy/v1/live"),
    ],
)
def test_a_server_may_be_named_by_any_of_its_addresses(server, url):
    assert live_url(server) == url
