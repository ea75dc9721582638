"""Lets vLLM's Model Runner V2 run on a CPU, through Triton's interpreter. Test support only.

The second runner is made of Triton kernels. vLLM uses it where it finds one active Triton driver,
which a CPU has not: this stands one in and switches Triton's interpreter on, so that the code
that runs on a GPU is exercised without one, at about 45 tokens/s.

Load it before vLLM and Triton are imported, in a process of its own:
`python -m pytest -p interpreted_triton ...` with `tests/support` on PYTHONPATH.
"""

import importlib.metadata
import os
import sys
from types import SimpleNamespace

import pytest

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class _AlwaysActive:
    """A driver that vLLM counts; the interpreter never asks it for anything."""

    @staticmethod
    def is_active() -> bool:
        return True


def enable() -> None:
    """Set the environment, the stand-in driver and the version that vLLM looks for."""
    if "triton" in sys.modules or "vllm" in sys.modules:
        raise RuntimeError("interpreted_triton must be loaded before triton and vllm")
    os.environ.update(ENVIRONMENT)
    real_version = importlib.metadata.version

    def version(distribution: str) -> str:
        # vLLM 0.29 asks for the version of `vllm`, which the distribution vllm-cpu lacks.
        if distribution == "vllm":
            return real_version("vllm-cpu") + "+cpu"
        return real_version(distribution)

    importlib.metadata.version = version
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(compiler=None, driver=_AlwaysActive)


@pytest.fixture(autouse=True, scope="session")
def plain_weights():
    """Linear layers keep their weights, as on a GPU; on a CPU vLLM packs them and drops the plain ones."""
    import torch
    from vllm.model_executor.layers import utils

    def keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep)
        yield


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """The interpreter runs a GPU's programs one by one: 2 splits of the keys show what 32 do."""
    from casa_vllm.ops import triton_window_attention

    monkeypatch.setattr(triton_window_attention, "MAX_SPLITS", 2)


enable()
