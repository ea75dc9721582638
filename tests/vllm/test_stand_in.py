"""The engine starts on a GPU that pretends: host code, compilation and capture are real, kernels do nothing.

Slow, and only where CASA_STAND_IN names a program that runs a command under stand-ins of the CUDA libraries, with a
Python that has vLLM for CUDA (docs/gpu.md says how to make one on any x86-64 machine):

    CASA_STAND_IN=/path/to/run pytest -m slow tests/vllm/test_stand_in.py
"""

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = os.environ.get("CASA_STAND_IN")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(STAND_IN is None, reason="CASA_STAND_IN names no stand-ins of the CUDA libraries"),
]
# An idle machine needs 100 s at most; one with much other work has needed more than 400.
LIMIT_S = 1200
# Of benchmarks/gpu/live_steps.py.
CHUNK_TOKENS = 20
FOLDERS = ("", "plugins", "serving", "models", "benchmarks", "benchmarks/gpu", "tests/support")
# What the tests' engines on CPUs set (vllm_harness.py; the last one vLLM); with the first, nothing is compiled.
OF_CPUS = ("TORCH_COMPILE_DISABLE", "OMP_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK")
MODES = ("eager", "graphs", "compile")
STARTS = [
    ("tiny-llama", "eager"),
    ("tiny-qwen", "graphs"),
    ("tiny-llama", "compile"),
    *((preset, mode) for preset in ("CASA-Helium1-VL-2B", "CASA-Qwen2_5-VL-3B-LiveCC") for mode in MODES),
]


def environment(**variables):
    paths = [str(ROOT / folder) for folder in FOLDERS]
    variables |= {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("CASA_STAND_IN_PATH", "")])}
    inherited = {key: value for key, value in os.environ.items() if key not in OF_CPUS}
    return {**inherited, "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "WARNING", **variables}


def run_benchmark(script, *arguments):
    """Run a script of benchmarks/gpu under the stand-ins; return the objects that it printed."""
    done = subprocess.run(
        [STAND_IN, "python3", str(ROOT / "benchmarks/gpu" / script), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        # PyTorch itself tells what waits for the device, whatever the device is.
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_GPU_SYNC_CHECK="error"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("preset", "mode"), STARTS)
def test_an_engine_starts_and_decodes_in_one_replay(preset, mode):
    lines = run_benchmark("host_time.py", preset, "--mode", mode, "--sequences", "1", "8")
    assert len(lines) == 3
    assert not lines[0]["compiled"], "a kernel is compiled inside a request"
    for decode in lines[1:]:
        assert decode["running"] == decode["sequences"]
        if mode != "eager":
            assert decode["a_step"]["replays"] == 1, "a decode step is one graph"


@pytest.mark.parametrize(
    ("preset", "mode"), [("CASA-Helium1-VL-2B", "compile"), ("CASA-Qwen2_5-VL-3B-LiveCC", "graphs")]
)
def test_steps_of_live_sessions(preset, mode):
    """Nothing is compiled once sessions are there, no step waits for the device, a frame's text is one replay."""
    lines = run_benchmark("live_steps.py", preset, "--mode", mode)
    sessions = [line for line in lines if "sessions" in line]
    assert [line["sessions"] for line in sessions] == [1, 8, 32, 128]
    assert all(line["compiled"] == [] for line in sessions), "a kernel is compiled inside a request"
    steps = [line for line in lines if "chunks" in line]
    # Both modes have graphs up to 256 tokens; of "compile" the largest has 512. The encoder is one more replay.
    short = [line for line in steps if line["decoding"] + CHUNK_TOKENS * line["chunks"] <= 256]
    kinds = {(line["decoding"] > 0, min(line["chunks"], 2)) for line in short}
    assert kinds >= {(True, 0), (True, 1), (True, 2), (False, 1)}
    assert all(line["replays"] == 1 + (line["images"] > 0) for line in short)


@pytest.mark.parametrize("arguments", [[], ["CHECKPOINT"], ["CHECKPOINT", "--enforce-eager"]], ids=" ".join)
def test_casa_serve_starts(arguments, checkpoints, tmp_path):
    """Asking whether there is a GPU must not touch CUDA, which does not survive the fork of the engine's process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(checkpoints("tiny-llama", fusion="ca"))
    words = [folder if word == "CHECKPOINT" else word for word in arguments]
    serve = "import sys; from casa_commands.scripts import serve; serve()"
    command = [STAND_IN, "python3", "-c", serve, *words, "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment())
    try:
        begun = time.monotonic()
        while not is_healthy(port):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() - begun < LIMIT_S, "the server is not ready"
            time.sleep(1)
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def is_healthy(port):
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False
