"""A process for the engine that is started before vLLM has a use for it, for vLLM 0.29.0.

    server   begin --- imports vLLM, reads options, configures --- vLLM's `Process(...).start()` --- requests
    engine         --- imports vLLM --- waits for                      environment and arguments --- engine

vLLM starts the engine's process when the server's configuration is complete, and there everything is imported once
more: with two cores or more the two imports need not wait for each other. There is no hook: `CoreEngineProcManager`
asks `get_mp_context` for a context to start its process with. The replacement gives it one whose process is this one,
an ordinary child of `spawn` otherwise: same parent, name, sentinel, exit.

What an interpreter, a dynamic linker or torch reads once, in the beginning, cannot be changed later. So the process is
used only if it was started with what the server has in its environment by then; else vLLM starts one as ever.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from importlib.util import find_spec
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from casa_serving.engine_environment import environment

logger = logging.getLogger("vllm.casa_early_engine")
# vLLM's name of the only engine of a server.
NAME = "EngineCore"
REPLACED = (
    "context = get_mp_context()",
    "context.Process(\n                    target=EngineCoreProc.run_engine_core,\n                    name=",
    "proc.start()",
)
# Variables that are read once and early begin so, but for those that torch sets by itself when it is imported.
READ_EARLY = ("LD_PRELOAD", "PYTHON", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH")
SET_BY_TORCH = {"TORCHINDUCTOR_CACHE_DIR"}


class EarlyEngine(SpawnProcess):
    """Process that imports what an engine needs, and runs whatever `start` is called for.

    Attributes:
        is_used: Whether it has got its work.
        started_with: The environment of its first moment.
    """

    def __init__(self, receiver: connection.Connection) -> None:
        super().__init__(name=NAME)
        self._receiver = receiver
        self._work: tuple[Callable[..., None], dict[str, Any]] | None = None
        self.started_with: dict[str, str] = {}
        self.is_used = False

    @classmethod
    def begin(cls) -> EarlyEngine:
        """Start the process, which ends with this one, however that ends."""
        receiver, sender = connection.Pipe(duplex=False)
        process = cls(receiver)
        process._launch(sender)
        receiver.close()
        # Python itself would wait for it.
        atexit.register(process.discard)
        return process

    def _launch(self, sender: connection.Connection) -> None:
        resource_tracker.ensure_running()  # It unblocks signals.
        # A terminal's Ctrl-C is the server's to answer; the engine's process ignores it until it is used.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with engine_environment():
                self.started_with = dict(os.environ)
                super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._sender = sender

    def discard(self) -> None:
        """End the process unless it is used."""
        if not self.is_used:
            self.kill()
            self.join()

    def objection(self) -> str | None:
        """Return why it cannot be the engine's, None if it can."""
        if self.exitcode is not None:
            return f"it has ended with {self.exitcode}"
        before, now = self.started_with, dict(os.environ)
        changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} - SET_BY_TORCH
        read_early = sorted(name for name in changed if name.startswith(READ_EARLY))
        return f"it was started with another {', '.join(read_early)}" if read_early else None

    def give(self, target: Callable[..., None], kwargs: dict[str, Any]) -> EarlyEngine:
        """Set what it is to run when `start` is called; return it."""
        self._work, self.is_used = (target, kwargs), True
        return self

    def start(self) -> None:
        """Send the process its environment and its work."""
        try:
            self._sender.send(dict(os.environ))
            self._sender.send(self._work)
        except BrokenPipeError:
            pass  # It has ended, which vLLM sees by itself.
        finally:
            self._work = None
            self._sender.close()

    def run(self) -> None:
        """Run in the process itself."""
        import setproctitle  # comes with vLLM

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        # Where a process's title stands is found from its environment, which is replaced below.
        setproctitle.getproctitle()
        threading.Thread(target=self._exit_with_server, name="casa-early-engine", daemon=True).start()
        failure = None
        try:
            self.prepare()
        except (ImportError, OSError, RuntimeError) as error:
            failure = error  # The server is about to meet it too, and to explain it; if not, it is raised below.
        try:
            variables = self._receiver.recv()
        except EOFError:
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if failure is not None:
            raise failure
        os.environ.clear()
        os.environ.update(variables)
        target, kwargs = self._receiver.recv()
        self._receiver.close()
        target(**kwargs)

    def prepare(self) -> None:
        """Import what the engine needs."""
        from casa_vllm.api import import_cpu_engine

        import_cpu_engine()

    def _exit_with_server(self) -> None:
        """Exit the process when the server has ended, though it was killed; vLLM's own would stay for ever."""
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)


class EarlyContext(SpawnContext):
    """vLLM's context, whose first process is one that runs already."""

    def __init__(self, early_engine: EarlyEngine) -> None:
        self._early_engine = early_engine

    def Process(self, *, target: Callable[..., None], name: str, kwargs: dict[str, Any]) -> SpawnProcess:  # noqa: N802
        """Return the process for an engine."""
        if self._early_engine.is_used:
            return SpawnProcess(target=target, name=name, kwargs=kwargs)
        objection = self._early_engine.objection() if name == NAME else f"the engine is {name}"
        if objection is None:
            logger.info("The engine's process is %s, which was started early.", self._early_engine.pid)
            return self._early_engine.give(target, kwargs)
        logger.warning("The process that was started early cannot be the engine's: %s. Another is started.", objection)
        self._early_engine.discard()
        return SpawnProcess(target=target, name=name, kwargs=kwargs)


def replace_engine_process(early_engine: EarlyEngine) -> None:
    """Make vLLM use this process for its engine.

    Raises:
        RuntimeError: vLLM's function is not the one that this was written for.
    """
    from vllm.v1.engine import utils

    source = inspect.getsource(utils.CoreEngineProcManager.__init__)
    if not all(line in source for line in REPLACED):
        raise RuntimeError("vLLM's CoreEngineProcManager has changed: see what casa_serving.early_engine does to it.")
    get_mp_context = utils.get_mp_context

    def get_early_context() -> SpawnContext:
        get_mp_context()  # It sets variables.
        return EarlyContext(early_engine)

    utils.get_mp_context = get_early_context


@contextmanager
def engine_environment() -> Iterator[None]:
    """Set what the engine's environment will be, for the processes that are started meanwhile."""
    before = dict(os.environ)
    variables = environment(embedded=True, on_cpu=True, eager=True)
    # What vLLM sets on a CPU (`CpuPlatform.check_and_update_config`).
    variables |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
    if libraries := preloaded_libraries():
        variables["LD_PRELOAD"] = ":".join(libraries)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def preloaded_libraries() -> list[str]:
    """Return the libraries that vLLM preloads into an engine on a CPU: its allocator's and torch's OpenMP."""
    torch, vllm = (Path(find_spec(name).origin).parent for name in ("torch", "vllm"))
    allocators = [f"{vllm}/libs/libtcmalloc_minimal*.so*", f"{vllm}/libs/libtcmalloc.so*"]
    openmp = [f"{torch.parent}/torch.libs/libgomp*.so*", f"{torch}/lib/libgomp*.so*"]
    candidates = ([path for pattern in patterns for path in glob(pattern)] for patterns in (allocators, openmp))
    return [paths[0] for paths in candidates if paths]
