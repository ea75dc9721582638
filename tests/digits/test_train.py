"""`casa-train-digits` and its folders: a run of a few steps, refused, interrupted, repeated."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from casa_digits import progress, train
from casa_digits.evaluate import Report, Score
from casa_digits.progress import ProgressFile
from casa_digits.stages import STAGES, STEPS, option_name
from casa_engine.checkpoints import load_model
from casa_engine.digits import checkpoint_path
from killing import ended_at

SHORT = [*(f"{option_name(name)}=1" for name in STEPS), "--families=1"]


@pytest.fixture
def output(tmp_path):
    """A good checkpoint and a file of somebody's."""
    folder = shutil.copytree(checkpoint_path(), tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch):
    """Accuracy takes minutes and is not what is tested: a training of one step reads nothing anyhow."""
    monkeypatch.setattr(train, "evaluate_eager", lambda folder: Report([Score("read", 0, 1, 0.0)]))
    monkeypatch.setattr(train, "measure_accuracy", lambda *arguments: {})


def replace_stages(monkeypatch, course=None, **fields):
    """Give all stages after the first one other values, and their courses those of `course`."""
    stages = [dataclasses.replace(stage, **fields) for stage in STAGES]
    stages = [
        dataclasses.replace(stage, course=dataclasses.replace(stage.course, **(course or {}))) for stage in stages
    ]
    monkeypatch.setattr(train, "STAGES", tuple(stages))


def tree(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_run_replaces_the_checkpoint_at_its_end(output, tmp_path):
    before = tree(output)
    assert train.main([*SHORT, f"--output={output}", f"--keep-vision={tmp_path / 'vision.pt'}"]) == 0
    after = tree(output)
    assert after.keys() == before.keys() and after["notes.txt"] == b"mine"
    assert after["model.safetensors"] != before["model.safetensors"]
    assert json.loads(after["accuracy.json"])["command"].startswith("casa-train-digits --vision-steps=1")
    load_model(output)
    kept = [f"--keep-language={tmp_path / 'language.safetensors'}", *SHORT, f"--output={output}"]
    assert train.main([f"--vision-weights={tmp_path / 'vision.pt'}", *kept]) == 0
    assert tree(output)["model.safetensors"] == after["model.safetensors"]
    assert train.main([f"--language-weights={tmp_path / 'language.safetensors'}", *kept]) == 0
    assert tree(output)["model.safetensors"] == after["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "vision.pt", "language.safetensors"}


def test_run_goes_on_where_it_was_ended(output, tmp_path, monkeypatch):
    """With the same weights as without a break; a run with other options does not go on with it."""
    replace_stages(monkeypatch, course={"steps_per_pool": 1, "batch_tokens": 200})
    steps = [f"{option_name(name)}={1 if name == 'vision_steps' else 3}" for name in STEPS]
    run = [*steps, "--families=1", f"--output={output}"]
    assert train.main(run) == 0
    weights = tree(output)["model.safetensors"]
    keep = ProgressFile.keep

    def keep_and_end(self, stage, step, *state):
        keep(self, stage, step, *state)
        if (stage, step) == ended:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressFile, "keep", keep_and_end)
    tower = tmp_path / "vision.pt"
    kept = [*run, f"--progress={tmp_path / 'progress.pt'}", f"--keep-vision={tower}"]
    first, *others = [stage.course.name for stage in STAGES]
    ended = (first, 2)
    assert train.main(kept) == 1
    trained_tower = tower.read_bytes()
    monkeypatch.setattr(train, "warm_up", lambda *arguments: pytest.fail("trained the tower again"))
    assert train.main([*kept, "--seed=1"]) == 1
    for stage in others:
        ended = (stage, 2)
        assert train.main(kept) == 1
    assert train.main(kept) == 0
    assert tree(output)["model.safetensors"] == weights
    assert tower.read_bytes() == trained_tower


def test_a_model_that_misses_a_demand_replaces_none(output, tmp_path, monkeypatch, capsys):
    before, missed = tree(output), tmp_path / "model.missed"
    monkeypatch.setattr(train, "teach", lambda model, *options: model)
    monkeypatch.setattr(train, "evaluate_eager", lambda folder: Report([Score("read", 0, 1, 0.9)]))
    for _ in range(2):  # the second one replaces the first one's
        assert train.main([*SHORT, f"--output={output}"]) == 1
        said = capsys.readouterr()
        assert "MISSED" in said.out
        assert f"It is in {missed}, and {output} is as before." in said.err.splitlines()[-1]
        assert tree(output) == before
        load_model(missed)
        assert json.loads((missed / "accuracy.json").read_text())["held_out"] == {"read": 0.0}
    assert train.main([*SHORT, f"--output={tmp_path / 'new'}"]) == 1
    assert f"It is in {tmp_path / 'new'}." in capsys.readouterr().err
    load_model(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.missed", "new"}


def test_progress_belongs_to_its_courses_and_its_torch(output, tmp_path, monkeypatch, capsys):
    """And to its options; it counts the minutes of all parts, and ends with the run."""
    path, clock_s, ends = tmp_path / "progress.pt", [0.0], [True]
    run = [*SHORT, f"--output={output}", f"--progress={path}"]
    trained = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(trained.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def teach(model, processor, options, progress_file):
        clock_s[0] += 1200
        progress_file.keep("names", 1, trained, optimizer, schedule, np.random.default_rng(0))
        if ends[0]:
            raise KeyboardInterrupt
        return model

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock_s[0]))
    monkeypatch.setattr(train, "teach", teach)
    assert train.main(run) == 1 and path.exists()
    *others, last = STAGES
    last = dataclasses.replace(last, course=dataclasses.replace(last.course, batch_tokens=1))
    for name, value, words in [
        ("torch.__version__", "0.0", "another torch."),
        ("STAGES", (*others, last), f"another course {last.course.name}."),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(f"casa_digits.train.{name}", value)
            assert train.main(run) == 1
        assert f"belongs to a run with {words}" in capsys.readouterr().err
    assert train.main([*run, "--seed=1"]) == 1
    assert "another seed." in capsys.readouterr().err
    ends[0] = False
    assert train.main(run) == 0
    assert json.loads((output / "accuracy.json").read_text())["minutes"] == 40
    assert not path.exists()


def test_no_stage_sees_a_held_out_digit(output, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "warm_up", lambda tower, rng, samples, num_steps: seen.append(samples))
    monkeypatch.setattr(
        train, "teach_language", lambda model, writer, samples, *arguments, **options: seen.append(samples)
    )
    assert train.main([*SHORT, f"--output={output}"]) == 0
    assert len(seen) == len(STEPS)
    assert all(len(samples) > 1000 and (samples.indices % 5 != 0).all() for samples in seen)


@pytest.mark.parametrize(
    ("where", "error"),
    [("teach_language", KeyboardInterrupt()), ("write_live_settings", OSError(28, "No space left on device"))],
)
def test_interrupted_run_leaves_the_old(output, where, error, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise error

    before = tree(output)
    monkeypatch.setattr(train, "teach", lambda model, *options: train.teach_language(model) or model)
    monkeypatch.setattr(train, "teach_language", lambda model: None)  # a longer one is in the test above
    monkeypatch.setattr(train, where, fail)
    assert train.main([*SHORT, f"--output={output}"]) == 1
    assert tree(output) == before and list(output.parent.iterdir()) == [output]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("casa-train-digits: ") and last.endswith(".")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--threads=0", "expected 1 or more"),
        ("--seed=-1", "expected 0 or more"),
        ("--peak-rate=nan", "expected a number above 0"),
        ("--peak-rate=0", "expected a number above 0"),
        ("--vision-steps=-1", "expected 0 or more"),
        ("--keep-vision=none/vision.pt", "does not exist"),
        ("--progress=none/progress.pt", "does not exist"),
        ("--progress=model/notes.txt", "no file of --progress"),
        ("--vision-weights=none.pt", "No such file"),
        ("--vision-weights=model/notes.txt", "no file of --keep-vision"),
        ("--vision-weights=model/model.safetensors", "no file of --keep-vision"),
        ("--language-weights=model/notes.txt", "no file of --keep-language"),
        ("--keep-vision=model", "is a folder"),
        ("--keep-language=model", "is a folder"),
        ("--snapshots=model", "within each other"),
        ("--snapshots=model/snapshots", "within each other"),
        ("--snapshots=.", "within each other"),
        ("--snapshots=others", "others holds model.safetensors"),
        ("--snapshots=model.txt", "is a file"),
        ("--output=model/notes.txt", "is a file"),
    ],
)
def test_bad_options_are_refused_before_the_training(output, option, words, capsys, monkeypatch):
    monkeypatch.chdir(output.parent)
    monkeypatch.setattr(train, "warm_up", lambda *arguments: pytest.fail("trained"))
    (output.parent / "others").mkdir()
    (output.parent / "others" / "model.safetensors").write_text("somebody's")
    (output.parent / "model.txt").write_text("somebody's")
    before = tree(output.parent)
    assert train.main([*SHORT, "--output=model", option]) == 1
    assert words in capsys.readouterr().err and tree(output.parent) == before


def test_killed_run_leaves_the_old_or_the_new(output, tmp_path, monkeypatch):
    """Weights of stage 1, snapshots and the model itself: each is whole at every moment."""
    monkeypatch.setattr(train, "warm_up", lambda *arguments: None)
    monkeypatch.setattr(train, "load_samples", lambda held_out: None)
    replace_stages(monkeypatch, writer=lambda *arguments: None)
    monkeypatch.setattr(train, "teach_language", lambda *arguments, save, **options: save())
    options = [f"--output={output}", f"--snapshots={tmp_path / 'half'}", f"--keep-vision={tmp_path / 'vision.pt'}"]
    assert train.main([*SHORT, *options, "--seed=1"]) == 0
    step, seen = 0, set()
    while ended_at(step, tmp_path, lambda: train.main([*SHORT, *options])):
        found = tree(output)
        assert found.pop("notes.txt") == b"mine"
        load_model(output)
        load_model(tmp_path / "half")
        assert torch.load(tmp_path / "vision.pt", weights_only=True)
        seen.add(json.loads(found["accuracy.json"])["command"].endswith("--seed=1"))
        step += 9
    assert seen == {True, False}
    assert train.main([*SHORT, *options]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "half", "vision.pt"}
