"""CasaProcessor: markers, insertion points, padding, refusals; generate on what it returns."""

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForImageTextToText, AutoProcessor

from casa_engine.checkpoints import write_random_checkpoint
from casa_engine.errors import InputError
from casa_engine.presets import preset_config
from chats import picture, prepare, user


@pytest.fixture(scope="module", params=["ca", "ca_tv", "insertion"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(preset_config("tiny-qwen", fusion=request.param), folder)
    return folder


def test_auto_classes_batch_and_generate(checkpoint) -> None:
    """A batch of unequal conversations gives each the tokens it gets alone."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    conversations = [
        [user(picture(56, 84), "What is this?")],
        [user("Hello")],
        [user(picture(28, 28)), {"role": "assistant", "content": "a"}, user("and", picture(61, 50), picture(50, 61))],
    ]
    batch = prepare(processor, conversations)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, conversation in enumerate(conversations):
        inputs = prepare(processor, conversation)
        alone = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_stream_has_no_trace_of_the_image(checkpoint) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    ids = prepare(processor, [user("a", picture(56, 84), "b")])
    marker = processor.image_token_id
    if processor.fusion == "insertion":
        assert ids["input_ids"].eq(marker).sum() == 6
        assert "insertion_points" not in ids
    else:
        stream = ids["input_ids"][0].tolist()
        assert marker not in stream
        point = int(ids["insertion_points"][0, 0])
        assert processor.tokenizer.decode(stream[point]) == "<|vision_end|>"
        assert processor.tokenizer.decode(stream[point - 1]) == "<|vision_start|>"


def test_marker_in_text_is_refused(checkpoint) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    with pytest.raises(InputError, match="2 image markers and 1 images"):
        prepare(processor, [user("<|image_pad|>", picture(28, 28))])


def test_extreme_sides_are_refused(checkpoint) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    with pytest.raises(InputError, match="1x5000 px"):
        prepare(processor, [user(picture(1, 5000))])


def test_unknown_role_is_refused(checkpoint) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    with pytest.raises(TemplateError, match="unknown role 'robot'; expected system, user, assistant or tool"):
        prepare(processor, [{"role": "robot", "content": "x"}])


def test_a_tool_answers_with_text_and_images(checkpoint) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    found = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a page:"}, {"type": "image"}]}
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "look"}}]}
    text = processor.apply_chat_template([user("look"), called, found], add_generation_prompt=True)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"<|im_start|>user\n<tool_response>\na page:{image}\n</tool_response><|im_end|>\n" in text
    ids = prepare(processor, [user("look"), called, {**found, "content": "blue"}])["input_ids"][0]
    assert "<tool_response>\nblue\n</tool_response>" in processor.tokenizer.decode(ids)


def test_tools_are_shown_as_they_are_called(checkpoint) -> None:
    """Names, types and what must be given; what a call says is spelled the same way."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    fields = {
        "digits": {"type": "array", "items": {"type": "integer"}},
        "count": {"type": "integer"},
        "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "mixed": {"type": "array"},
    }
    schema = {"type": "object", "properties": fields, "required": ["digits", "count", "either", "mixed"]}
    optional = {"type": "object", "properties": fields, "required": ["count"]}
    tools = [
        {"type": "function", "function": {"name": "report", "description": "unused", "parameters": schema}},
        {"type": "function", "function": {"name": "some", "parameters": optional}},
        {"type": "function", "function": {"name": "none"}},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "report", "arguments": {"digits": [3, 7], "count": 2}}}
    talk = [user("look"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert processor.apply_chat_template(talk, tools=tools) == (
        "<|im_start|>system\n<tools>\n"
        '{"name": "report", "arguments": {"digits": [integer], "count": integer, "either": any, "mixed": [any]}}\n'
        '{"name": "some", "arguments": {"count": integer}}\n'
        '{"name": "none", "arguments": {}}\n'
        "</tools><|im_end|>\n"
        "<|im_start|>user\nlook<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "report", "arguments": {"digits": [3, 7], "count": 2}}\n'
        "</tool_call><|im_end|>\n"
    )
    assert "tool" not in processor.apply_chat_template([user("look")], tools=[])


@pytest.mark.parametrize(
    ("content", "written"),
    [
        (None, ""),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": ""}], ""),  # what vLLM makes of "" where a template takes lists
        ("Well.", "Well.\n"),
        ([{"type": "text", "text": ""}, {"type": "text", "text": "Well."}], "Well.\n"),
    ],
)
def test_a_call_begins_a_line_of_its_own_only_after_words(checkpoint, content, written) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    call = {"type": "function", "function": {"name": "report", "arguments": {}}}
    spelled = '<tool_call>\n{"name": "report", "arguments": {}}\n</tool_call>'
    called = {"role": "assistant", "content": content, "tool_calls": [call, call]}
    assert processor.apply_chat_template([called]) == (
        f"<|im_start|>assistant\n{written}{spelled}\n{spelled}<|im_end|>\n"
    )


def test_video_is_refused(checkpoint) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    with pytest.raises(InputError, match="pass video frames as images"):
        processor(text="x", videos=[torch.zeros(1)])


def test_any_text_survives_the_byte_tokenizer(checkpoint) -> None:
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    text = "Grüße, 世界! \x00\t\n 🙂 <not a mark>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_images_of_each_prompt_are_counted(checkpoint) -> None:
    """As many images as markers in all, but not in each prompt: the second image would go to the first prompt."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    texts = ["<|image_pad|><|image_pad|>a", "b<|image_pad|>"]
    assert len(processor(images=[picture(28, 28)] * 3, text=texts)["image_grid_thw"]) == 3
    for nested in (
        [[picture(28, 28)], [picture(28, 28)] * 2],
        [[picture(28, 28)] * 3],
        [[picture(28, 28)] * 3, [], []],
    ):
        with pytest.raises(InputError, match=r"\[2, 1\] image markers"):
            processor(images=nested, text=texts)


@pytest.mark.parametrize("text", [None, [], 5, ["a", None], [["a"]]])
def test_no_text_is_refused(checkpoint, text) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    with pytest.raises(InputError, match="expected one prompt or a list of prompts"):
        processor(text=text)
