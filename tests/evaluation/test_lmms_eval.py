"""`casa eval` beside lmms-eval itself, in an environment of its own: docs/evaluation.md has the commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from casa_digits.runners import EagerRunner
from casa_engine.digits import checkpoint_path
from casa_eval.images import decode
from casa_eval.target import question
from casa_eval.tasks import TASKS, Outcome, mme_summary
from casa_eval.vqa_answers import CONTRACTIONS, NUMBERS
from eval_metric_cases import FROZEN, cases, lmms_score
from eval_sets import digit_image, rows_of, write_set
from serving_process import casa_serve

pytestmark = pytest.mark.slow
TABLE = Path(__file__).parent / "metric_cases.json"
pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: docs/evaluation.md, an environment of its own")


def test_the_frozen_table_is_what_lmms_eval_says_now():
    table = {json.dumps(case[:3]): case[3] for case in json.loads(TABLE.read_text())[1:]}
    scored = [(case, score) for case in cases() if (score := lmms_score(*case)) is not None]
    assert len(scored) > 1000
    assert len(table) > len(scored) / FROZEN - 100
    for case, score in scored:
        assert table.get(json.dumps(case), score) == pytest.approx(score, abs=1e-8), case
        assert TASKS[case[0]].score(case[1], case[2]) == pytest.approx(score, abs=1e-8), case


def test_the_words_of_the_vqa_challenge():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    given = EvalAIAnswerProcessor.CONTRACTIONS
    # What is written with a capital never meets an answer in lower case, and some stand for themselves.
    live = {short: word for short, word in given.items() if short == short.lower() and short != word}
    assert live == CONTRACTIONS
    # lmms-eval's own run adds every word that it meets.
    assert {word: digits for word, digits in EvalAIAnswerProcessor.NUMBER_MAP.items() if word != digits} == NUMBERS


def test_anls_is_that_of_the_package_that_the_published_script_uses():
    anls_star = pytest.importorskip("anls_star", reason="anls_star is not installed: docs/evaluation.md")
    for metric, answer, fields in cases():
        if metric == "docvqa":
            said = answer.rstrip(".").strip()
            expected = anls_star.anls_score(gt=fields["answers"], pred=said)
            assert TASKS["docvqa"].score(answer, fields) == pytest.approx(expected), (answer, fields)


def test_totals_of_mme():
    from lmms_eval.tasks.mme.utils import mme_aggregate_results

    answered = [
        {"question_id": f"{number // 2}", "category": category, "score": float((number * 7) % 5 > 1)}
        for category in ("OCR", "count", "code_reasoning")
        for number in range(10)
    ]
    outcomes = [Outcome(each["score"], each["category"], each["question_id"]) for each in answered]
    assert mme_summary(outcomes)["score"] == pytest.approx(mme_aggregate_results(answered))


def test_lmms_eval_knows_the_model_by_its_entry_point():
    code = "from lmms_eval.models import get_model; print(get_model('casa'), get_model('casa').is_simple)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines()[-1] == "<class 'casa_eval.lmms_model.Casa'> False"


TASK = """
task: digits
dataset_path: parquet
dataset_kwargs:
  data_files:
    validation: {parquet}
test_split: validation
output_type: generate_until
doc_to_visual: !function digits.visual
doc_to_text: !function digits.text
doc_to_target: answers
generation_kwargs:
  max_new_tokens: 16
metric_list:
  - metric: anls
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from io import BytesIO

from PIL import Image


def visual(doc):
    return [Image.open(BytesIO(doc["image"]["bytes"])).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["endpoint", "engine"])
def test_lmms_eval_runs_the_model_on_a_local_task(kind, tmp_path):
    """Two of four references are what the eager model says, so that lmms-eval's own metric gives a half."""
    pytest.importorskip("vllm", reason="vLLM is not installed beside lmms-eval: docs/evaluation.md")
    runner = EagerRunner(checkpoint_path())
    right = [runner.answer(question("Read the digits.", [decode(digit_image(number), 896)], "")) for number in range(4)]
    references = [*right[:2], "entirely different", "entirely different"]
    parquet = write_set(tmp_path, "docvqa", rows_of("docvqa", references))
    (tmp_path / "digits.yaml").write_text(TASK.format(parquet=parquet))
    (tmp_path / "digits.py").write_text(FUNCTIONS)

    def score(model_args):
        command = [sys.executable, "-m", "lmms_eval", "--model", "casa", "--model_args", model_args]
        command += [
            "--include_path",
            tmp_path,
            "--tasks",
            "digits",
            "--batch_size",
            "4",
            "--output_path",
            tmp_path / "out",
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        reports = list((tmp_path / "out").rglob("*_results.json"))
        assert len(reports) == 1, done.stdout[-4000:] + done.stderr[-4000:]
        (report,) = reports
        return json.loads(report.read_text())["results"]["digits"]["anls,none"]

    if kind == "engine":
        settings = "dtype=float32,kv_cache_gib=0.25,enforce_eager=True"
        assert score(f"model={checkpoint_path()},{settings}") == 0.5
    else:
        with casa_serve(tmp_path / "log.txt") as server:
            assert score(f"base_url={server.url}/v1") == 0.5
