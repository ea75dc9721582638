"""Tiny checkpoints, their eager models, and one engine at a time."""

import json

import pytest

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.presets import preset_config
from vllm_harness import Eager, Engine


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a tiny random checkpoint, written once: checkpoints(preset, **config fields).

    Images are at most 128 tokens, so that few pages are enough to start an engine.
    """
    folders = {}

    def folder_of(preset, **fields):
        key = repr((preset, sorted(fields.items())))
        if key not in folders:
            folder = folders[key] = tmp_path_factory.mktemp("checkpoint")
            write_random_checkpoint(preset_config(preset, **fields), folder)
            # transformers writes the image processor's settings into one of these.
            for name in ("preprocessor_config.json", "processor_config.json"):
                if (folder / name).is_file():
                    settings = json.loads((folder / name).read_text())
                    images = settings.get("image_processor", settings)
                    if "size" in images:
                        images["size"]["longest_edge"] = 128 * 28 * 28
                        (folder / name).write_text(json.dumps(settings))
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
