"""The environment of a CASA engine, by itself: the engine's process is started with it before torch is imported."""

from __future__ import annotations

# vLLM's name of the media connector that guards images; endpoint/plugin_entry.py registers it.
CONNECTOR = "casa_guarded"
# Timeout of an idle connection: longer than clients and load balancers keep it (OpenAI's client 5 s, others up to
# 60 s). If the server closes first, as vLLM does after 5 s, the next request on it may be lost.
KEEP_ALIVE_S = 75


def environment(*, embedded: bool, on_cpu: bool, eager: bool) -> dict[str, str]:
    """Return the environment variables that vLLM has no option for, and the one that installs the image guard.

    Args:
        embedded: Whether the embedded model is served.
        on_cpu: Whether vLLM will run on the CPU.
        eager: Whether the model is not compiled.
    """
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MEDIA_CONNECTOR": CONNECTOR,
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
        # As `vllm serve` has it: an engine inherits nothing of CUDA's, and no threads, from the server.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if on_cpu:
        # Pinning threads to cores needs the right to do so, which containers often lack, and
        # it leaves a core idle on small machines.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if eager:
            # vLLM compiles parts of its sampler even then, in the first request that needs them: that takes a C++
            # compiler and seconds, and a server that is killed meanwhile leaves a truncated library in torch's cache,
            # which crashes the engine of every later one.
            variables["TORCHDYNAMO_DISABLE"] = "1"
        if embedded:
            variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
            # Its matrices are too small to be shared between threads, and threads that wait
            # for each other on a busy machine make it many times slower.
            variables["OMP_NUM_THREADS"] = "1"
    return variables
