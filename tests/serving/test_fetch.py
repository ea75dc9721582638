"""Downloads go to allowed domains with public addresses only, at every hop."""

import pytest
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError

from casa_serving.endpoint.fetch import GuardedConnection, is_public
from image_files import encoded, plain
from web import site

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.10",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "2002:a00:1::",
        "64:ff9b::a9fe:a9fe",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_can_be_allowed_alone(address):
    assert is_public(address, allow_loopback=True)
    assert not is_public("10.0.0.1", allow_loopback=True)


@pytest.fixture
def images():
    """A site on this machine with one good image."""
    with site() as server:
        server.bodies["/good.png"] = encoded(plain())
        yield server


def local(*domains: str) -> GuardedConnection:
    """Return a connection that may reach this machine."""
    return GuardedConnection(list(domains or ("127.0.0.1",)), allow_loopback=True)


def test_an_image_is_downloaded(images):
    assert local().get_bytes(images.url("/good.png"), timeout=5) == images.bodies["/good.png"]


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "loopback or reserved"),
        ("localhost", "loopback or reserved"),
        ("2130706433", "shortened or damaged"),
        ("127.1", "shortened or damaged"),
        ("0x7f.1", "loopback or reserved"),
    ],
)
def test_this_machine_is_refused_under_any_name(images, host, words):
    guard = GuardedConnection([host, "127.0.0.1"], allow_loopback=False)
    with pytest.raises(VLLMValidationError, match=words):
        guard.get_bytes(images.url("/good.png", host), timeout=5)
    assert not images.asked


def test_a_redirect_is_followed_within_the_allowed_domains(images):
    images.redirects["/moved"] = images.url("/good.png", "localhost")
    guard = local("127.0.0.1", "localhost")
    assert guard.get_bytes(images.url("/moved"), timeout=5) == images.bodies["/good.png"]
    with pytest.raises(VLLMUnprocessableEntityError, match="redirects are not followed"):
        guard.get_bytes(images.url("/moved"), timeout=5, allow_redirects=False)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://169.254.169.254/latest/meta-data", "private, link-local"),
        ("http://10.0.0.1/", "private, link-local"),
        ("http://elsewhere.test/", "not an allowed domain"),
        ("file:///etc/passwd", "expected http or https"),
    ],
)
def test_a_redirect_to_where_one_may_not_go_is_refused(images, target, message):
    images.redirects["/moved"] = target
    guard = local("127.0.0.1", "169.254.169.254", "10.0.0.1")
    with pytest.raises(VLLMValidationError, match=message):
        guard.get_bytes(images.url("/moved"), timeout=5)


def test_redirects_end(images):
    images.redirects["/round"] = images.url("/round")
    with pytest.raises(VLLMUnprocessableEntityError, match="more than 3 redirects"):
        local().get_bytes(images.url("/round"), timeout=5)
    assert len(images.asked) == 4


def test_a_download_is_broken_off_at_the_limit(images):
    images.bodies["/big"] = bytes(3_000_000)
    with pytest.raises(VLLMValidationError, match="more than 1000 bytes"):
        local().get_bytes(images.url("/big"), timeout=5, max_bytes=1000)


def test_what_cannot_be_downloaded_is_said(images):
    with pytest.raises(VLLMUnprocessableEntityError, match="HTTP status 404"):
        local().get_bytes(images.url("/none"), timeout=5)
    images.slow.add("/good.png")
    with pytest.raises(VLLMUnprocessableEntityError, match=r"within 0\.2 s"):
        local().get_bytes(images.url("/good.png"), timeout=0.2)
    with pytest.raises(VLLMUnprocessableEntityError, match="connection or the answer broke"):
        local().get_bytes("http://127.0.0.1:9/", timeout=5)
    with pytest.raises(VLLMUnprocessableEntityError, match="connection or the answer broke"):
        local("no-such-host.invalid").get_bytes("http://no-such-host.invalid/", timeout=5)
