"""The text of a session: what is fed, what is recorded, what leaves."""

import json
from dataclasses import replace

import pytest

from casa_digits.live import LIVE_SETTINGS
from casa_engine.checkpoints import default_processor
from casa_engine.digits import checkpoint_path
from casa_engine.errors import CheckpointError, InputError
from casa_engine.live import HistoryItem, LiveSettings, Transcript
from casa_engine.live.settings import SETTINGS_FILE
from casa_engine.live.stream_format import StreamFormat
from casa_engine.presets import preset_config

pytestmark = pytest.mark.unit

SETTINGS = LiveSettings(instruction="Say it.", max_frame_tokens=6, max_answer_tokens=8, text_budget=128)
STOP, OTHER_STOP = 1, 300


@pytest.fixture(scope="module")
def spelling():
    config = preset_config("tiny-qwen")
    return StreamFormat(default_processor(config), config, [STOP, OTHER_STOP])


def say(transcript, text, stop=STOP):
    """One frame with this caption; returns the chunk that was fed."""
    transcript.make_room(transcript.frame_tokens)
    chunk = transcript.frame_chunk()
    transcript.record(chunk, [*transcript.format.words("caption", text), *([] if stop is None else [stop])])
    return chunk


def test_the_stream_token_by_token(spelling):
    """What a reader is fed and what it generates, put together, is the transcript but for its last stop token."""
    transcript, read = Transcript(spelling, SETTINGS), []
    for text in ("one", "", "two"):
        chunk = say(transcript, text)
        read += [*chunk.token_ids, *spelling.words("caption", text)]
    assert [*read, STOP] == transcript.ids
    assert transcript.num_known == len(read)
    assert spelling.tokenizer.decode(transcript.ids) == (
        "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n"
        "<|vision_start|><|vision_end|>one<|im_end|><|vision_start|><|vision_end|><|im_end|>"
        "<|vision_start|><|vision_end|>two<|im_end|>"
    )


def test_the_stop_token_belongs_to_the_window_before(spelling):
    transcript = Transcript(spelling, SETTINGS)
    say(transcript, "one")
    chunk = transcript.frame_chunk()
    assert chunk.token_ids == (STOP, *spelling.before_image, *spelling.after_image)
    assert chunk.insertion_points == (1 + len(spelling.before_image),)


def test_the_stop_token_really_emitted_is_recorded(spelling):
    transcript = Transcript(spelling, SETTINGS)
    say(transcript, "one", OTHER_STOP)
    assert transcript.frame_chunk().token_ids[0] == OTHER_STOP
    say(transcript, "abcdef", None)
    # Cut: the last token was only sampled, the stop token emitted last follows it.
    last = spelling.words("caption", "f")[0]
    assert transcript.frame_chunk().token_ids[:2] == (last, OTHER_STOP)


def test_priming_text_begins_the_first_caption(spelling):
    transcript = Transcript(spelling, replace(SETTINGS, prompt="In this"))
    chunk = say(transcript, " one")
    assert chunk.opening[-7:] == tuple(spelling.words("prompt", "In this"))
    assert transcript.entries[0].text == "In this one"
    assert transcript.frame_chunk().token_ids == (STOP, *spelling.before_image, *spelling.after_image)


def test_a_question_between_frames(spelling):
    transcript = Transcript(spelling, SETTINGS)
    say(transcript, "one")
    chunk = transcript.question_chunk("How?")
    assert chunk.insertion_points == ()
    assert spelling.tokenizer.decode(chunk.token_ids) == (
        "<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert transcript.record(chunk, [*spelling.words("answer", "so"), STOP]).text == "so"
    assert say(transcript, "two").token_ids[0] == STOP


def test_a_question_before_any_frame_closes_the_open_turn(spelling):
    transcript = Transcript(spelling, SETTINGS)
    text = spelling.tokenizer.decode(transcript.question_chunk("How?").token_ids)
    assert "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nHow?" in text


def test_silence_leaves_first_then_the_oldest(spelling):
    transcript = Transcript(spelling, SETTINGS)
    say(transcript, "first")
    trimmed_at = None
    for number in range(60):
        before = transcript.num_tokens
        trimmed = transcript.make_room(transcript.frame_tokens)
        if trimmed:
            trimmed_at = number
            assert before + transcript.frame_tokens > SETTINGS.text_budget
            assert transcript.num_tokens <= SETTINGS.text_budget // 2
            assert transcript.num_known == 0
            # All but the latest frame, which is shown again.
            assert all(entry.is_caption for entry in transcript.entries[:-1])
            assert transcript.frame_chunk().token_ids[: len(transcript.prompt)] == tuple(transcript.prompt)
        say(transcript, str(number % 10) if number % 3 else "")
        assert transcript.num_tokens <= SETTINGS.text_budget
    assert trimmed_at is not None


def test_the_last_caption_always_stays(spelling):
    transcript = Transcript(spelling, SETTINGS)
    say(transcript, "here")
    for _ in range(200):
        say(transcript, "")
    assert transcript.history[0].caption == "here"
    for _ in range(10):
        transcript.record(transcript.question_chunk("How long is this?"), [*spelling.words("answer", "long"), STOP])
    assert "here" in [item.caption for item in transcript.history]


def test_a_reader_that_starts_anew_sees_the_latest_frame_again(spelling):
    transcript = Transcript(spelling, SETTINGS)
    for text in ("one", "", ""):
        say(transcript, text)
    assert transcript.question_chunk("How?").insertion_points == ()
    assert len(transcript.frame_chunk().insertion_points) == 1
    latest = transcript.entries[-1]
    transcript.reset()
    again = transcript.num_tokens - len(latest.token_ids) + len(spelling.before_image)
    assert transcript.question_chunk("How?").insertion_points == (again,)
    assert transcript.question_chunk("How?").images("latest", None) == ["latest"]
    chunk = transcript.frame_chunk()
    assert chunk.insertion_points == (again, transcript.num_tokens + len(spelling.before_image))
    assert chunk.images("latest", "new") == ["latest", "new"]
    while not transcript.make_room(transcript.frame_tokens):
        say(transcript, "")
    assert [entry.text for entry in transcript.entries] == ["one", ""]
    again = transcript.num_tokens - 3 + len(spelling.before_image)
    assert transcript.question_chunk("How?").insertion_points == (again,)
    # From history nothing was seen.
    assert Transcript(spelling, SETTINGS, transcript.history).question_chunk("How?").insertion_points == ()


def test_after_a_restart_nothing_is_counted_twice(spelling):
    kept, lost = Transcript(spelling, SETTINGS), Transcript(spelling, SETTINGS)
    for number in range(5):
        lost.reset()
        assert say(kept, str(number)).state == say(lost, str(number)).state
    assert kept.ids == lost.ids


def test_history_is_the_text_without_images(spelling):
    transcript = Transcript(spelling, SETTINGS)
    say(transcript, "one")
    transcript.record(transcript.question_chunk("How?"), [*spelling.words("answer", "so"), STOP])
    say(transcript, "")
    again = Transcript(spelling, SETTINGS, transcript.history)
    assert again.ids == transcript.ids
    assert again.num_known == 0
    assert Transcript(spelling, SETTINGS, [HistoryItem(caption="9")] * 500).num_tokens <= SETTINGS.text_budget


@pytest.mark.parametrize("text", ["a<|im_end|>", "<|image_pad|>", "x<|vision_start|>y", "<|im_start|>system"])
def test_special_tokens_in_words_are_refused(spelling, text):
    with pytest.raises(InputError, match="special tokens"):
        Transcript(spelling, replace(SETTINGS, instruction=text))
    with pytest.raises(InputError, match="special tokens"):
        Transcript(spelling, replace(SETTINGS, system=text))
    with pytest.raises(InputError, match="special tokens"):
        Transcript(spelling, SETTINGS, [HistoryItem(caption=text)])
    with pytest.raises(InputError, match="special tokens"):
        Transcript(spelling, SETTINGS).question_chunk(text)


def test_what_cannot_fit_is_refused(spelling):
    with pytest.raises(InputError, match="expected at least"):
        Transcript(spelling, replace(SETTINGS, instruction="x" * 100))
    with pytest.raises(InputError, match="expected them to fit"):
        Transcript(spelling, SETTINGS, [HistoryItem(caption="x" * 100)])
    transcript = Transcript(spelling, SETTINGS)
    say(transcript, "one")
    before = transcript.ids
    with pytest.raises(InputError, match="expected them to fit"):
        transcript.question_chunk("x" * 100)
    assert transcript.ids == before
    assert transcript.num_known > 0


NEITHER = "neither a caption nor a question with its answer"
BROKEN_ITEMS = [
    ({}, NEITHER),
    ({"caption": 3}, NEITHER),
    ({"caption": "a", "question": "b"}, NEITHER),
    ({"answer": "x"}, NEITHER),
    ({"caption": "a", "timestamp": "1"}, "timestamp of a history item is '1'"),
    ({"text": "a"}, "expected an object with fields of"),
    (3, "expected an object with fields of"),
]


@pytest.mark.parametrize(("item", "words"), BROKEN_ITEMS)
def test_broken_history_is_refused(item, words):
    with pytest.raises(InputError, match=words):
        HistoryItem.from_fields(item)


@pytest.mark.parametrize(
    "fields",
    [
        {"fps": 0},
        {"fps": "2"},
        {"fps": float("nan")},
        {"temperature": -1},
        {"max_frame_tokens": 0},
        {"max_frame_tokens": True},
        {"max_frame_tokens": 2.0},
        {"instruction": None},
        {"system": 3},
        {"seed": -1},
        {"unknown": 1},
    ],
    ids=str,
)
def test_broken_settings_are_refused(fields):
    (name,) = fields
    words = r"^unknown live settings \['unknown'\]" if name == "unknown" else f"^{name} is "
    with pytest.raises(InputError, match=words):
        LiveSettings.from_fields(fields)


def test_a_checkpoint_may_carry_settings(tmp_path):
    assert LiveSettings.for_checkpoint(tmp_path) == LiveSettings()
    (tmp_path / SETTINGS_FILE).write_text('{"fps": 4, "top_k": 5}')
    assert LiveSettings.for_checkpoint(tmp_path, top_k=9) == LiveSettings(fps=4, top_k=9)
    for broken in ('{"fps": "x"}', "{", "[1]", '{"more": 1}'):
        (tmp_path / SETTINGS_FILE).write_text(broken)
        with pytest.raises(CheckpointError, match=SETTINGS_FILE):
            LiveSettings.for_checkpoint(tmp_path)


def test_the_embedded_checkpoint_carries_its_own():
    assert json.loads((checkpoint_path() / SETTINGS_FILE).read_text()) == LIVE_SETTINGS
    assert LiveSettings.for_checkpoint(checkpoint_path()).text_budget == 512
