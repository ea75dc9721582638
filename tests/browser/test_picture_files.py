"""The judge of what a person sees: each file of the table, painted by Chromium on a white page."""

import base64

import numpy as np
import pytest

from picture_files import FILES

PIXELS = """async (url) => {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  return [canvas.height, canvas.width, ...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""


@pytest.fixture(scope="module")
def painted(chromium):
    """Return the (height, width, 3) levels that Chromium paints of a file."""
    page = chromium.new_page()
    # No colour is converted: the table is about what the samples mean, not about profiles.
    page.goto("about:blank")

    def paint(data, kind):
        url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
        height, width, *levels = page.evaluate(PIXELS, url)
        return np.array(levels, dtype=int).reshape(height, width, 4)[..., :3]

    yield paint
    page.close()


@pytest.mark.parametrize("name", FILES)
def test_chromium_shows_the_same(painted, name):
    data, kind, expected = FILES[name]
    levels = painted(data, kind)
    assert levels.shape == expected.shape
    assert np.abs(levels - expected).max() <= 3
