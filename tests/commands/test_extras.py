"""Each extra alone, in a clean environment with this checkout's wheel: its commands run, or say what to install."""

import os
import subprocess

import pytest

SERVER = ["--server", "http://127.0.0.1:9"]
DIGITS = ["casa-digits-video", "out.mp4", "--seconds", "1", "--scale", "1"]
# Extra -> command lines, exit status, and what is printed: a result or one sentence.
COMMANDS = {
    "": [
        (["casa-checkpoint", "random", "tiny-qwen", "tiny"], 0, "tiny: tiny-qwen"),
        (["casa-eval-digits", "--base-url", "http://127.0.0.1:9/v1"], 1, "'casa-engine[serving]'"),
        (["casa-eval-digits"], 1, "'casa-engine[digits]'"),
        (["casa-serve"], 1, "'casa-engine[cpu]'"),
        (["casa-caption", "out.mp4"], 1, "'casa-engine["),
        (["casa-export", "out"], 1, "'casa-engine[export]'"),
        (DIGITS, 1, "'casa-engine[digits]'"),
    ],
    "eval": [
        (["casa-eval", "mme", "--url", "http://127.0.0.1:9", "--data", "."], 1, "there is no test*.parquet"),
        (["casa-eval", "mme", "--model", "nowhere", "--data", "."], 1, "there is no test*.parquet"),
    ],
    "digits": [
        (DIGITS, 0, "truth in out.json"),
        (["casa-eval-digits", "--base-url", "http://127.0.0.1:9/v1"], 1, "'casa-engine[serving]'"),
    ],
    "digits,serving": [
        (["casa-eval-digits", "--base-url", "http://127.0.0.1:9/v1"], 1, "the connection to http://127.0.0.1:9")
    ],
    "digits,live": [
        (DIGITS, 0, "truth in out.json"),
        (["casa-caption", "out.mp4", *SERVER], 1, "The server 'http://127.0.0.1:9' cannot be used"),
        (["casa-caption", "out.mp4"], 1, "'casa-engine[cpu]'"),
        (["casa-caption", "http://example.org/v.mp4", *SERVER], 1, "casa-caption: "),
    ],
    "export": [
        (["casa-export", "out", "--trt"], 1, "'casa-engine[trt]'"),
        (["casa-export", "out", "--no-validate"], 0, "out: "),
    ],
    "trt": [(["casa-export", "out", "--no-validate"], 0, "out: ")],
    "ray": [(["casa-serve", "--ray"], 1, "'casa-engine[cpu]'")],
    "cpu": [
        (["casa-serve", "--help"], 0, "casa-serve [CHECKPOINT] [options]"),
        (["casa-serve", "--ray"], 1, "'casa-engine[ray]'"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", COMMANDS)
def test_an_extra_alone_runs_its_commands_or_says_what_is_missing(extra, wheel, environment, requirements, tmp_path):
    bin_folder, installer = environment
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    installer.resolve([wanted], torch=requirements.torch_build("cpu"), upgrade=False)
    for command, status, words in COMMANDS[extra]:
        done = subprocess.run(
            [bin_folder / command[0], *command[1:]],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=600,
        )
        output = done.stdout + done.stderr
        assert "Traceback" not in output, f"{command}: {output}"
        assert (done.returncode, words in output) == (status, True), f"{command}: {output}"
