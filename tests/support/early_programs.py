"""Programs that start an engine's process early, whose imports are what a test makes of them; run with PYTHONPATH."""

import os
import signal
import sys
import time
from pathlib import Path

import setproctitle

from casa_serving.early_engine import EarlyContext, EarlyEngine


class QuickEngine(EarlyEngine):
    """Imports nothing."""

    def prepare(self):
        """Say in the output that it could."""
        print("prepared", os.environ["TORCHDYNAMO_DISABLE"], flush=True)


class SlowEngine(EarlyEngine):
    """Imports for ever."""

    def prepare(self):
        """Say in the output that it has begun."""
        print("begun", flush=True)
        time.sleep(600)


class BrokenEngine(EarlyEngine):
    """Cannot import."""

    def prepare(self):
        """Say in the output that it has begun."""
        print("begun", flush=True)
        raise ImportError("no such library")


def engine(path):
    """Write what an engine finds."""
    setproctitle.setproctitle("VLLM::EngineCore")
    title = Path("/proc/self/cmdline").read_text().strip("\0 ")
    handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    linker = Path("/proc/self/maps").read_text().count(f"{os.environ['LD_PRELOAD']}\n") > 0
    facts = [os.environ.get("LATE"), os.environ.get("GONE"), os.environ["OMP_NUM_THREADS"], handler, linker, title]
    Path(path).write_text(f"{os.getpid()} {os.getppid()} {facts}")


def endless(path):
    """Serve for ever."""
    Path(path).touch()
    time.sleep(600)


def main(kind, end, path):
    """Start the process and end as asked."""
    os.environ["GONE"] = "yes"
    early = {"quick": QuickEngine, "slow": SlowEngine, "broken": BrokenEngine}[kind].begin()
    assert os.environ.get("TORCHDYNAMO_DISABLE") is None
    print("pid", early.pid, flush=True)
    if end == "wait":
        time.sleep(600)
    if end == "error":
        raise SystemError("the end")
    if end == "serve":
        os.environ |= early.started_with
        EarlyContext(early).Process(target=endless, name="EngineCore", kwargs={"path": path}).start()
        time.sleep(600)
    if end == "use":
        os.environ["LATE"] = "yes"
        del os.environ["GONE"]
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["LD_PRELOAD"] = early.started_with.get("LD_PRELOAD", "")
        os.environ |= {name: value for name, value in early.started_with.items() if name.startswith("TORCH")}
        context = EarlyContext(early)
        used = context.Process(target=engine, name="EngineCore", kwargs={"path": path})
        assert used is early
        assert type(context.Process(target=engine, name="EngineCore", kwargs={"path": path})) is not type(early)
        used.start()
        used.join()
        print("ended", used.exitcode, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
