"""One real server for all tests of the endpoint, with the embedded model."""

import json

import pytest

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config
from image_files import data_url, encoded, plain
from serving_process import casa_serve
from trace_receiver import trace_receiver

MODEL = "casa-tiny-digits"
IMAGE_LIMIT = 4
MAX_MODEL_LEN = 1024


@pytest.fixture(scope="package")
def random_checkpoint(tmp_path_factory):
    """A folder with a tiny random model."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_random_checkpoint(preset_config("tiny-qwen", fusion="ca_tv"), folder, seed=3)
    return folder


@pytest.fixture(scope="package")
def traces():
    """The spans that the server sends."""
    with trace_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="package")
def server(tmp_path_factory, traces):
    """`casa-serve` with the embedded model and small limits.

    Downloads are allowed from this machine, and from two private addresses, which must be
    refused all the same.
    """
    log = tmp_path_factory.mktemp("server") / "log.txt"
    options = {
        "--max-model-len": MAX_MODEL_LEN,
        "--limit-mm-per-prompt": json.dumps({"image": IMAGE_LIMIT}),
        "--max-image-bytes": 2_000_000,
        "--max-request-bytes": 12_000_000,
        "--max-request-bytes-in-flight": 40_000_000,
        "--request-read-timeout": 5,
        "--middleware": "server_probe.Probe",
        "--otlp-traces-endpoint": traces.url,
    }
    arguments = [part for option in options.items() for part in option]
    # Compiling would take longer than all the tests.
    arguments.append("--enforce-eager")
    domains = ["127.0.0.1", "10.0.0.1", "169.254.169.254"]
    with casa_serve(log, *arguments, "--allow-loopback-media", "--allowed-media-domains", *domains) as running:
        yield running


@pytest.fixture(scope="package")
def client(server):
    """OpenAI's own client."""
    return server.client()


def image_part(url):
    """Return a message part with an image."""
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="package")
def ask(client):
    """Send one user message of texts and image URLs; return the completion."""

    def send(*parts, **options):
        content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
        settings = {"model": MODEL, "max_tokens": 6, "temperature": 0.0} | options
        extra = {"ignore_eos": True} | settings.pop("extra_body", {})
        return client.chat.completions.create(
            messages=[{"role": "user", "content": content}], extra_body=extra, **settings
        )

    return send


@pytest.fixture(scope="package")
def good_request(ask):
    """Send a good request with an image; its answer never changes while the server is well."""
    url = data_url(encoded(plain(84, 56, "orange")))

    def send():
        return ask("Read the digits.", image_part(url)).choices[0].message.content

    return send
