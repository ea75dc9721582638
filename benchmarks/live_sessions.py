"""Live sessions at once, over real WebSockets: delay of captions, dropped frames, tokens a second.

    casa-serve --port 8000 &
    python benchmarks/live_sessions.py [--sessions 1 2 4 8] [--seconds 40] [--plot docs/live_sessions.svg]

Every session shows a video of its own (held-out digits that change every few frames) at `--fps`, by
the clock and not by the answers: a server that is too slow drops frames, which are counted. The
sessions begin one after the other within the first frame's time, as clients do. The client shares
the machine with the server.
"""

import argparse
import asyncio
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from casa_digits.cases import draw_video
from casa_serving.live.client import DEFAULT_URL, LiveClient

WARMUP_FRAMES = 4  # Of every session, not counted.


@dataclass(frozen=True)
class Row:
    """What was measured with one number of sessions."""

    sessions: int
    delays_ms: list[float]
    dropped: int
    tokens: int
    seconds: float

    def percentile_ms(self, percent: int) -> float:
        """Of the delays from a frame's arrival to its caption's last token."""
        return float(np.percentile(self.delays_ms, percent))

    @property
    def dropped_share(self) -> float:
        """Of the frames that were sent."""
        return self.dropped / (self.dropped + len(self.delays_ms))


def encode(frame: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


async def show(url: str, files: list[bytes], fps: float, delay_s: float) -> tuple[list[float], int, int]:
    """Shows one video by the clock; returns delays, dropped frames and tokens after the warm-up."""
    async with LiveClient(url) as client:
        await client.create(fps=fps)
        await asyncio.sleep(delay_s)
        start = asyncio.get_running_loop().time()
        for number, file in enumerate(files):
            await asyncio.sleep(max(0.0, start + number / fps - asyncio.get_running_loop().time()))
            await client.send_frame(file, number / fps)
        await client.stop()
        events = [event async for event in client.events()]
    counted = [event for event in events if getattr(event, "frame", -1) >= WARMUP_FRAMES]
    done = [event for event in counted if event.type == "frame.done"]
    dropped = sum(event.type == "frame.dropped" for event in counted)
    return [event.delay_ms for event in done], dropped, sum(event.num_tokens for event in done)


async def measure(url: str, num_sessions: int, fps: float, seconds: float) -> Row:
    num_frames = WARMUP_FRAMES + round(seconds * fps)
    videos = [draw_video(np.random.default_rng(seed), num_frames).frames for seed in range(num_sessions)]
    files = [[encode(frame) for frame in video] for video in videos]
    stagger_s = 1 / fps / num_sessions
    shown = await asyncio.gather(*(show(url, video, fps, i * stagger_s) for i, video in enumerate(files)))
    delays = [delay for result in shown for delay in result[0]]
    return Row(num_sessions, delays, sum(r[1] for r in shown), sum(r[2] for r in shown), seconds)


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| sessions | frames | p50, ms | p95, ms | p50 against one session | dropped | tokens/s |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = row.percentile_ms(50) / rows[0].percentile_ms(50)
        lines.append(
            f"| {row.sessions} | {len(row.delays_ms) + row.dropped} | {row.percentile_ms(50):.0f} | "
            f"{row.percentile_ms(95):.0f} | {ratio:.2f}x | {row.dropped} ({row.dropped_share:.1%}) | "
            f"{row.tokens / row.seconds:.1f} |"
        )
    return lines


def plot(rows: list[Row], fps: float) -> str:
    """The delays as bars, p50 dark and p95 light, with a line at the time between two frames."""
    width, height, left, bottom = 560, 300, 60, 40
    interval_ms = 1000 / fps
    top_ms = max(interval_ms, *(row.percentile_ms(95) for row in rows)) * 1.15
    slot = (width - left - 20) / len(rows)

    def y(ms: float) -> float:
        return height - bottom - ms / top_ms * (height - bottom - 30)

    def text(x: float, at: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.0f}" y="{at:.0f}" text-anchor="{anchor}">{escape(words)}</text>'

    def bar(x: float, ms: float, colour: str) -> str:
        base = height - bottom
        return f'<rect x="{x:.0f}" y="{y(ms):.0f}" width="{slot / 4:.0f}" height="{base - y(ms):.0f}" fill="{colour}"/>'

    parts = [text(left, 18, f"Delay of a caption at {fps:g} frames a second: p50 (dark), p95 (light), ms", "start")]
    for i, row in enumerate(rows):
        middle = left + (i + 0.5) * slot
        for x, ms, colour in (
            (middle - slot / 4, row.percentile_ms(50), "#1f4e79"),
            (middle, row.percentile_ms(95), "#9dc3e6"),
        ):
            parts += [bar(x, ms, colour), text(x + slot / 8, y(ms) - 4, f"{ms:.0f}")]
        parts.append(text(middle, height - 22, f"{row.sessions} session{'s' if row.sessions > 1 else ''}"))
        parts.append(text(middle, height - 6, f"{row.dropped} dropped"))
    at = y(interval_ms)
    parts.append(
        f'<line x1="{left}" x2="{width - 20}" y1="{at:.0f}" y2="{at:.0f}" stroke="#c00" stroke-dasharray="4"/>'
    )
    parts.append(text(left - 6, at + 4, f"{interval_ms:.0f}", "end"))
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


async def run(options: argparse.Namespace) -> list[Row]:
    rows = []
    for num_sessions in options.sessions:
        rows.append(await measure(options.url, num_sessions, options.fps, options.seconds))
        print(table(rows)[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    options = parser.parse_args()
    rows = asyncio.run(run(options))
    print("\n".join(table(rows)))
    if options.plot:
        options.plot.write_text(plot(rows, options.fps))


if __name__ == "__main__":
    main()
