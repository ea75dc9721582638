"""The same files in Chromium and as `casa-caption` reads them: the same picture at the same time."""

import numpy as np
import pytest

from casa_serving.caption.video import sample, scan
from odd_videos import RECIPES, OddVideos

FPS = 2
# Into the frame that a moment shows, of 0.1 s.
INTO_FRAME_S = 0.04
# Of 255; rounding, and what is lost where colours are scaled.
TOLERANCE = 30
SHOW = """async (times) => {
  const video = Object.assign(document.createElement("video"), { muted: true });
  await new Promise((resolve, reject) => {
    Object.assign(video, { onloadeddata: resolve, onerror: () => reject(video.error.message) });
    video.src = URL.createObjectURL(document.querySelector("input").files[0]);
  });
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const pictures = [];
  for (const time of times) {
    await new Promise((resolve) => {
      video.requestVideoFrameCallback(resolve);
      video.onseeked = () => setTimeout(resolve, 500); // Where the frame stays the same there is no call.
      video.currentTime = time;
    });
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(video, 0, 0);
    const at = (x, y) => Array.from(context.getImageData(canvas.width * x, canvas.height * y, 1, 1).data.slice(0, 3));
    pictures.push([at(0.25, 0.25), at(0.75, 0.25), at(0.25, 0.75), at(0.75, 0.75)]);
  }
  return { size: [canvas.width, canvas.height], pictures };
}"""


@pytest.fixture(scope="module")
def odd_videos(tmp_path_factory):
    return OddVideos(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def browser_page(chromium):
    page = chromium.new_page()
    yield page
    page.close()


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_captioned_is_what_the_browser_shows(browser_page, odd_videos, name):
    path = odd_videos.make(name)
    info = scan(path)
    seen = list(sample(info, FPS))
    times = [info.late_s + item.timestamp + INTO_FRAME_S for item in seen]
    browser_page.set_content("<input type=file>")
    browser_page.set_input_files("input", path)
    shown = browser_page.evaluate(SHOW, times)
    assert list(seen[0].image.size) == shown["size"]
    width, height = seen[0].image.size
    corners = [(width // 4, height // 4), (width * 3 // 4, height // 4)]
    corners += [(x, height * 3 // 4) for x, _ in corners]
    mine = [[item.image.getpixel(corner) for corner in corners] for item in seen]
    assert np.abs(np.array(mine, int) - np.array(shown["pictures"], int)).max() <= TOLERANCE
