"""The check of one tensor's kind: that it is a tensor, its dtype, its shape and its device."""

from typing import Any

import torch
from torch import Tensor

from casa_engine.errors import InputError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KINDS = {
    "int": ("whole numbers", lambda dtype: dtype in INTEGERS),
    "mask": ("whole numbers or bool", lambda dtype: dtype in INTEGERS or dtype == torch.bool),
    "float": ("floating point numbers", lambda dtype: dtype.is_floating_point),
}


def check_tensor(
    name: str, value: Any, kind: str, shape: tuple[int | str, ...], device: torch.device, small: bool = False
) -> None:
    """Check one argument of a call.

    Args:
        name: Of the argument, for the message.
        value: What was given.
        kind: A key of `KINDS`.
        shape: Sizes of its axes; a name means any size.
        device: Where it should lie.
        small: Whether it may lie on the CPU as well, because it is read there.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a tensor.")
    words, fits = KINDS[kind]
    if not fits(value.dtype):
        raise InputError(f"{name} has dtype {value.dtype}; expected {words}.")
    if value.ndim != len(shape) or any(
        isinstance(size, int) and size != got for size, got in zip(shape, value.shape, strict=True)
    ):
        expected = ", ".join(map(str, shape))
        raise InputError(
            f"{name} has shape {tuple(value.shape)}; expected ({expected}). Put what CasaProcessor returned for "
            "several prompts together with torch.cat along the first axis, not with torch.stack."
        )
    if value.device != device and not (small and value.device.type == "cpu"):
        raise InputError(f"{name} is on {value.device}; expected {device}: move the inputs with .to({str(device)!r}).")
