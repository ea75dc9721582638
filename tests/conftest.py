"""For all tests: Ctrl-C is what it is in a terminal, asynchronous tests run in asyncio and end, servers are shared."""

import inspect
import signal
from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

# A shell has what it runs in the background ignore SIGINT, and so would all processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ASYNC_TIMEOUT_S = 180
# Folders whose tests share a cluster, a server or exported models: one worker each.
SHARED = ("cluster", "serving", "export", "browser")
# What takes longest is run first, so that no worker is left alone with it at the end. Engines in the tests' own process
# are last: what is forked after one, as tests of killed programs do, hangs in the threads that it has left.
FIRST = ("cluster", "serving", "browser")
LAST = "vllm"


@pytest.fixture
def anyio_backend():
    """What anyio's plugin runs asynchronous tests in: the event loop of vLLM and Ray."""
    return "asyncio"


class Scheduling(LoadScopeScheduling):
    """Of several workers one runs all tests that share something, and otherwise all of a file."""

    def _split_scope(self, nodeid):
        file = PurePosixPath(nodeid.partition("::")[0])
        folder = file.parent.name
        return folder if folder in SHARED else str(file)


@pytest.hookimpl(optionalhook=True)  # also where pytest-xdist is switched off
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup`, and so a mark for each test, does nothing with pytest 9.2 (pytest-xdist 3.8)."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """Bound every asynchronous test: one that waits for what never comes would wait for ever."""
    for item in items:
        if inspect.iscoroutinefunction(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.timeout(ASYNC_TIMEOUT_S, func_only=True))
    places = {folder: place for place, folder in enumerate(FIRST)}
    places[LAST] = len(places) + 1
    items.sort(key=lambda item: places.get(item.path.parent.name, len(FIRST)))
