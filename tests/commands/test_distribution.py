"""The source distribution is the whole project; a wheel serves and captions where the checkout is not."""

import json
import subprocess
import zipfile
from email import message_from_bytes
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from casa_digits.data import draw_image, load_samples
from image_files import data_url, encoded
from programs import output_of
from serving_process import free_port, running

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow
# What setuptools adds.
GENERATED = ("PKG-INFO", "setup.cfg", "casa_engine.egg-info/")


def test_the_source_distribution_holds_every_file_of_the_project(sdist):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tracked = {name for name in listed if name}
    files = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert len(tracked) > 400
    assert tracked - files == set()
    assert {name for name in files - tracked if not name.startswith(GENERATED)} == set()


def test_a_wheel_holds_packages_alone_each_typed_and_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = message_from_bytes(archive.read(metadata))
    packages = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {
        "casa_bench",
        "casa_commands",
        "casa_digits",
        "casa_engine",
        "casa_eval",
        "casa_export",
        "casa_serving",
        "casa_vllm",
    }
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    addresses = dict(line.split(", ") for line in said.get_all("Project-URL"))
    assert addresses["Paper"].endswith("2512.19535")
    assert "Typing :: Typed" in said.get_all("Classifier")
    assert said["Keywords"]
    # An index shows the page without the folders beside it.
    assert said["Description-Content-Type"] == "text/markdown"


@pytest.mark.vllm
def test_an_installed_wheel_serves_and_captions(wheel, environment, requirements, tmp_path):
    """With the locked versions, in a folder that is not the checkout, by the commands that a newcomer types."""
    bin_folder, installer = environment
    installer.install("--no-deps", requirements.torch_build("cpu"))
    installer.install("--no-deps", "--require-hashes", "-r", requirements.lock_path("cpu"))
    installer.install("--no-deps", wheel)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    # Without the checkout's folders on the path.
    run = partial(output_of, folder=folder, timeout_s=500, PYTHONPATH="")
    where = run(bin_folder / "python", "-c", "import casa_engine; print(casa_engine.__file__)")
    assert Path(where.strip()).is_relative_to(bin_folder.parent)

    port = free_port()
    command = [bin_folder / "casa", "serve", "--host", "127.0.0.1", "--port", port]
    drawn = draw_image(np.random.default_rng(1), load_samples(held_out=True))
    image = {"type": "image_url", "image_url": {"url": data_url(encoded(drawn.to_pil()))}}
    question = {"type": "text", "text": "Read the digits."}
    with running(tmp_path / "log.txt", command, port, folder) as server:
        answer = server.client().chat.completions.create(
            model="casa-tiny-digits", messages=[{"role": "user", "content": [image, question]}], temperature=0
        )
        assert answer.choices[0].message.content == drawn.text
        assert "<html" in server.get("/")

    # The model reads 98 scenes of 100; of video 0 it misreads one, and of this one none.
    run(bin_folder / "casa", "digits", "video", "digits.mp4", "--seconds", "8", "--scale", "1", "--seed", "1")
    run(bin_folder / "casa", "caption", "digits.mp4", "--quiet")
    shown = [span["text"] for span in json.loads((folder / "digits.json").read_text())]
    captions = [json.loads(line)["caption"] for line in (folder / "digits.jsonl").read_text().splitlines()]
    assert len(shown) >= 2
    assert [caption for caption in captions if caption] == shown
    assert (folder / "digits.srt").read_text().count("-->") == len(shown)
