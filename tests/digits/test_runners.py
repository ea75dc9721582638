"""What the evaluation makes of a model's words, in process and from a server: calls, and what follows them."""

import copy
import json

import pytest
import torch

from casa_digits.cases import draw_tools
from casa_digits.endpoint import EndpointError, EndpointRunner
from casa_digits.evaluate import play_tool
from casa_digits.runners import EagerRunner
from casa_engine.digits import checkpoint_path
from scripted_endpoint import answering


@pytest.fixture(scope="module")
def case():
    """An image, a tool and the right arguments."""
    return draw_tools(scale=0.01)[0]


@pytest.fixture(scope="module")
def loaded():
    return EagerRunner(checkpoint_path())


@pytest.fixture
def eager(loaded, monkeypatch):
    """The eager runner with a model that says `answers` one after the other; `prompts` are the texts it was given."""
    runner = copy.copy(loaded)
    tokenizer, runner.answers, runner.prompts = runner.processor.tokenizer, [], []

    def generate(input_ids, **inputs):
        runner.prompts.append(tokenizer.decode(input_ids[0]))
        return torch.cat([input_ids, torch.tensor([tokenizer(runner.answers.pop(0))["input_ids"]])], dim=1)

    monkeypatch.setattr(runner.model, "generate", generate)
    return runner


def spelled(case):
    return json.dumps({"name": case.name, "arguments": case.arguments})


def test_a_call_is_sent_back_without_words(case):
    """An empty text would be words."""
    function = {"name": case.name, "arguments": json.dumps(case.arguments)}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "7", "type": "function", "function": function}]}
    with answering(call, {"role": "assistant", "content": case.image.text}) as (url, seen):
        assert play_tool(EndpointRunner(url), case)
    _, sent, result = seen[-1].body["messages"]
    assert sent == call
    assert result["role"] == "tool" and result["tool_call_id"] == "7"


def test_what_follows_a_call_is_asked_for_as_the_model_has_called(case, eager):
    eager.answers = [f"<tool_call>\n{spelled(case)}\n</tool_call>", case.image.text]
    assert play_tool(eager, case)
    assert eager.prompts[1] == (
        f"{eager.prompts[0]}<tool_call>\n{spelled(case)}\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        "{call}",
        "<tool_call>\n{call}",
        "{call}\n</tool_call>",
        "Well.\n<tool_call>\n{call}\n</tool_call>",
        "<tool_call>\n{call}\n</tool_call> Well.",
        "<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>",
        "<tool_call>\n{call}}\n</tool_call>",
        "<tool_call>\n[{call}]\n</tool_call>",
        "<tool_call>\n</tool_call>",
        "",
    ],
)
def test_words_that_are_no_call(case, eager, words):
    """A server takes a call from between the marks; whoever asked for one gets exactly that."""
    eager.answers = [words.replace("{call}", spelled(case)), case.image.text]
    assert not play_tool(eager, case)
    assert len(eager.answers) == 1


def test_a_server_calls_once_and_says_nothing_with_it(case):
    call = {"id": "7", "type": "function", "function": {"name": case.name, "arguments": json.dumps(case.arguments)}}
    other = {**call, "function": {**call["function"], "arguments": "{"}}
    for content, calls in [
        (None, [call, call]),
        ("Well.", [call]),
        ("Well.", None),
        (None, []),
        (None, [other]),
    ]:
        with answering({"role": "assistant", "content": content, "tool_calls": calls}) as (url, seen):
            assert not play_tool(EndpointRunner(url), case)
            assert len(seen) == 2


@pytest.mark.parametrize("calls", ["call", {"0": 1}, [None], [{}], [{"function": {"name": "a", "arguments": None}}]])
def test_a_call_that_is_not_of_the_protocol(case, calls):
    with (
        answering({"role": "assistant", "content": None, "tool_calls": calls}) as (url, _),
        pytest.raises(EndpointError, match="no OpenAI-compatible server"),
    ):
        play_tool(EndpointRunner(url), case)
