"""`casa-digits-video`: a video of handwritten digits that change every few seconds, and a file with the times.

Every frame is a grid of 4x8 cells (224x112 px, the most that casa-tiny-digits looks at), enlarged for people by a
whole number: the processor shrinks it back, so the model sees digits of 22 to 28 px. The digits are held-out ones.
Two neighbouring scenes never show the same text, and the truth beside the video has one span for each scene:

    scene   |  3   7     |   1      |  9  9 2       |
    time    0 s         3.4        6.1             9.9 s      [{"start": 0.0, "end": 3.4, "text": "3 7"}, ...]
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from casa_digits.data import DigitImage, Grid, draw_image, load_samples
from casa_engine.atomic_files import publish, staged_beside

GRID = Grid(rows=4, columns=8)
HOLD_S = (2.0, 6.0)
MAX_SCALE = 10
# FFmpeg's numbers for what browsers assume where a file does not specify it.
BT709, LIMITED_RANGE = 1, 1
# 4:2:0 keeps one colour for four pixels: enlarged frames lose nothing of it that the model would see.
ENCODERS = {
    ".mp4": ("libx264", {"crf": "18", "preset": "veryfast"}),
    ".webm": ("libvpx-vp9", {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6"}),
}
# The index in front, so that a browser can play while it loads.
CONTAINER_OPTIONS = {".mp4": {"movflags": "faststart"}}


@dataclass(frozen=True)
class Span:
    """What can be read from `start` until `end`, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Scene:
    """One image and for how many frames it is shown."""

    image: DigitImage
    num_frames: int


def draw_scenes(rng: np.random.Generator, num_frames: int, fps: int) -> list[Scene]:
    """Draw scenes of `HOLD_S` seconds each that fill `num_frames`; the last one may be shorter."""
    samples = load_samples(held_out=True)
    shortest, longest = round(HOLD_S[0] * fps), round(HOLD_S[1] * fps)
    scenes: list[Scene] = []
    while num_frames > 0:
        image = draw_image(rng, samples, GRID)
        if scenes and image.text == scenes[-1].image.text:
            continue
        held = min(num_frames, int(rng.integers(shortest, longest + 1)))
        scenes.append(Scene(image, held))
        num_frames -= held
    return scenes


def caption_spans(scenes: list[Scene], fps: int) -> list[Span]:
    """Return the truth about scenes shown at `fps`."""
    ends = np.cumsum([scene.num_frames for scene in scenes])
    return [
        Span(round((end - scene.num_frames) / fps, 6), round(end / fps, 6), scene.image.text)
        for scene, end in zip(scenes, ends.tolist(), strict=True)
    ]


def frames(
    scenes: list[Scene], scale: int = 1, noise: float = 0.0, rng: np.random.Generator | None = None
) -> Iterator[np.ndarray]:
    """Yield every frame in turn, uint8 (112 * scale, 224 * scale, 3).

    Args:
        scenes: What is shown.
        scale: How often the 224x112 px are enlarged.
        noise: Standard deviation of a sensor's grain, in steps of 255.
        rng: Source of the grain.
    """
    rng = rng or np.random.default_rng(0)
    for scene in scenes:
        image = scene.image.to_pil()
        enlarged = np.asarray(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC))
        for _ in range(scene.num_frames):
            yield with_grain(rng, enlarged, noise) if noise else enlarged


def with_grain(rng: np.random.Generator, pixels: np.ndarray, noise: float) -> np.ndarray:
    """Add normal noise to every value of uint8 pixels."""
    grain = rng.standard_normal(pixels.shape, np.float32) * noise
    return np.clip(pixels + grain + 0.5, 0, 255).astype(np.uint8)


def write_video(path: Path, pictures: Iterator[np.ndarray], fps: int) -> None:
    """Write H.264 in MP4 or VP9 in WebM, by the suffix, in the form that every browser plays.

    Args:
        path: Where to; ends in .mp4 or .webm.
        pictures: uint8 (H, W, 3), all of one size, both sides even.
        fps: Frames a second.
    """
    av = import_av()
    encoder, options = ENCODERS[path.suffix.lower()]
    first = next(pictures)
    with av.open(str(path), "w", container_options=CONTAINER_OPTIONS.get(path.suffix.lower(), {})) as container:
        stream = container.add_stream(encoder, rate=fps, options=options)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.colorspace = stream.color_primaries = stream.color_trc = BT709
        stream.color_range = LIMITED_RANGE
        for number, pixels in enumerate(chain([first], pictures)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE)
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def import_av() -> ModuleType:
    """Import PyAV, which only videos need.

    Raises:
        ImportError: it is missing.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "videos are written with PyAV, which is not installed: pip install 'casa-engine[digits]'"
        ) from error
    return av


def make_video(path: Path, seconds: float, fps: int, seed: int = 0, scale: int = 1, noise: float = 0.0) -> list[Span]:
    """Write a video, and the truth beside it as .json; return the truth."""
    scenes_rng, noise_rng = np.random.default_rng(seed).spawn(2)
    scenes = draw_scenes(scenes_rng, max(1, round(seconds * fps)), fps)
    truth = caption_spans(scenes, fps)
    truth_path = path.with_suffix(".json")
    with staged_beside(path) as video, staged_beside(truth_path) as texts:
        write_video(video, frames(scenes, scale, noise, noise_rng), fps)
        texts.write_text(json.dumps([asdict(span) for span in truth], indent=1) + "\n")
        publish({video: path, texts: truth_path})
    return truth


def read_truth(path: Path) -> list[Span]:
    """Read what `make_video` wrote beside the video."""
    return [Span(**span) for span in json.loads(path.read_text())]


def build_parser(program: str = "casa-digits-video") -> argparse.ArgumentParser:
    """Return the parser; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=program, description="Writes a video of handwritten digits.")
    parser.add_argument("video", type=Path, help="OUT.mp4 (H.264) or OUT.webm (VP9); the truth goes to OUT.json")
    parser.add_argument("--seconds", type=float, default=60.0, help="length (%(default)s)")
    parser.add_argument("--fps", type=int, default=10, help="frames a second, 1 to 60 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another number, another video (%(default)s)")
    parser.add_argument("--scale", type=int, default=4, help=f"224x112 px times this, 1 to {MAX_SCALE} (%(default)s)")
    parser.add_argument("--noise", type=float, default=0.0, help="grain like a camera's, 0 to 20 (%(default)s)")
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with status 2 and an error message where an option is invalid."""
    if options.video.suffix.lower() not in ENCODERS:
        parser.error(f"{str(options.video)!r} ends in {options.video.suffix!r}; expected .mp4 or .webm")
    if not options.video.parent.is_dir():
        parser.error(f"the folder {str(options.video.parent)!r} does not exist; make it first")
    limits = {
        "seconds": (0.1, 86_400.0),
        "fps": (1, 60),
        "scale": (1, MAX_SCALE),
        "noise": (0.0, 20.0),
        "seed": (0, 2**63),
    }
    for name, (smallest, largest) in limits.items():
        if not smallest <= getattr(options, name) <= largest:
            parser.error(f"--{name} is {getattr(options, name)}; expected {smallest} to {largest}")


def main(arguments: list[str] | None = None, program: str = "casa-digits-video") -> int:
    """Run the command; return the exit status. `program` is its name in messages."""
    parser = build_parser(program)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        truth = make_video(options.video, options.seconds, options.fps, options.seed, options.scale, options.noise)
    except (ImportError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    print(f"{options.video}: {truth[-1].end:g} s, {len(truth)} scenes; truth in {options.video.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
