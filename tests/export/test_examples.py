"""The example of an export, with the embedded model."""

import pytest

from example_programs import run_example


@pytest.mark.slow
def test_export_and_run(tmp_path):
    graphs, answer = run_example("export_and_run.py", tmp_path / "digits-onnx", folder=tmp_path)
    assert graphs == "graphs: vision, image_kv, decoder"
    assert answer == "0 7 0 9"
    assert (tmp_path / "digits-onnx" / "manifest.json").is_file()
