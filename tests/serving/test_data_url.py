"""Data URLs are read as browsers read them, within the limits."""

import base64
import binascii
from urllib.parse import quote

import pytest

from casa_engine.image_guard import ImageRefusedError
from casa_serving.endpoint.data_url import base64_text, compact, decoded, is_data_url
from casa_serving.options.image_limits import ImageLimits
from image_files import encoded, plain
from picture_files import FILES

pytestmark = pytest.mark.unit

DATA = encoded(plain(5, 3, "red"))
TEXT = base64.b64encode(DATA).decode()
FORMS = {
    "plain": f"data:image/png;base64,{TEXT}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "no type": f"data:;base64,{TEXT}",
    "parameters": f"data:image/png;name=a.png;charset=utf-8;base64,{TEXT}",
    "blank before base64": f"data:image/png; base64,{TEXT}",
    "blanks around": f"  data:image/png;base64,{TEXT}\n",
    "line breaks": "data:image/png;base64,\r\n" + "\r\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76)),
    "blanks": "data:image/png;base64," + " \t\f".join(TEXT[at : at + 7] for at in range(0, len(TEXT), 7)),
    "no padding": f"data:image/png;base64,{TEXT.rstrip('=')}",
    "percent-encoded": f"data:image/png;base64,{quote(TEXT, safe='')}",
    "all percent-encoded": "data:image/png;base64," + "".join(f"%{ord(letter):02X}" for letter in TEXT),
    "percent-encoded blanks": f"data:image/png;base64,{TEXT[:8]}%20%0A{TEXT[8:]}",
    "fragment": f"data:image/png;base64,{TEXT}#a",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.vllm
def test_forms_of_a_data_url(form):
    from casa_serving.endpoint.media import GuardedMediaConnector

    image = GuardedMediaConnector().fetch_image(FORMS[form])
    assert image.data == DATA
    assert image.decode().size == (5, 3)


@pytest.mark.parametrize("rest", ["", "A", "AA", "AAA", "AAAA", "AAAAA"])
def test_padding(rest):
    """By the rules of forgiving base64: a rest of one letter is none, and padding is all or nothing."""
    if len(rest) % 4 == 1:
        with pytest.raises(binascii.Error):
            decoded(compact(rest))
    else:
        assert decoded(compact(rest)) == base64.b64decode(rest + "=" * (-len(rest) % 4))


@pytest.mark.parametrize(
    "text", ["@@@@", "AA=", "A===", "=", "====", "AA==AA==", "AA=A", "AAA_", "AAA-", "ÄAAA", "AA%G0", "AA%"]
)
def test_what_is_no_base64(text):
    with pytest.raises(binascii.Error):
        decoded(compact(text))


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:image/png;base64", "data:base64,AAAA", "data:;base65,AAAA"]
)
def test_what_is_no_base64_url(url):
    assert is_data_url(url)
    assert base64_text(url) is None


@pytest.mark.vllm
def test_the_size_counts_without_blanks_and_before_decoding():
    from casa_serving.endpoint.media import GuardedFileIO

    image_io = GuardedFileIO(ImageLimits(max_image_bytes=len(DATA)))
    assert image_io.load_base64("", "\n".join(TEXT)).data == DATA
    with pytest.raises(ImageRefusedError, match="too large"):
        image_io.load_base64("", "@" * (len(TEXT) + 4))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.vllm
def test_files_of_every_kind_pass_the_guard(name):
    from casa_serving.endpoint.media import GuardedFileIO, GuardedImageIO

    data, _, expected = FILES[name]
    image = GuardedFileIO(ImageLimits()).load_bytes(data).decode()
    assert (image.height, image.width) == expected.shape[:2]
    assert GuardedImageIO(ImageLimits()).load_bytes(data).media.tobytes() == image.tobytes()


@pytest.mark.parametrize("url", [5, ["x"], {"url": "x"}, None, b"data:"])
@pytest.mark.vllm
def test_a_url_is_text(url):
    from vllm.exceptions import VLLMValidationError

    from casa_serving.endpoint.media import GuardedMediaConnector

    connector = GuardedMediaConnector()
    with pytest.raises(VLLMValidationError, match="expected text"):
        connector.load_from_url(url, connector._image_io)


@pytest.mark.vllm
def test_embeddings_have_no_door():
    """Every way of vLLM's connector to load something is one of images, or refuses."""
    import inspect

    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media import MediaConnector

    from casa_serving.endpoint.media import GuardedMediaConnector

    ways = {name for name in dir(MediaConnector) if name.startswith(("fetch_", "load_"))}
    images = {"fetch_image", "fetch_image_async", "load_from_url", "load_from_url_async"}
    assert images < ways
    for name in ways - images:
        way = getattr(GuardedMediaConnector(), name)
        with pytest.raises(VLLMValidationError, match="Only images"):
            call = way(f"data:;base64,{TEXT}")
            if inspect.isawaitable(call):
                call.send(None)
