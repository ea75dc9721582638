"""The page's files come with the right headers, from the package, and stand in nobody's way."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from casa_engine.digits import checkpoint_path
from casa_serving.live.web_files import CONTENT_TYPES, WebFiles, attach, page_model

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
WEB = ROOT / "serving" / "casa_serving" / "web"
NAMES = sorted(path.name for path in WEB.iterdir())


@pytest.fixture(scope="module")
def browser():
    app = Starlette()
    app.state.page_model = page_model("my-digits", checkpoint_path())
    attach(app)
    return TestClient(app)


def test_the_page_is_at_the_root(browser):
    answer = browser.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == (WEB / "index.html").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_file_has_its_type_and_is_asked_for_again(browser, name):
    answer = browser.get(f"/web/{name}")
    assert answer.content == (WEB / name).read_bytes()
    assert answer.headers["content-type"] == CONTENT_TYPES[Path(name).suffix]
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_bounds_of_the_fields_are_those_of_the_settings(browser):
    answer = browser.get("/web/fields.json")
    assert answer.headers["content-type"] == "application/json"
    bounds = answer.json()
    assert bounds["fps"] == {"min": 0.001, "max": 240.0, "step": "any"}
    assert bounds["text_budget"] == {"min": 32, "max": 10_000_000, "step": 1}
    assert bounds["instruction"] == {"maxlength": 20_000}
    numbers = re.findall(r' (?:min|max|step|maxlength)="', (WEB / "index.html").read_text())
    assert not numbers, "the page has bounds of its own"


def test_the_page_learns_what_is_served(browser):
    answer = browser.get("/web/model.json")
    assert answer.headers["content-security-policy"]
    model = answer.json()
    assert set(model) == {"name", "reads", "questions"}
    assert model["name"] == "my-digits"
    assert "digits" in model["reads"] and len(model["questions"]) >= 2


def test_a_checkpoint_without_words_has_its_name_alone(tmp_path):
    assert page_model("other", tmp_path) == {"name": "other", "reads": "", "questions": []}


def test_a_file_of_another_kind_is_none_of_the_page(browser, tmp_path):
    web = tmp_path / "web"
    web.mkdir()
    (web / "digits.json").write_text("[]")
    files = WebFiles()
    files.all_directories = [web]
    app = Starlette(routes=[Route("/web/{name}", files.serve)])
    for name in ("digits.json", "missing.js", "."):
        assert TestClient(app, raise_server_exceptions=False).get(f"/web/{name}").status_code == 404


def test_a_known_file_is_not_sent_again(browser):
    etag = browser.get("/web/app.js").headers["etag"]
    again = browser.get("/web/app.js", headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")
    assert browser.get("/web/app.js", headers={"If-None-Match": '"old"'}).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2fcli.py", "%2e%2e/cli.py", "__init__.py", ""])
def test_nothing_else_is_served(browser, name):
    assert browser.get(f"/web/{name}").status_code == 404


def test_the_policy_forbids_everything_from_elsewhere(browser):
    policy = browser.get("/").headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert not any(word in rule for rule in policy for word in ("unsafe", "http", "*"))


def test_no_file_names_another_host():
    for name in NAMES:
        if name.endswith((".mp4", ".webm")):
            continue
        addresses = set(re.findall(r"(?:https?|wss?)://[^\s\"'`]+", (WEB / name).read_text()))
        # The name of a format, which nobody looks up.
        assert addresses <= {"http://www.w3.org/2000/svg"}


def test_routes_that_were_there_before_win():
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("mine"))])
    attach(app)
    assert TestClient(app).get("/").text == "mine"


def test_the_wheel_has_every_file(tmp_path):
    source = tmp_path / "source"
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    for room in ("casa_engine", "plugins", "export", "serving"):
        copytree(ROOT / room, source / room, ignore=ignore_patterns("*.safetensors", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("casa_serving/web/")}
    assert packed == {f"casa_serving/web/{name}" for name in NAMES}
