"""Everything that an object holds, as plain values that can be compared."""

import dataclasses
from typing import Any

import numpy as np
import torch


def snapshot(value: Any) -> Any:
    """A deep copy of tensors (with dtype and shape), arrays, lists, dicts and attributes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tolist()
    if isinstance(value, dict):
        return {key: snapshot(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(each) for each in value]
    if type(value).__name__ == "OrtValue":
        return snapshot(value.numpy())
    if dataclasses.is_dataclass(value) or type(value).__name__ in ("CasaCache", "DynamicLayer"):
        # transformers marks a cache that it was given with `_is_user_defined`.
        names = [name for name in vars(value) if name not in ("config", "_is_user_defined")]
        return {name: snapshot(getattr(value, name)) for name in names}
    return value if isinstance(value, (int, float, str, bool, type(None), set)) else repr(value)
