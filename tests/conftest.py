"""For all tests: Ctrl-C is what it is in a terminal, and asynchronous tests run in asyncio and end."""

import inspect
import signal

import pytest

# A shell has what it runs in the background ignore SIGINT, and so would all processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ASYNC_TIMEOUT_S = 180


@pytest.fixture
def anyio_backend():
    """What anyio's plugin runs asynchronous tests in: the event loop of vLLM and Ray."""
    return "asyncio"


def pytest_collection_modifyitems(items):
    """Bounds every asynchronous test: one that waits for what never comes would wait for ever."""
    for item in items:
        if inspect.iscoroutinefunction(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.timeout(ASYNC_TIMEOUT_S, func_only=True))
