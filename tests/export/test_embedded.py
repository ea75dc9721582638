"""The embedded model: the acceptance of its export, on questions it was trained to answer."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from casa_digits.cases import draw_suites
from casa_digits.data import draw_image, load_samples
from casa_digits.runners import EagerRunner
from casa_engine.checkpoints import load_processor
from casa_engine.digits import checkpoint_path
from casa_export import cli
from casa_export.exported_model import ExportedModel
from casa_export.validation import format_table, validate
from exports import embedded_export

PAGE = Path(__file__).parent.parent.parent / "docs" / "export.md"


def exported_runner() -> EagerRunner:
    """The evaluation's runner with the exported model in the eager one's place."""
    runner = EagerRunner.__new__(EagerRunner)
    runner.model, runner.processor = ExportedModel.load(embedded_export()), load_processor(embedded_export())
    return runner


def test_validation_table():
    comparisons = validate(checkpoint_path(), embedded_export(), num_prompts=20)
    assert {comparison.what.partition(",")[0] for comparison in comparisons} >= {"vision", "image KV", "decoder decode"}
    assert all(comparison.passed for comparison in comparisons), format_table(comparisons)


def answers(runner: EagerRunner, conversation) -> list[str]:
    """The model's answers to a conversation, with its own answers as history."""
    messages, given = [], []
    for turn in conversation:
        content = [] if turn.image is None else [{"type": "image", "image": turn.image.to_pil()}]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
        given.append(runner.answer(messages))
        messages.append({"role": "assistant", "content": given[-1]})
    return given


def test_digits_are_read_as_by_the_eager_model():
    """A tenth of the digits test; benchmarks/export_digits.py runs all of it."""
    eager, exported = EagerRunner(checkpoint_path()), exported_runner()
    for suite in draw_suites(seed=0, scale=0.1):
        num_right = 0
        for conversation in suite.conversations:
            expected = answers(eager, conversation)
            assert answers(exported, conversation) == expected
            num_right += expected[-1] == conversation[-1].expected
        # What the eager model itself must reach is for tests/digits to say; this rules out equal nonsense.
        assert suite.name != "read" or num_right >= 0.9 * len(suite.conversations)


def picture(seed: int):
    """An image of held-out digits whose sides are multiples of 28 px."""
    return draw_image(np.random.default_rng(seed), load_samples(held_out=True)).to_pil()


def test_run_prints_the_answer(tmp_path, capsys):
    image = picture(5)
    image.save(tmp_path / "digits.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Read the digits."}]}
    ]
    expected = exported_runner().answer(messages)
    options = ["--image", str(tmp_path / "digits.png"), "--prompt", "Read the digits."]
    assert cli.main(["run", str(embedded_export()), *options]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_example_of_the_page_needs_only_onnxruntime_and_numpy(tmp_path):
    """Run the page's program where importing torch, transformers or anything of ours is an error."""
    program = re.search(r"^```python example\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    forbidden = (
        "import sys\nfor name in ('torch', 'transformers', 'tokenizers', 'casa_engine', 'casa_export', 'PIL'):\n"
    )
    (tmp_path / "example.py").write_text(forbidden + "    sys.modules[name] = None\n" + program)
    image = picture(6)
    np.save(tmp_path / "digits.npy", np.asarray(image))
    question = [{"type": "image", "image": image}, {"type": "text", "text": "Read the digits."}]
    expected = EagerRunner(checkpoint_path()).answer([{"role": "user", "content": question}])
    run = subprocess.run(
        [sys.executable, "example.py", str(embedded_export()), "digits.npy", "Read the digits."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (run.stderr, run.stdout.strip()) == ("", expected)
