"""Caption a video file while it is read: two frames a second go to a running server, a caption or silence comes back.

`casa caption` does this and writes subtitles; here is what it sends (docs/live.md has the protocol).

    casa serve                                  # in another terminal
    casa digits video digits.mp4                # handwritten digits that change every few seconds
    python examples/live_captions.py digits.mp4
"""

import argparse
import asyncio
import io
from collections.abc import Iterator

import av

from casa_serving.live.client import LiveClient


def frames(video: str, fps: float) -> Iterator[tuple[float, bytes]]:
    """Yield time in seconds and JPEG file of the frames to look at."""
    next_s = 0.0
    with av.open(video) as container:
        for frame in container.decode(video=0):
            if frame.time >= next_s:
                file = io.BytesIO()
                frame.to_image().save(file, "JPEG", quality=95)
                yield frame.time, file.getvalue()
                next_s += 1 / fps


async def caption(video: str, url: str, fps: float, question: str | None) -> None:
    """Print each caption with its time, then the answer to a question about what was seen."""
    async with LiveClient(url) as client:
        await client.create(fps=fps)
        for timestamp, image in frames(video, fps):
            await client.send_frame(image, timestamp)
            # A file can wait for its caption. A camera would go on, and the server would drop what is too much.
            async for event in client.events():
                if event.type == "frame.done":
                    break
            if event.caption:
                print(f"{event.timestamp:6.2f} s  {event.caption}")
        if question:
            await client.ask(question)
            async for event in client.events():
                if event.type == "answer.done":
                    print(f"{question} {event.text}")
                    break
        statistics = await client.stop()
    print(f"{statistics.frames} frames, {statistics.silent} of them silent")


def main() -> None:
    """Caption."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--fps", type=float, default=2)
    parser.add_argument("--question", default="What did you read first?")
    parser.add_argument("--url", default="ws://localhost:8000/v1/live")
    options = parser.parse_args()
    asyncio.run(caption(options.video, options.url, options.fps, options.question))


if __name__ == "__main__":
    main()
