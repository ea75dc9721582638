"""What a process prints when it ends: of a CASA engine all but triton's bindings, of other models everything.

That servers and engines are among the first is shown by tests/serving/test_shutdown.py.
"""

import os
import subprocess
import sys

import pytest

# Registers exit handlers before and behind the plugin's, leaks an object of triton's bindings, and ends by an error.
PROGRAM = """
import atexit, ctypes, os, sys
atexit.register(os.write, 2, b"first handler\\n")
from triton._C.libtriton import ir
ctypes.pythonapi.Py_IncRef(ctypes.py_object(ir.context()))
if sys.argv[1] == "casa":
    from casa_vllm.exit_messages import close_error_output_at_exit
    close_error_output_at_exit()
else:
    import casa_vllm
    casa_vllm.register()
atexit.register(os.write, 2, b"last handler\\n")
raise SystemError("the end")
"""


@pytest.mark.parametrize("model", ["casa", "another"])
def test_only_the_bindings_messages_of_a_casa_process_are_kept_back(model: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-P", "-c", PROGRAM, model]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    for words in ("SystemError: the end", "first handler", "last handler"):
        assert words in run.stderr
    assert ("nanobind: leaked" in run.stderr) == (model == "another")
