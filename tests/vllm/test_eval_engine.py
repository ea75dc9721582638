"""`casa eval` with vLLM in this process: it says what the eager model says."""

import os
from unittest import mock

import pytest
import torch

from casa_bench.engine_backend import EngineSettings
from casa_digits.runners import EagerRunner
from casa_engine.digits import checkpoint_path
from casa_engine.errors import InputError
from casa_eval.data import DataSet
from casa_eval.engine_target import EngineTarget
from casa_eval.images import decode
from casa_eval.runner import Protocol, evaluate, summary
from casa_eval.sample_log import SampleLog
from casa_eval.target import Request, question
from casa_eval.tasks import TASKS
from eval_sets import digit_image, rows_of, write_set

pytestmark = pytest.mark.vllm
NUM_SAMPLES = 6
MAX_NEW_TOKENS = 8


@pytest.fixture(scope="module")
def target():
    """An engine of the embedded model; what it sets in the environment goes with it."""
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        settings = EngineSettings(dtype="float32", kv_cache_gib=0.25, enforce_eager=True)
        opened = EngineTarget(checkpoint_path(), settings, concurrency=4, image_size=896, max_new_tokens=MAX_NEW_TOKENS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def eager():
    """The eager model."""
    return EagerRunner(checkpoint_path())


@torch.inference_mode()
def said(eager, messages, max_new_tokens):
    """What the eager model answers."""
    inputs = eager.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    output = eager.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return eager.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def asked(prompt, number, max_new_tokens=MAX_NEW_TOKENS, system=""):
    """A question about an image."""
    return Request(number, question(prompt, [decode(digit_image(number), 896)], system), max_new_tokens)


def test_answers_are_the_eager_models_and_end_where_they_end(target, eager):
    requests = [asked("Read the digits.", number) for number in range(NUM_SAMPLES)]
    requests.append(asked("Read the digits.", NUM_SAMPLES, 2))
    requests.append(asked("Read the digits.", NUM_SAMPLES + 1, system="Read."))
    replies = {request.key: reply for request, reply in target.answer(requests)}
    assert replies == {request.key: said(eager, request.messages, request.max_new_tokens) for request in requests}
    # It is the model that ends them, not the number of tokens.
    long = [request for request in requests if request.max_new_tokens == MAX_NEW_TOKENS]
    ended = [said(eager, request.messages, 64) == replies[request.key] for request in long]
    assert all(ended)


def test_a_prompt_that_does_not_fit_is_its_own_fault(target):
    requests = [asked("Read the digits.", 0), asked("Read the digits. " * 4000, 1), asked("Read the digits.", 2)]
    replies = {request.key: reply for request, reply in target.answer(requests)}
    assert isinstance(replies[0], str)
    assert isinstance(replies[2], str)
    assert isinstance(replies[1], InputError)
    assert "the engine refuses a prompt" in str(replies[1])
    assert not target.engine.has_unfinished_requests()


def test_requests_are_taken_as_there_is_room(target):
    taken = []

    def stream():
        for number in range(NUM_SAMPLES):
            taken.append(number)
            yield asked("Read the digits.", number)

    replies = target.answer(stream())
    assert not taken
    next(replies)
    assert len(taken) <= 4
    assert len(list(replies)) == NUM_SAMPLES - 1


def test_a_task_is_scored_with_the_engine(target, eager, tmp_path):
    prompt = TASKS["docvqa"].prompt({"question": "Read the digits."})
    right = [said(eager, asked(prompt, number).messages, MAX_NEW_TOKENS) for number in range(NUM_SAMPLES)]
    references = [answer if number < 3 else "entirely different" for number, answer in enumerate(right)]
    write_set(tmp_path, "docvqa", rows_of("docvqa", references))
    log = SampleLog(tmp_path / "log.jsonl", {})
    dataset = DataSet(TASKS["docvqa"], tmp_path, is_alone=True)
    evaluate(dataset, target, Protocol(max_new_tokens=MAX_NEW_TOKENS), log)
    figures = summary(TASKS["docvqa"], log)
    assert (figures["samples"], figures["failed"], figures["score"]) == (NUM_SAMPLES, 0, 50)
    log.close()
