"""One file, one picture: files of every kind through all paths that prepare pixels."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa_engine.checkpoints import default_processor
from casa_engine.errors import InputError
from casa_engine.image_patches import PatchValues, resized_pixels
from casa_engine.image_preparation import as_image, prepare_image, read_image, without_texts
from casa_engine.presets import preset_config
from image_files import encoded
from picture_files import FILES, GREY, HALF, RAMP, SIXTEEN, shown


@pytest.fixture(scope="module")
def processor():
    return default_processor(preset_config("tiny-qwen", fusion="ca_tv"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_a_person_sees(name):
    data, kind, expected = FILES[name]
    assert np.abs(np.asarray(read_image(data, kind)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("long texts", "large colour profile")])
def test_all_paths_see_the_same(name, processor):
    """The file, the opened image, the processor of the eager model, and the bytes that serving keeps."""
    data, kind, _ = FILES[name]
    file = read_image(data, kind)
    opened = Image.open(BytesIO(data))
    assert np.array_equal(np.asarray(prepare_image(opened)), np.asarray(file))
    large = file.resize((56, 84), Image.Resampling.NEAREST)
    expected = processor.process_images([large])
    pixels, grid = processor.image_bytes(large)
    assert torch.equal(PatchValues(processor.image_processor)(pixels, grid[None]), expected["pixel_values"])
    assert torch.equal(grid, expected["image_grid_thw"][0])
    again = processor.process_images([Image.open(BytesIO(data))])
    assert torch.equal(again["pixel_values"], processor.process_images([file])["pixel_values"])


class ArrayProcessor(Qwen2VLImageProcessorPil):
    """With another backend's name: what it resizes with is asked of the processor, as with torchvision's."""

    backend = "arrays"


SIZES = [(1, 1), (28, 28), (56, 56), (57, 113), (3, 400), (400, 3), (448, 448), (1500, 1000), (2000, 30)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [Qwen2VLImageProcessorPil, ArrayProcessor])
@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}},
        {"resample": Image.Resampling.BILINEAR, "patch_size": 16, "merge_size": 4, "temporal_patch_size": 3},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 127.5, "merge_size": 1},
        {"do_normalize": False},
    ],
    ids=["published", "other patches", "other values", "not normalised"],
)
def test_sent_pixels_become_the_processors_values(size, kind, options):
    images = kind(**options)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = images(images=[image], return_tensors="pt")
    pixels, grid = resized_pixels(images, image)
    assert torch.equal(grid, expected["image_grid_thw"][0])
    assert pixels.dtype == torch.uint8
    assert pixels.numel() * images.temporal_patch_size == expected["pixel_values"].numel()
    values = PatchValues(images)
    for dtype in (torch.bfloat16, torch.float32):  # In this order: a table in 16 bits is not kept.
        assert torch.equal(values(pixels, grid[None], dtype), expected["pixel_values"].to(dtype))


def test_a_processor_that_does_not_resize():
    images = Qwen2VLImageProcessorPil(do_resize=False)
    fits = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
    pixels, grid = resized_pixels(images, fits)
    expected = images(images=[fits], return_tensors="pt")["pixel_values"]
    assert torch.equal(PatchValues(images)(pixels, grid[None]), expected)
    with pytest.raises(InputError, match=r"an image is 84x57 px, .* multiples of 28"):
        resized_pixels(images, fits.resize((84, 57)))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(SIXTEEN), RAMP),
        (Image.fromarray(SIXTEEN.astype(">u2")), RAMP),
        (Image.fromarray(SIXTEEN.astype("int32")), RAMP),
        (Image.fromarray(GREY.astype("int32")), RAMP),
        (Image.fromarray(GREY.astype("float32")), RAMP),
        (Image.fromarray(HALF).convert("RGBa"), shown(*[(255, 0, 0)] * 4, *[(255, 255, 255)] * 4)),
        (Image.fromarray(HALF).convert("LA").convert("La"), shown(*[(76, 76, 76)] * 4, *[(255, 255, 255)] * 4)),
        (RAMP, RAMP),
        (GREY, RAMP),
        (GREY[..., None], RAMP),
        (np.moveaxis(RAMP, -1, 0), RAMP),
        (torch.from_numpy(RAMP), RAMP),
        (HALF, shown(*[(255, 0, 0)] * 4, *[(255, 255, 255)] * 4)),
    ],
)
def test_images_of_a_program(image, expected):
    assert np.array_equal(np.asarray(as_image(image)), expected)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("some/file.png", "given as str; expected pixels"),
        ("http://127.0.0.1/x.png", "given as str; expected pixels"),
        (b"bytes", "given as bytes; expected pixels"),
        (["some/file.png"], "given as list; expected pixels"),
        ({"url": "x"}, "given as dict; expected pixels"),
        (5, "given as int; expected pixels"),
        (None, "given as NoneType; expected pixels"),
        (GREY.astype("float32"), "given as ndarray of float32; expected pixels"),
        (torch.zeros(3, 8, 8), r"given as Tensor of torch\.float32; expected pixels"),
        (np.zeros((2, 3, 4, 5), dtype=np.uint8), r"of shape \(2, 3, 4, 5\); expected"),
        (np.zeros((0, 8, 3), dtype=np.uint8), r"of shape \(0, 8, 3\); expected"),
        (Image.fromarray(np.full((4, 4), 1e9, dtype="float32")), r"levels from 1e\+09 to 1e\+09; expected"),
        (Image.fromarray(np.full((4, 4), np.nan, dtype="float32")), "levels from nan to nan; expected"),
        (Image.fromarray(np.full((4, 4), -5, dtype="int32")), "levels from -5 to -5; expected"),
    ],
)
def test_what_is_no_picture(value, words, processor):
    with pytest.raises(InputError, match=words):
        as_image(value)
    if value is not None and not isinstance(value, list):
        with pytest.raises(InputError, match=words):
            processor(images=[value], text=processor.image_token)


@pytest.mark.parametrize(
    "part", [{"url": "http://x/y.png"}, {"path": "/etc/passwd"}, {"image": "x"}, {"base64": "AAAA"}]
)
def test_messages_of_a_program_hold_pixels(part, processor):
    message = {"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "Read."}]}
    for conversation in ([message], [[message]]):
        with pytest.raises(InputError, match="expected pixels"):
            processor.apply_chat_template(conversation, tokenize=True, return_dict=True)


def test_a_file_without_texts_is_the_same_file():
    plain = encoded(Image.fromarray(RAMP))
    assert without_texts(plain) is plain
    assert without_texts(FILES["long texts"][0]) == plain
    # Cut off inside a text: what is before it is left, here the header.
    header = FILES["long texts"][0][:33]
    assert header.endswith(plain[29:33])
    assert without_texts(FILES["long texts"][0][:500]) == header
