"""Runs a command; where a package is missing or cannot be imported, one message names what to install.

Each extra of the distribution installs what some commands need (pyproject.toml). A command must not end in a traceback
because its extra was not asked for, wherever in its code, or in that of others, the import stands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

# The modules that an extra brings. What is not here comes with vLLM, or with every install.
MODULES_OF_EXTRA = {
    "cpu": ("vllm",),
    "serving": ("openai",),
    "eval": ("openai", "pyarrow"),
    "digits": ("sklearn",),
    "live": ("av", "imageio_ffmpeg", "pydantic", "pysubs2", "websockets", "yarl"),
    "ray": ("jsonref", "jsonschema", "pandas", "pyarrow", "ray", "typer"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "trt": ("tensorrt_rtx",),
}
INSTALL = {
    "cpu": "pip install 'casa-engine[cuda]' with an NVIDIA GPU, 'casa-engine[cpu]' without (docs/quickstart.md)",
    "": "pip install casa-engine",
}
# Wheels for CUDA of these install beside torch's CPU build, and fail when they are imported.
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def run(command: str, load: Callable[[], Callable[[], int | None]], *extras: str) -> int:
    """Run a command; return its exit status, 1 where a package is missing.

    Args:
        command: Its name, for messages.
        load: Imports the command and returns its main function.
        extras: Extras with what it needs, the one that it always needs first; `cpu` stands for `cuda` too.
    """
    try:
        return load()() or 0
    except (ImportError, OSError, RuntimeError) as error:
        sentence = explain(error, extras)
        if sentence is None:
            raise
        print(f"{command}: {sentence}", file=sys.stderr)
        return 1


def explain(error: Exception, extras: tuple[str, ...]) -> str | None:
    """Return what to install or to remove, or None where the error is something else.

    Args:
        error: What ended the command.
        extras: As for `run`.
    """
    module = missing_module(error, extras)
    if module is not None:
        advice = extra_of(module, extras)
        install = INSTALL.get(advice, f"pip install 'casa-engine[{advice}]'")
        return f"the package {module!r} is not installed. Install what this command needs: {install}."
    for name in MEDIA_PACKAGES:
        reason = import_failure(name)
        if reason is not None:
            return (
                f"the package {name!r} does not fit the installed torch ({reason}). It is not needed: "
                f"pip uninstall {name}."
            )
    return None


def missing_module(error: Exception, extras: tuple[str, ...]) -> str | None:
    """Return the top-level module whose absence made an import fail, if that was the reason."""
    if not isinstance(error, ImportError):
        return None
    name = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and name and not is_installed(name):
        return name
    # Some packages look themselves, and raise an error that names no module.
    needed = (module for extra, modules in MODULES_OF_EXTRA.items() if extra in extras for module in modules)
    return None if name else next((module for module in needed if not is_installed(module)), None)


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be found."""
    return find_spec(module) is not None


def extra_of(module: str, extras: tuple[str, ...]) -> str:
    """Return the extra that brings a module to a command, its first one for what is of none; "" where it has none."""
    for extra in extras:
        if module in MODULES_OF_EXTRA.get(extra, ()):
            return extra
    if "cpu" in extras and not is_installed("vllm"):
        return "cpu"
    return extras[0] if extras else ""


def import_failure(name: str) -> str | None:
    """Return why an installed package cannot be imported, None where it can or is not installed."""
    if not is_installed(name):
        return None
    try:
        import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(str(error).split())[:200]
    return None
