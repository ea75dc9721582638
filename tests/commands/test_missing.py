"""A command whose packages are missing says in one sentence what to install, wherever the import stands."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from casa_commands import missing
from casa_engine.digits import checkpoint_path

BIN = Path(sys.executable).parent
# What comes with an extra; tqdm does too, and with transformers.
VLLM = ["vllm", "mistral_common", "starlette", "fastapi", "uvicorn", "aiohttp", "prometheus_client"]
LIVE = ["av", "pysubs2", "imageio_ffmpeg", "websockets", "yarl", "pydantic"]
RAY = ["ray", "pyarrow", "jsonref", "typer", "pandas", "jsonschema"]
EXPORT = ["onnx", "onnxruntime", "onnxscript"]
SERVER = ["--server", "http://127.0.0.1:9"]
EVAL = ["mme", "--url", "http://127.0.0.1:9", "--data"]
CHECKPOINT = "CHECKPOINT"
DIGITS = ["sklearn", "av"]
EVERYTHING = [*VLLM, *LIVE, *RAY, *EXPORT, *DIGITS, "openai", "tensorrt_rtx", "tensorrt"]
# Runs before anything is imported: each finder of modules finds nothing of what is in BLOCKED.
BLOCKER = """
import os, sys
blocked = set(os.environ["BLOCKED"].split(","))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, *arguments)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
# Each of these starts a process that imports torch; the more of them are slow.
slow = pytest.mark.slow


def cases(*rows):
    """Return rows of a table, all but the first marked slow."""
    return [row if number == 0 else pytest.param(*row, marks=slow) for number, row in enumerate(rows)]


def run(tmp_path, blocked, command, *arguments):
    """Run a console script in which some modules cannot be imported; return exit status and stderr."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "BLOCKED": ",".join(blocked), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [BIN / command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """A second of digits."""
    from casa_digits.video import make_video

    path = tmp_path_factory.mktemp("video") / "digits.mp4"
    make_video(path, 1.0, 2, scale=1)
    return str(path)


@pytest.fixture(scope="session")
def mme(tmp_path_factory):
    """Two folders with files of MME, in Parquet and JSONL; nobody will read their rows."""
    folder = tmp_path_factory.mktemp("mme")
    for kind in ("parquet", "jsonl"):
        (folder / kind).mkdir()
        columns = ("question", "answer", "category", "question_id", "image")
        (folder / kind / f"test.{kind}").write_text(json.dumps(dict.fromkeys(columns, "")))
    return folder


@pytest.mark.parametrize(
    ("command", "arguments", "blocked", "extra"),
    [
        *cases(
            ("casa-serve", [], EVERYTHING, "cpu"),
            ("casa-serve", [], ["vllm"], "cpu"),
            ("casa-serve", ["--help"], EVERYTHING, "cpu"),
            ("casa-serve", ["--ray"], EVERYTHING, "cpu"),
        ),
        *cases(*[("casa-serve", ["--ray"], [name], extra) for name, extra in [("vllm", "cpu"), ("ray", "ray")]]),
        *cases(
            ("casa-caption", ["VIDEO"], VLLM, "cpu"),
            ("casa-caption", ["VIDEO"], EVERYTHING, "live"),
            *[("casa-caption", ["VIDEO"], [name], "live") for name in ("av", "pysubs2", "yarl")],
            ("casa-caption", ["/dev/video0"], ["av"], "live"),
            *[("casa-caption", ["VIDEO", *SERVER], [*VLLM, name], "live") for name in ("websockets", "pydantic")],
        ),
        *cases(
            ("casa-export", ["out", "--trt"], ["tensorrt_rtx", "tensorrt"], "trt"),
            *[("casa-export", ["out"], [name], "export") for name in EXPORT],
        ),
        *cases(*[("casa-digits-video", ["out.mp4"], [name], "digits") for name in ("av", "sklearn")]),
        *cases(
            ("casa-eval-digits", ["--scale", "0.01"], ["sklearn"], "digits"),
            ("casa-eval-digits", ["--base-url", "http://127.0.0.1:9/v1"], ["openai"], "serving"),
        ),
        *cases(
            ("casa-eval", [*EVAL, "PARQUET"], ["pyarrow"], "eval"),
            ("casa-eval", [*EVAL, "JSONL"], ["openai"], "eval"),
            ("casa-eval", ["mme", "--model", CHECKPOINT, "--data", "JSONL"], VLLM, "cpu"),
        ),
        *cases(("casa-train-digits", ["--output", "out"], EVERYTHING, "digits")),
    ],
)
def test_a_missing_package_is_one_sentence(tmp_path, video, mme, command, arguments, blocked, extra):
    files = {"VIDEO": video, "PARQUET": mme / "parquet", "JSONL": mme / "jsonl", CHECKPOINT: checkpoint_path()}
    arguments = [str(files.get(word, word)) for word in arguments]
    status, words = run(tmp_path, blocked, command, *arguments)
    assert "Traceback" not in words
    assert status == 1, words
    (sentence,) = [line for line in words.splitlines() if line.startswith(f"{command}: ")]
    assert f"'casa-engine[{extra}]'" in sentence


def test_the_sentence_says_the_name_that_the_command_was_called_by(tmp_path):
    status, words = run(tmp_path, EVERYTHING, "casa", "serve")
    assert status == 1, words
    assert words.startswith("casa serve: the package 'vllm' is not installed")


def test_completion_leaves_out_the_options_of_what_is_not_installed(tmp_path):
    status, words = run(tmp_path, EVERYTHING, "casa", "completion", "bash")
    assert status == 0, words
    assert "Traceback" not in words
    assert "casa completion: some options are left out: the package 'vllm' is not installed" in words


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        *cases(
            ("casa-checkpoint", ["random", "tiny-qwen", "tiny"]),
            ("casa-export", ["--help"]),
        )
    ],
)
def test_what_needs_no_extra_runs_without_any(tmp_path, command, arguments):
    status, words = run(tmp_path, EVERYTHING, command, *arguments)
    assert status == 0, words


def test_captions_of_a_server_need_no_vllm(tmp_path, video):
    """Only `live` is there: the command comes as far as asking the server, which is not there."""
    blocked = [name for name in EVERYTHING if name not in LIVE]
    status, words = run(tmp_path, blocked, "casa-caption", video, *SERVER)
    assert status == 1
    assert "The server 'http://127.0.0.1:9' cannot be used" in words


@slow
@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_the_core_what_the_command_needs_is_named_whole(tmp_path, module):
    """Not the core alone: the next thing to be missing would be that extra."""
    status, words = run(tmp_path, [module], "casa-eval-digits", "--scale", "0.01")
    assert status == 1
    assert "Traceback" not in words
    advice = "Install what this command needs: pip install 'casa-engine[digits]'."
    assert f"the package {module!r} is not installed. {advice}" in words


BROKEN = """raise RuntimeError("operator torchvision::nms does not exist")"""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        *cases(
            ("casa-serve", []),
            ("casa-serve", ["--ray"]),
            ("casa-caption", ["VIDEO"]),
            ("casa-checkpoint", ["random", "tiny-qwen", "tiny"]),
            ("casa-eval-digits", []),
            ("casa-export", ["out"]),
        )
    ],
)
def test_a_torchvision_for_cuda_beside_torch_for_cpus_is_one_sentence(tmp_path, video, command, arguments):
    """As PyPI's torchvision beside the build for CPUs: installed, and an error of torch's when it is imported."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN)
    data = tmp_path / "torchvision-0.28.0.dist-info"
    data.mkdir()
    (data / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    arguments = [video if word == "VIDEO" else word for word in arguments]
    status, words = run(tmp_path, [""], command, *arguments)
    assert "Traceback" not in words
    assert status == 1, words
    assert f"{command}: the package 'torchvision' does not fit the installed torch" in words
    assert "pip uninstall torchvision" in words


def test_another_error_keeps_its_traceback():
    for error in (RuntimeError("something else"), ImportError("cannot import name 'x' from 'vllm'", name="vllm")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error), match=str(error)[:10]):
            missing.run("casa-serve", lambda fail=fail: fail, "cpu")


def test_every_console_script_is_one_of_these():
    scripts = [script for script in entry_points(group="console_scripts") if script.name.startswith("casa")]
    # How many there are is said by test_every_command_has_both_names.
    assert {"casa", "casa-serve"} <= {script.name for script in scripts}
    assert {script.module for script in scripts if script.name != "casa"} == {"casa_commands.scripts"}
    assert all(callable(script.load()) for script in scripts)
