"""The replaced function of vLLM's command is the one that its replacement was written for."""

import pytest

from casa_serving.drain.startup_patch import replace_run_server

pytestmark = pytest.mark.vllm


def test_another_vllm_is_noticed(monkeypatch):
    from vllm.entrypoints.cli import serve

    async def run_server(args):
        pass

    monkeypatch.setattr(serve, "run_server", run_server)
    with pytest.raises(RuntimeError, match=r"run_server has changed: see what casa_serving\.drain\.startup_patch does"):
        replace_run_server(lambda: None)
    assert serve.run_server is run_server


def test_vllms_own_is_replaced(monkeypatch):
    from vllm.entrypoints.cli import serve

    before = serve.run_server
    monkeypatch.setattr(serve, "run_server", before)
    replace_run_server(lambda: None)
    assert serve.run_server is not before
