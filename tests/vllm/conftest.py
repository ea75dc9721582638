"""Tiny checkpoints, their eager models, and one engine at a time."""

import pytest
from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config
from vllm_harness import Eager, Engine


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a tiny random checkpoint, written once: checkpoints(preset, **config fields)."""
    folders = {}

    def folder_of(preset, **fields):
        key = repr((preset, sorted(fields.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("checkpoint")
            write_random_checkpoint(preset_config(preset, **fields), folders[key])
        return folders[key]

    return folder_of


@pytest.fixture(scope="session")
def eager():
    """The eager model of a folder, loaded once."""
    models = {}

    def model_of(folder):
        if folder not in models:
            models[folder] = Eager(folder)
        return models[folder]

    return model_of


@pytest.fixture(scope="module")
def engine():
    """An engine of this module; asking for another closes the one before."""
    current = {}

    def engine_of(folder, **options):
        key = repr((folder, sorted(options.items())))
        if key not in current:
            while current:
                current.popitem()[1].close()
            current[key] = Engine(folder, **options)
        return current[key]

    yield engine_of
    while current:
        current.popitem()[1].close()
