"""The captioner's rules (`casa_engine.live.caption_logits`, the reference) for all rows of a batch at once.

    remembered.py     what a chunk brings, as arrays: counts that are ready for its first choice
    table.py          one row a request, kept on the device: written when a chunk arrives, updated there
    tensors.py        the tensors of the table
    numpy_rules.py    the rules in NumPy, for CPUs
    triton_rules.py   the same as two kernels, for GPUs

A step neither waits for the device nor copies to it, unless a chunk has arrived: the token sampled last, the counts
and the last tokens are read and written there.
"""

from casa_vllm.caption_rules.table import CaptionTable

__all__ = ["CaptionTable"]
