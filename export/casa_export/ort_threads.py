"""How ONNX Runtime uses the processor: threads by the size of the model, asleep while they have nothing to do.

Threads of ONNX Runtime spin by default: they burn their core between two operations, which on a busy machine takes it
from the very work they wait for. By default they also bind themselves to every core of the machine, even to those that
this process was not given. A small model gains nothing from a second thread anyhow: its operations end before another
core has begun. benchmarks/export_threads.py measures all that.
"""

import os

import onnxruntime as ort

# Weights in bytes from which an operation is long enough for another thread.
MIN_BYTES_FOR_THREADS = 64 << 20


def choose_threads(weight_bytes: int) -> int:
    """Return the threads within an operation for graphs of this size: 1, or the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if weight_bytes >= MIN_BYTES_FOR_THREADS else 1


def session_options(num_threads: int) -> ort.SessionOptions:
    """Return options of a session whose operations use so many threads, none of which spins."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options
