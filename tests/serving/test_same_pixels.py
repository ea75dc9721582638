"""One picture file, the same pixels for the model: `casa-serve`, live sessions, `casa-export run`, `AutoProcessor`."""

from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from casa_engine.checkpoints import load_processor
from casa_engine.digits import checkpoint_path
from casa_engine.image_patches import PatchValues
from casa_engine.registration import register_auto_classes
from casa_export import cli
from casa_serving.endpoint.media import GuardedFileIO, GuardedImageIO
from casa_serving.options.image_limits import ImageLimits
from picture_files import FILES

# More than Pillow opens by itself: a program that opens files has to take the texts out first.
ONLY_OURS = ("long texts", "large colour profile")


@pytest.fixture(scope="module")
def processor():
    return load_processor(checkpoint_path())


@pytest.fixture(scope="module")
def auto_processor():
    register_auto_classes()
    return AutoProcessor.from_pretrained(checkpoint_path())


def of_patches(processor, image) -> tuple[torch.Tensor, torch.Tensor]:
    """As the plugin prepares an image and the model in vLLM opens it."""
    pixels, grid = processor.image_bytes(image)
    return PatchValues(processor.image_processor)(pixels, grid[None]), grid[None]


def of_export_run(path, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the command hands to its model, which answers nothing."""
    given = {}
    model = SimpleNamespace(steps=lambda **inputs: given.update(inputs) or iter(()))
    monkeypatch.setattr(cli, "_load", lambda options: model)
    assert cli.main(["run", str(checkpoint_path()), "--prompt", "Read.", "--image", str(path)]) == 0
    return given["pixel_values"], given["image_grid_thw"]


@pytest.mark.parametrize("name", FILES)
def test_every_door_shows_the_model_the_same_pixels(name, processor, auto_processor, tmp_path, monkeypatch):
    data, _, _ = FILES[name]
    (tmp_path / "picture").write_bytes(data)
    expected = of_patches(processor, GuardedFileIO(ImageLimits()).load_bytes(data))
    entries = {
        "live": of_patches(processor, GuardedImageIO(ImageLimits()).load_bytes(data).media),
        "casa-export run": of_export_run(tmp_path / "picture", monkeypatch),
    }
    if name not in ONLY_OURS:
        prompt = f"{processor.image_token} Read."
        inputs = auto_processor(images=[Image.open(BytesIO(data))], text=prompt)
        entries["AutoProcessor"] = inputs["pixel_values"], inputs["image_grid_thw"]
    for entry, (pixels, grid) in entries.items():
        assert torch.equal(grid, expected[1]), entry
        assert torch.equal(pixels, expected[0]), entry
