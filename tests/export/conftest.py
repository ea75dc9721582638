"""Pairs of an eager model and its export."""

import pytest

from casa_engine.checkpoints import load_model
from casa_export.exported_model import ExportedModel
from exports import KINDS, checkpoint, export


@pytest.fixture(params=KINDS, ids="-".join, scope="package")
def pair(request):
    """Eager and exported model of each backbone and fusion."""
    return load_model(checkpoint(*request.param)), ExportedModel.load(export(*request.param), num_threads=1)


@pytest.fixture(scope="package")
def exported():
    """One exported model, where the kind does not matter."""
    return ExportedModel.load(export("qwen", "ca_tv"), num_threads=1)
