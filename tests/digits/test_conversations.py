"""What training learns from: only answers, spelled as the processor spells them, by the rule of the stream."""

import json

import numpy as np
import pytest
import torch

from casa_digits import conversations
from casa_digits.conversations import IGNORED, NO_DIGIT, UNSEEN, Writer
from casa_digits.data import MAX_DIGITS, Grid
from casa_digits.forms import draw_name, schema_of
from casa_digits.frames import FramePool
from casa_digits.memory import QUESTIONS, recall
from casa_digits.model import MAX_POSITIONS, build_processor
from casa_digits.phrases import COUNT_NAMES
from casa_digits.practice import FinishWriter, NamesWriter, PracticeWriter, ResumeWriter
from casa_digits.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(MAX_POSITIONS)


@pytest.fixture(scope="module")
def pool():
    """Two families of four scenes in two takes each, without real images."""
    texts = [text for text in ("3", "3 1", "3 1 4", "3 1", "9", "8 8", "9", "1 2 3 4") for _ in range(2)]
    return FramePool([torch.zeros(2, 128)] * len(texts), [Grid(1, 2)] * len(texts), texts)


@pytest.mark.parametrize("kind", ["chat", "memory"])
def test_only_answers_and_their_end_are_learned(tokenizer, pool, kind):
    writer = Writer(tokenizer, np.random.default_rng(0))
    for _ in range(100):
        talk = getattr(writer, kind)(pool)
        assert all(label in (IGNORED, token) for token, label in zip(talk.ids, talk.labels, strict=True))
        text = tokenizer.decode(talk.ids)
        learned = tokenizer.decode([label for label in talk.labels if label != IGNORED])
        answers = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
        if kind == "chat":
            assert learned == "".join(f"{answer}<|im_end|>" for answer in answers)
        else:
            assert learned.endswith("<|im_end|>") and set(learned.split("<|im_end|>")[:-1]) <= set(answers)


def test_chats_are_spelled_as_the_processor_spells_them(tokenizer, pool):
    processor = build_processor(tokenizer)
    writer = Writer(tokenizer, np.random.default_rng(1))
    for _ in range(100):
        talk = writer.chat(pool)
        assert tokenizer(tokenizer.decode(talk.ids))["input_ids"] == talk.ids
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read the digits."}]},
        {"role": "assistant", "content": "3 1"},
    ]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Read the digits.<|im_end|>\n"
        "<|im_start|>assistant\n3 1<|im_end|>\n"
    )


def test_images_stand_between_their_delimiters(tokenizer, pool):
    writer = Writer(tokenizer, np.random.default_rng(2))
    start, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    for talk in (writer.chat(pool), writer.memory(pool), writer.stream(pool, 200)):
        assert all(talk.ids[point - 1] == start and talk.ids[point] == end for point in talk.points)
        assert talk.points == sorted(talk.points) and len(talk.points) == len(talk.images)


def test_a_stream_says_digits_that_differ_from_the_last_said_and_nothing_else(tokenizer, pool):
    writer = Writer(tokenizer, np.random.default_rng(3))
    start, end, stop = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|im_end|>"])
    num_learned = num_silent = 0
    for _ in range(100):
        talk = writer.stream(pool, 300)
        shown = dict(zip(talk.points, talk.images, strict=True))
        said = None
        for place in [place for place, token in enumerate(talk.ids) if token == end]:
            stop_place = talk.ids.index(stop, place)
            caption = tokenizer.decode(talk.ids[place + 1 : stop_place])
            if talk.labels[stop_place] != IGNORED:
                truth = pool.texts[shown[place]]
                assert caption == ("" if truth == said else truth)
                assert talk.labels[place + 1 : stop_place + 1] == talk.ids[place + 1 : stop_place + 1]
                num_learned, num_silent = num_learned + 1, num_silent + (caption == "")
            said = caption or said
        assert start in talk.ids
    assert num_learned > 1000 and num_silent > 300


@pytest.mark.parametrize("text_only", [True, False])
def test_questions_in_a_stream_are_about_what_its_text_says(tokenizer, pool, text_only):
    writer = Writer(tokenizer, np.random.default_rng(4))
    kinds = {phrase: kind for kind, phrases in QUESTIONS.items() for phrase in phrases}
    asked = dict.fromkeys(QUESTIONS, 0)
    for _ in range(80):
        talk = writer.stream(pool, 300, text_only)
        assert not (text_only and talk.images)
        said: list[str] = []
        question = None
        # Each turn of the assistant: the answer to the question before it, then frames, then the next question.
        for turn in tokenizer.decode(talk.ids).split("<|im_start|>assistant\n")[1:]:
            stream, _, following = turn.partition("<|im_start|>user\n")
            answer, *frames = stream.split("<|vision_start|>")
            if question in kinds:
                assert answer.strip() == recall(kinds[question], said) + "<|im_end|>"
                asked[kinds[question]] += 1
            captions = [frame.partition("<|vision_end|>")[2].partition("<|im_end|>")[0] for frame in frames]
            said += [caption for caption in captions if caption]
            question = following.partition("<|im_end|>")[0]
    assert min(asked.values()) > 10


def test_what_is_recalled():
    said = ["3", "3 1", "7"]
    assert [recall(kind, said) for kind in ("first", "last", "before", "changes")] == ["3", "7", "3 1", "2"]
    assert [recall(kind, ["3"]) for kind in ("first", "last", "before", "changes")] == ["3", "3", "Nothing.", "0"]
    assert [recall(kind, []) for kind in ("first", "last", "before", "changes")] == ["Nothing."] * 3 + ["0"]
    assert [recall("changes", ["1", "2"] * half) for half in (5, 6)] == ["9", "More than 9."]


def test_json_answers_hold_what_the_image_shows(tokenizer, pool):
    writer = Writer(tokenizer, np.random.default_rng(5))
    free = 0
    for _ in range(200):
        talk = writer.form(pool)
        texts = iter([pool.texts[image] for image in talk.images])
        for turn in tokenizer.decode(talk.ids).split("<|im_start|>assistant\n")[1:]:
            answer, text = json.loads(turn.partition("<|im_end|>")[0]), next(texts)
            for name, value in answer.items():
                if isinstance(value, list):
                    assert [int(digit) for digit in value] == [int(digit) for digit in text.split()]
                elif name == "count":
                    assert value == len(text.split())
                elif isinstance(value, str):
                    assert value == text
        free += talk.labels[-2] != IGNORED
    assert free == 200  # the end is always learned


def read_turn(role, text):
    """Return a turn of a conversation as the message that the chat template would have made it of."""
    if text.startswith("<tool_response>\n"):
        assert role == "user"
        return {"role": "tool", "content": text.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")}
    if text.startswith("<tool_call>\n"):
        assert role == "assistant"
        call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        return {"role": role, "content": None, "tool_calls": [{"type": "function", "function": call}]}
    before, image, after = text.partition("<|vision_start|><|vision_end|>")
    parts = [{"type": "text", "text": part} for part in (before, after)]
    return {"role": role, "content": [parts[0], {"type": "image"}, parts[1]] if image else text}


@pytest.mark.parametrize(
    ("kind", "writer"),
    [("tools", Writer), ("tools", PracticeWriter), ("copies", FinishWriter), ("copies", NamesWriter)],
)
def test_tools_are_shown_and_called_as_the_template_does(tokenizer, pool, monkeypatch, kind, writer):
    """Whole rows: tools, instructions, calls, results, answers."""
    drawn, draw = [], conversations.draw_tools

    def draw_tools(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr("casa_digits.conversations.draw_tools", draw_tools)
    monkeypatch.setattr("casa_digits.practice.draw_tools", draw_tools)
    processor, writer = build_processor(tokenizer), writer(tokenizer, np.random.default_rng(6))
    roles = set()
    for _ in range(100):
        text = tokenizer.decode(getattr(writer, kind)(pool).ids)
        turns = [turn.removesuffix("<|im_end|>\n").partition("\n") for turn in text.split("<|im_start|>")[1:]]
        messages = [read_turn(role, said) for role, _, said in turns[1:]]
        tools = [
            {"type": "function", "function": {"name": name, "parameters": schema_of(form)}} for name, form in drawn[-1]
        ]
        rendered = processor.apply_chat_template(messages, tools=tools)
        assert rendered.replace("<|image_pad|>", "") == text
        calls = [message["tool_calls"][0]["function"] for message in messages if "tool_calls" in message]
        name, form = drawn[-1][0]
        assert calls and all((call["name"], [*call["arguments"]]) == (name, [*form]) for call in calls)
        roles |= {message["role"] for message in messages}
    assert roles == ({"system", "user", "assistant", "tool"} if kind == "tools" else {"user", "assistant"})


def test_readings_know_those_before_them(tokenizer, pool):
    """What the notes say, put together, is the reading before, in the tokens from the reading's first to its end."""
    writer, num_readings = PracticeWriter(tokenizer, np.random.default_rng(2)), 0
    for number in range(40):
        talk = writer.stream(pool, 200, text_only=number % 2 == 0) if number % 4 < 3 else writer.memory(pool)
        ends = [token for token, kind, _ in talk.notes if kind == MAX_DIGITS]
        said = []
        for end in ends:
            start = end
            while tokenizer.decode([talk.ids[start - 1]]).strip().isdigit():
                start -= 1
            assert tokenizer.decode([talk.ids[end]]) == "<|im_end|>"
            known = {(token, kind): digit for token, kind, digit in talk.notes if start <= token <= end}
            before = [known[start + place, 0] for place in range(end - start)]
            before += [known[end, kind] for kind in range(MAX_DIGITS - (end - start))]
            assert len(known) == MAX_DIGITS + 1 and known[end, MAX_DIGITS] == min(len(said), NO_DIGIT)
            expected = [int(digit) for digit in said[-1].split()] if said else []
            assert before == [*expected, *[NO_DIGIT] * MAX_DIGITS][:MAX_DIGITS]
            said.append(tokenizer.decode(talk.ids[start:end]))
        num_readings += len(said)
    assert num_readings > 200


def test_frames_of_the_past_keep_their_windows_in_practice(tokenizer, pool):
    writer = PracticeWriter(tokenizer, np.random.default_rng(3))
    talk = writer.stream(pool, 200, text_only=True)
    start, end = tokenizer("<|vision_start|><|vision_end|>")["input_ids"]
    assert set(talk.images) == {UNSEEN} and len(talk.images) == talk.ids.count(start) > 5
    assert all(talk.ids[point - 1 : point + 1] == [start, end] for point in talk.points)
    assert not Writer(tokenizer, np.random.default_rng(3)).stream(pool, 200, text_only=True).points


def test_copies_teach_names_and_no_values(tokenizer, pool):
    """Values follow from an image, and none is shown; what ends a value, such as a bracket, goes with it."""
    for writer in (kind(tokenizer, np.random.default_rng(7)) for kind in (FinishWriter, NamesWriter)):
        for _ in range(100):
            talk = writer.copies(pool)
            assert set(talk.images) <= {UNSEEN} and len(talk.images) == len(writer.shown_in_copies)
            learned = tokenizer.decode([label for label in talk.labels if label != IGNORED])
            calls = tokenizer.decode(talk.ids).split("<|im_start|>assistant\n")[1:]
            assert len(calls) == writer.num_copies
            assert learned.count("<tool_call>") == learned.count("<|im_end|>") == len(calls)
            for call in calls:
                said = json.loads(call.removeprefix("<tool_call>\n").partition("\n</tool_call>")[0])
                assert f'{{"name": "{said["name"]}", "arguments":' in learned
                assert all(f'"{name}":' in learned for name in said["arguments"])
            assert not any(letter.isdigit() for letter in learned)


def test_half_of_the_streams_are_resumed(tokenizer, pool):
    """What was said before is then one window of text; in the others each frame of the past begins a window."""
    writer = ResumeWriter(tokenizer, np.random.default_rng(8))
    talks = [writer.stream(pool, 120, text_only=True) for _ in range(200)]
    num_frames = [tokenizer.decode(talk.ids).count("<|vision_start|>") for talk in talks]
    marked = [talk for talk in talks if talk.images]
    assert 70 < len(marked) < 130
    assert all(set(talk.images) == {UNSEEN} for talk in marked)
    assert all(len(talk.images) in (0, frames) for talk, frames in zip(talks, num_frames, strict=True))
    assert min(num_frames) > 0


def test_names_are_of_the_pieces_of_the_tokenizer(tokenizer):
    writer = NamesWriter(tokenizer, np.random.default_rng(9))
    pieces, shares = writer.name_shares.pieces, writer.name_shares
    assert len(pieces) > 100 and all(len(tokenizer(piece)["input_ids"]) == 1 for piece in pieces)
    assert any(len(piece) > 3 for piece in pieces)
    names = {draw_name(writer.rng, COUNT_NAMES, shares) for _ in range(300)}
    assert len(names) > 150
    assert sum(len(tokenizer(name)["input_ids"]) < len(name) / 1.5 for name in names) > len(names) / 2


def test_questions_have_their_shares(tokenizer, pool):
    asked = {}
    for kind in (PracticeWriter, FinishWriter, NamesWriter):
        writer = kind(tokenizer, np.random.default_rng(10))
        texts = [tokenizer.decode(writer.stream(pool, 120, text_only=True).ids) for _ in range(100)]
        kinds = {
            name: sum(text.count(f"{phrase}<|im_end|>") for text in texts for phrase in phrases)
            for name, phrases in QUESTIONS.items()
        }
        asked[kind] = {name: count / sum(kinds.values()) for name, count in kinds.items()}
    assert asked[PracticeWriter] == pytest.approx(dict.fromkeys(QUESTIONS, 0.25), abs=0.06)
    assert asked[FinishWriter] == pytest.approx(FinishWriter.question_shares, abs=0.06)
    assert asked[NamesWriter] == pytest.approx(NamesWriter.question_shares, abs=0.06)
