"""For all tests: Ctrl-C is what it is in a terminal."""

import signal

# A shell has what it runs in the background ignore SIGINT, and so would all processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
