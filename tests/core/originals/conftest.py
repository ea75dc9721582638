"""One original of the Helium family: shared as it is, or a copy to damage."""

import shutil

import pytest

from originals import candidate_names, original_model, write_original


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals") / "original"
    return write_original(original_model("helium"), "helium", folder, candidate_names("helium"))


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")
