"""Tiny random models, built once for each configuration that a test asks for."""

import functools

import pytest
import torch

from casa_engine.checkpoints import random_model
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.presets import preset_config

GRIDS = torch.tensor([[1, 4, 6], [1, 6, 4], [1, 2, 10], [1, 4, 4]])  # in patches: 6, 6, 5 and 4 image tokens


@functools.cache
def build(preset: str, fields: tuple) -> CasaForConditionalGeneration:
    return random_model(preset_config(preset, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields}))


@pytest.fixture
def tiny():
    """Build (or reuse) a tiny model: tiny("tiny-qwen", fusion="ca")."""

    def make(preset: str, **fields) -> CasaForConditionalGeneration:
        return build(preset, tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in fields.items())))

    return make


@pytest.fixture
def images():
    """pixel_values of four images of unequal size and their grids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(int(GRIDS.prod(-1).sum()), 1176, generator=generator), GRIDS
