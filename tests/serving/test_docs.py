"""What the documentation shows is run: its commands, its Python and its table."""

import importlib.util
import os
import re
import shlex
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from image_files import data_url, encoded, plain
from markdown_pages import prose
from originals import candidate_names, original_model, write_original
from programs import output_of
from serving_process import free_port, running

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```(\S+) (run|server)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = ("docs/quickstart.md", "docs/checkpoints.md")
# Options of vLLM's that docs/limits.md explains beside those of casa-serve.
VLLMS_OWN = {
    "--allowed-local-media-path",
    "--allowed-media-domains",
    "--allowed-origins",
    "--h11-max-header-count",
    "--h11-max-incomplete-event-size",
    "--limit-mm-per-prompt",
    "--max-model-len",
    "--trust-request-chat-template",
}


def script(page, *kinds):
    """Return the blocks of a page that are marked with one of `kinds`, as one bash script.

    The Python blocks of a page belong together, so they run as one program at its end.
    """
    shell, program = [], []
    for language, kind, body in BLOCK.findall((ROOT / page).read_text()):
        assert language in ("bash", "python"), language
        if kind in kinds:
            (shell if language == "bash" else program).append(body)
    return "\n".join(["set -euo pipefail", *shell, "python - <<'END_OF_PROGRAM'", *program, "END_OF_PROGRAM"])


def run(text, folder):
    """Run a bash script in an empty folder, with this environment's commands first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return output_of("bash", "-c", text, folder=folder, PATH=path)


def test_what_pip_is_told_to_install_exists():
    """pip takes `.[extra]` from the checkout; `casa-engine[extra] @ .` is no requirement to it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        found += re.findall(r"pip install\s+\"([^\"]+)\"", page.read_text())
    installed = [word for word in found if word.startswith(".")]
    assert len(installed) >= 5
    for word in installed:
        (extras,) = re.fullmatch(r"\.\[([\w,]+)\]", word).groups()
        assert set(extras.split(",")) <= project["optional-dependencies"].keys(), word
    assert not [word for word in found if "@" in word]


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_need_no_server(page, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_original(original_model("helium"), "helium", tmp_path / "CASA-Helium1-VL-2B", candidate_names("helium"))
    assert ": complete." in run(script(page, "run"), tmp_path)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_plugin_alone_in_vllms_own_server(tmp_path):
    """The page's command as it stands, but for its port, on the page's checkpoint."""
    (shown,) = re.findall(r"^```bash vllm\n(.*?)^```", (ROOT / "docs" / "quickstart.md").read_text(), BLOCK.flags)
    run(script("docs/quickstart.md", "run"), tmp_path)
    image = {"type": "image_url", "image_url": {"url": data_url(encoded(plain()))}}
    port = free_port()
    python, *arguments = shlex.split(shown.replace("8001", str(port)))
    assert python == "python"
    with running(tmp_path / "log.txt", [sys.executable, *arguments], port, tmp_path) as server:
        answer = server.client().chat.completions.create(
            model="./tiny",
            messages=[{"role": "user", "content": [image, {"type": "text", "text": "Read the digits."}]}],
            max_tokens=4,
        )
    assert answer.usage.completion_tokens > 0


@pytest.mark.vllm
def test_the_quickstart_against_a_server(server, tmp_path):
    text = script("docs/quickstart.md", "server")
    assert "http://localhost:8000" in text
    output = run(text.replace("http://localhost:8000", server.url), tmp_path)
    assert '"id":"casa-tiny-digits"' in output
    read = [line.split(" -> ") for line in output.splitlines() if " -> " in line]
    assert len(read) == 3
    assert all(re.fullmatch(r"\d( \d)*", answer) for _, answer in read)


@pytest.mark.vllm
def test_the_live_client_of_the_docs_against_a_server(server, tmp_path):
    text = script("docs/live.md", "server")
    assert "ws://localhost:8000" in text
    output = run(text.replace("ws://localhost:8000/v1/live", server.live_url), tmp_path).splitlines()
    assert re.match(r"0.0 \d( \d)* ", output[0])
    assert re.fullmatch(r"answer: \d( \d)*", output[-2])
    assert "frames=8 " in output[-1]


def test_the_readmes_table_is_what_the_script_prints():
    path = ROOT / "benchmarks" / "kv_arithmetic.py"
    spec = importlib.util.spec_from_file_location("kv_arithmetic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    shown = readme.partition("<!-- kv-table")[2].partition("-->\n")[2].partition("<!-- /kv-table")[0]
    assert shown.strip().splitlines() == module.table()


def test_the_tables_of_bytes_are_what_the_script_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import step_bytes

    shown = (ROOT / "docs" / "benchmarks.md").read_text()
    for table in (step_bytes.weight_table(), step_bytes.cache_table()):
        assert "\n".join(["", *table, ""]) in shown


def anchors(page):
    """Return what links may name in a page: its headings, as Markdown makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_in_the_docs_leads_somewhere():
    num_anchors = 0
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            other = page.parent / name if name else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor:
                num_anchors += 1
                assert anchor in anchors(other), f"{page.name}: {target}"
    assert num_anchors


def test_every_option_in_the_limits_page_exists():
    """The options that casa-serve adds, and no others, are explained with their defaults."""
    from casa_serving.options.image_limits import ImageLimits
    from casa_serving.options.live_options import LiveOptions
    from casa_serving.options.request_limits import RequestLimits

    text = (ROOT / "docs" / "limits.md").read_text()
    options = ImageLimits().as_options() | asdict(LiveOptions()) | asdict(RequestLimits())
    for name, default in options.items():
        row = next(line for line in text.splitlines() if f"`--{name.replace('_', '-')}`" in line)
        shown = ("the checkpoint's own",) if default is None else (f" {default} ", f"{default:,}")
        assert any(value in row for value in shown), row
    own = {f"--{name.replace('_', '-')}" for name in options}
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("|")]
    assert {option for row in rows for option in re.findall(r"(--\w[\w-]*)", row)} - own == VLLMS_OWN
