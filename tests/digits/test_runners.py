"""What the evaluation makes of a model's words, in process and from a server: calls, and what follows them."""

import json

import pytest
import torch

from casa_digits.cases import draw_tools
from casa_digits.endpoint import EndpointRunner
from casa_digits.evaluate import play_tool
from casa_digits.runners import EagerRunner
from casa_engine.digits import checkpoint_path
from scripted_endpoint import answering


@pytest.fixture(scope="module")
def case():
    """An image, a tool and the right arguments."""
    return draw_tools(scale=0.01)[0]


@pytest.fixture
def eager(monkeypatch):
    """The eager runner with a model that says `answers` one after the other; `prompts` are the texts it was given."""
    runner = EagerRunner(checkpoint_path())
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
