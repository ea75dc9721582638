"""What an interrupted run goes on from."""

import json

import pytest

from casa_engine.errors import InputError
from casa_eval.data import DataSet
from casa_eval.report import markdown, shown_score
from casa_eval.runner import Protocol, open_questions, summary
from casa_eval.sample_log import SampleLog, refuse_existing
from casa_eval.tasks import TASKS
from eval_sets import rows_of, write_set

pytestmark = pytest.mark.unit
SETTINGS = {"model": "a", "image_size": 896}
ANSWERS = ("yes", "no", "yes", "no")


@pytest.fixture
def path(tmp_path):
    """Where the log is."""
    return tmp_path / "run.samples.jsonl"


def begun(path, *records):
    """Write a log of records."""
    log = SampleLog(path, SETTINGS)
    for record in records:
        log.add(record)
    log.close()


def record(number, **fields):
    """A record of a sample."""
    return {"task": "mme", "id": number, "answer": "yes", "score": 1.0} | fields


def test_records_are_read_in_the_order_of_samples(path):
    log = SampleLog(path, SETTINGS)
    for number in (2, 0, 1):
        log.add(record(number))
    log.add(record(0, task="gqa"))
    assert [each["id"] for each in log.records("mme")] == [0, 1, 2]
    assert ("mme", 2) in log
    assert ("mme", 3) not in log
    assert len(log) == 4
    log.close()


def test_a_run_does_not_write_over_another(path):
    begun(path, record(0))
    with pytest.raises(InputError, match="go on with it by --resume, or choose another --output"):
        refuse_existing(path)
    assert len(path.read_text().splitlines()) == 2


def test_answers_are_kept_and_failures_and_a_cut_line_are_asked_again(path):
    begun(path, record(0), {"task": "mme", "id": 1, "error": "no answer"}, record(2))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(record(3)).encode()[:-4])
    log = SampleLog(path, SETTINGS)
    assert [each["id"] for each in log.records("mme")] == [0, 2]
    log.add(record(1))
    log.close()
    # As a kill between the line and its end would leave it.
    path.write_bytes(path.read_bytes() + json.dumps(record(3)).encode())
    log = SampleLog(path, SETTINGS)
    assert [each["id"] for each in log.records("mme")] == [0, 1, 2]
    log.close()


def test_resume_without_a_run_begins_one(path):
    refuse_existing(path)
    SampleLog(path, SETTINGS).close()
    assert path.is_file()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no answers of casa eval"),
        (b"\xff\xfe", "holds no answers of casa eval"),
        (b"[]\n", "holds no answers of casa eval"),
        (b'{"format": "other"}\n', "holds no answers of casa eval"),
        (
            json.dumps(
                {"format": "casa-eval-samples", "version": 1, "settings": {"model": "b", "image_size": 896}}
            ).encode(),
            "another model;",
        ),
        (json.dumps({"format": "casa-eval-samples", "version": 1, "settings": None}).encode(), "model and image_size"),
    ],
)
def test_a_file_of_another_run_is_left_alone(path, content, words):
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        SampleLog(path, SETTINGS)
    assert path.read_bytes() == content


def test_only_what_is_not_answered_is_asked_again(path, tmp_path):
    write_set(tmp_path, "mme", rows_of("mme", ANSWERS))
    dataset = DataSet(TASKS["mme"], tmp_path, is_alone=True)
    log = SampleLog(path, SETTINGS)
    asked = list(open_questions(dataset, Protocol(), log))
    log.add(asked[1].key[0] | {"answer": "no", "score": 1.0})
    assert [request.key[0]["id"] for request in open_questions(dataset, Protocol(), log)] == [0, 2, 3]
    assert [request.key[0]["id"] for request in open_questions(dataset, Protocol(limit=3), log)] == [0, 2]
    # Other data under the same names is no continuation.
    write_set(tmp_path, "mme", rows_of("mme", ("yes", "yes")))
    with pytest.raises(InputError, match="another question as mme 1: the data has changed"):
        list(open_questions(dataset, Protocol(), log))
    log.close()


def test_a_summary_counts_failures_and_scores_the_rest(path):
    log = SampleLog(path, SETTINGS)
    for number, score in enumerate((1.0, 0.0, 1.0)):
        log.add(record(number, task="gqa", score=score))
    log.add({"task": "gqa", "id": 3, "error": "no answer"})
    figures = summary(TASKS["gqa"], log)
    assert (figures["samples"], figures["failed"]) == (4, 1)
    assert figures["score"] == pytest.approx(200 / 3)
    table = markdown("a model", {"gqa": figures}, complete=False)
    assert "| a model (interrupted) | metric | samples | failed | score |" in table
    assert "| GQA | exact match | 4 | 1 | 66.7 |" in table
    assert "| CASA-Qwen2_5-VL-3B | 59.4 |" in table
    log.close()


def test_scores_are_shown_as_they_are_quoted():
    mme = {"score": 1722.0, "perception": 1400.0, "cognition": 322.0, "unpaired": 0}
    assert shown_score(mme) == "1722.0 (perception 1400.0, cognition 322.0)"
    assert shown_score(mme | {"unpaired": 2}).endswith("322.0, 2 images left out)")
    assert shown_score({"score": 74.0, "out_of_1000": 740.0}) == "74.0 (740 of 1,000)"
    assert shown_score({"score": None}) == "-"
