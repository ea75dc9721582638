"""Tiny random checkpoints, all with the same decoder."""

import pytest

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    """Folder of a tiny random model of a fusion, written once."""
    folders = {}

    def folder_of(fusion):
        if fusion not in folders:
            folders[fusion] = tmp_path_factory.mktemp("bench") / fusion
            write_random_checkpoint(preset_config("tiny-llama", fusion=fusion), folders[fusion])
        return folders[fusion]

    return folder_of
