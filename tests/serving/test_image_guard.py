"""The guard decides from an image's header, and what passes is decoded upright and opaque."""

import gc
import random
import tracemalloc

import pytest
from PIL import Image

from casa_engine.errors import InputError
from casa_engine.image_guard import ImageRefusedError, check_image
from casa_serving.options.image_limits import ImageLimits
from image_files import data_url, encoded, plain, png_bomb

pytestmark = pytest.mark.unit

LIMITS = ImageLimits()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_three_formats_are_taken(kind):
    assert check_image(encoded(plain(56, 28), kind), LIMITS) == (56, 28)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused_by_content(kind):
    with pytest.raises(ImageRefusedError, match="neither JPEG, PNG nor WebP"):
        check_image(encoded(plain(), kind), LIMITS)


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"%PDF-1.7", b"\0" * 100])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ImageRefusedError, match="not an image"):
        check_image(data, LIMITS)


def test_an_empty_file_is_refused():
    with pytest.raises(ImageRefusedError, match="0 bytes"):
        check_image(b"", LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [12, 20])
def test_a_cut_header_is_refused(kind, kept):
    with pytest.raises(ImageRefusedError, match="header is damaged or cut off"):
        check_image(encoded(plain(), kind)[:kept], LIMITS)


def test_a_bomb_is_refused_without_being_decoded():
    bomb = png_bomb(20_000, 20_000)
    assert len(bomb) < 1_000_000
    tracemalloc.start()
    with pytest.raises(ImageRefusedError, match="too many pixels"):
        check_image(bomb, LIMITS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("size", "limit", "message"),
    [
        ((101, 100), {"max_image_pixels": 100 * 100}, "101 x 100 = 10100"),
        ((1, 401), {"max_image_side": 400, "max_image_aspect": 1000}, "too long"),
        ((1, 5000), {}, "too narrow: got 1 x 5000"),
        ((201, 1), {}, "too narrow"),
    ],
)
def test_each_limit_refuses_what_is_over_it(size, limit, message):
    with pytest.raises(ImageRefusedError, match=message):
        check_image(encoded(plain(*size)), ImageLimits(**limit))


@pytest.mark.parametrize(
    ("size", "limit"),
    [
        ((100, 100), {"max_image_pixels": 100 * 100}),
        ((2, 400), {"max_image_side": 400}),
        ((1, 200), {}),
        ((1, 1), {}),
    ],
)
def test_each_limit_takes_what_just_meets_it(size, limit):
    assert check_image(encoded(plain(*size)), ImageLimits(**limit)) == size


def test_the_number_of_bytes_is_limited():
    data = encoded(plain())
    assert check_image(data, ImageLimits(max_image_bytes=len(data))) == (56, 28)
    with pytest.raises(ImageRefusedError, match=f"got {len(data)} bytes"):
        check_image(data, ImageLimits(max_image_bytes=len(data) - 1))


def test_a_jpeg_of_many_scans_is_refused():
    data = encoded(plain(), "JPEG")
    with pytest.raises(ImageRefusedError, match="too many scans"):
        check_image(data + b"\xff\xda" * 101, LIMITS)


def test_limits_that_no_image_could_meet_are_refused():
    with pytest.raises(InputError, match="--max-image-bytes must be"):
        ImageLimits(max_image_bytes=0)


def test_damaged_files_are_refused_and_nothing_else_happens():
    """Flip bytes of good files: each one is either read or refused with our own error."""
    numbers = random.Random(7)
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    outcomes = {"read": 0, "refused": 0}
    for kind in ("JPEG", "PNG", "WEBP"):
        good = encoded(picture, kind)
        for _ in range(150):
            data = bytearray(good)
            for _ in range(numbers.randint(1, 6)):
                data[numbers.randrange(12, min(len(data), 400))] = numbers.randrange(256)
            try:
                loader().load_bytes(bytes(data))
                outcomes["read"] += 1
            except ImageRefusedError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def loader(**limits):
    """Return the decoder with given limits; vLLM is only imported by the tests that need it."""
    from casa_serving.endpoint.media import GuardedImageIO

    return GuardedImageIO(ImageLimits(**limits))


def test_the_orientation_of_a_photo_is_applied():
    photo = plain(40, 20, "red")
    photo.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was held on its side: turn by 90 degrees to the right.
    loaded = loader().load_bytes(encoded(photo, exif=exif)).media
    assert loaded.size == (20, 40)
    assert loaded.getpixel((10, 5)) == (0, 0, 255)
    assert loaded.getpixel((10, 35)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    if mode == "P":
        picture = plain(8, 8, 0, "P")
        data = encoded(picture, transparency=0)
    else:
        data = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode))
    loaded = loader().load_bytes(data).media
    assert loaded.mode == "RGB"
    assert loaded.getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("I;16", "PNG")])
def test_every_mode_becomes_rgb(mode, kind):
    loaded = loader().load_bytes(encoded(Image.new(mode, (8, 8)), kind)).media
    assert loaded.mode == "RGB"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_refused_without_the_decoders_words(kind):
    data = encoded(Image.effect_noise((200, 200), 80).convert("RGB"), kind)
    with pytest.raises(ImageRefusedError) as caught:
        loader().load_bytes(data[: len(data) // 2])
    assert "damaged or cut off" in str(caught.value)
    assert "BytesIO" not in str(caught.value)
    assert " 0x" not in str(caught.value)


def test_base64_is_measured_before_it_is_decoded():
    with pytest.raises(ImageRefusedError, match="too large"):
        loader(max_image_bytes=1000).load_base64("image/png", "A" * 4000)
    with pytest.raises(ImageRefusedError, match="not valid base64"):
        loader().load_base64("image/png", "!!!!")


def test_requests_cannot_change_how_images_are_loaded():
    from vllm.exceptions import VLLMValidationError

    from casa_serving.endpoint.media import GuardedImageIO

    assert GuardedImageIO.merge_kwargs({"max_image_pixels": 5}, None) == {"max_image_pixels": 5}
    with pytest.raises(VLLMValidationError, match="media_io_kwargs"):
        GuardedImageIO.merge_kwargs({"max_image_pixels": 5}, {"max_image_pixels": 10**12})


def test_pixels_in_flight_are_limited_and_given_back():
    from vllm.exceptions import GracefulHTTPError

    from casa_serving.endpoint.media import PIXELS

    decoder = loader(max_pixels_in_flight=2 * 100 * 100)
    data = encoded(plain(100, 100))
    gc.collect()
    before = PIXELS.in_flight
    assert before == 0
    held = [decoder.load_bytes(data), decoder.load_bytes(data)]
    with pytest.raises(GracefulHTTPError, match="Too many pixels") as caught:
        decoder.load_bytes(data)
    assert caught.value.http_status == 429
    held.clear()
    gc.collect()
    assert PIXELS.in_flight == 0
    with pytest.raises(ImageRefusedError):
        decoder.load_bytes(encoded(Image.effect_noise((100, 100), 80))[:4000])
    assert PIXELS.in_flight == 0


def test_local_files_pass_the_same_guard(tmp_path):
    good = tmp_path / "good.png"
    good.write_bytes(encoded(plain()))
    assert loader().load_file(good).media.size == (56, 28)
    with pytest.raises(ImageRefusedError, match="cannot be read"):
        loader().load_file(tmp_path / "missing.png")


def test_the_connector_takes_images_only():
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media import AudioMediaIO

    from casa_serving.endpoint.media import GuardedMediaConnector

    connector = GuardedMediaConnector()
    url = data_url(encoded(plain()))
    assert connector.fetch_image(url).size == (56, 28)
    with pytest.raises(VLLMValidationError, match="no audio"):
        connector.load_from_url(url, AudioMediaIO())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "scheme 'file'"),
        ("FILE:///etc/passwd", "scheme 'file'"),
        ("ftp://example.org/a.png", "scheme 'ftp'"),
        ("/etc/passwd", "scheme"),
        ("", "scheme"),
        ("http://example.org/a.png", "not an allowed domain"),
        ("https://", "expected http or https and a host"),
        ("http://[::1/a.png", "cannot be parsed"),
        ("data:image/png,abc", "only base64"),
        ("data:image/png;base64", "only base64"),
    ],
)
def test_urls_that_are_refused(url, message):
    from vllm.exceptions import VLLMClientError

    from casa_serving.endpoint.media import GuardedMediaConnector

    with pytest.raises(VLLMClientError, match=message):
        GuardedMediaConnector().fetch_image(url)


def test_the_decoded_image_keeps_its_bytes_for_hashing():
    data = encoded(plain())
    assert loader().load_bytes(data).original_bytes == data
