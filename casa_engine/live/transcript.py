"""The text KV of a live session as one explicit value: what was read and said, what to feed next, what to forget.

    ids       prompt | frame caption stop | frame caption stop | question answer stop | frame ...
                                                                                  ^ known to the reader up to here
    pending                                                                       stop

A reader (the eager model's cache, or a request in the engine) holds the first `num_known` ids. A generation ends with
a token that was only sampled: it is fed with the next chunk, before the new frame. That is how the stop token that
was really emitted gets recorded, once per frame. A caption cut at its limit keeps its last token, and the stop token
emitted last is recorded after it.

Within the text budget nothing is forgotten. When the next frame would not fit, silent frames leave, then the oldest
captions, down to half of the budget; the prompt and the last caption always stay, because the next frame is compared
with it. The reader then starts anew with what is left, as text without images, all but one: the latest frame is shown
again in its place. A model that has not seen it captions the next one although nothing has changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from casa_engine.errors import InputError
from casa_engine.live.caption_logits import CaptionRules, CaptionState
from casa_engine.live.settings import LiveSettings
from casa_engine.live.stream_format import StreamFormat

Image = TypeVar("Image")


@dataclass(frozen=True)
class HistoryItem:
    """Something said before, in words: a caption, or a question with its answer.

    Attributes:
        caption: What was said to a frame; "" is silence.
        timestamp: Of that frame, in seconds.
        question: What was asked.
        answer: What was answered.
    """

    caption: str | None = None
    timestamp: float | None = None
    question: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless it is exactly one of the two."""
        is_caption = isinstance(self.caption, str) and self.question is None and self.answer is None
        is_answer = isinstance(self.question, str) and isinstance(self.answer, str) and self.caption is None
        if not is_caption and not is_answer:
            raise InputError("a history item is neither a caption nor a question with its answer: give one of the two.")
        stamp = self.timestamp
        if stamp is not None and (isinstance(stamp, bool) or not isinstance(stamp, (int, float))):
            raise InputError(f"timestamp of a history item is {stamp!r}; expected seconds.")

    @classmethod
    def from_fields(cls, values: Any) -> "HistoryItem":
        """An item from a dictionary; unknown names are refused with InputError."""
        names = ("caption", "timestamp", "question", "answer")
        if not isinstance(values, dict) or set(values) - set(names):
            raise InputError(f"history item {values!r:.200}; expected an object with fields of {list(names)}.")
        return cls(**values)


@dataclass(frozen=True)
class Chunk:
    """What to feed next.

    Attributes:
        token_ids: Text ids that the reader lacks: what is pending, then what opens the new entry.
        opening: The last of them, which belong to the new entry.
        insertion_points: For each image the index in `token_ids` of the first token after it: the latest frame, if
            the reader starts anew, and the new frame, unless this is a question.
        max_tokens: Most tokens to generate after it.
        state: For the choice of the first token (counts not yet decayed).
        question: What is asked, if anything.
    """

    token_ids: tuple[int, ...]
    opening: tuple[int, ...]
    insertion_points: tuple[int, ...]
    max_tokens: int
    state: CaptionState
    question: str | None = None

    def images(self, latest: Image | None, new: Image | None) -> list[Image]:
        """Which of the two to feed, in the order of `insertion_points`."""
        shown = [] if self.question is not None else [new]
        return [latest] * (len(self.insertion_points) - len(shown)) + shown


@dataclass(frozen=True, eq=False)
class Entry:
    """A frame with its caption, or a question with its answer.

    Attributes:
        opening: Delimiters of the frame (and the priming text of the first), or the question's turn.
        said: What was generated, without the stop token.
        stop: The stop token that is recorded after it.
        text: `said` in words, with the priming text.
        question: What was asked, if anything.
        timestamp: Of the frame, if known.
    """

    opening: tuple[int, ...]
    said: tuple[int, ...]
    stop: int
    text: str
    question: str | None = None
    timestamp: float | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All of it."""
        return (*self.opening, *self.said, self.stop)

    @property
    def is_caption(self) -> bool:
        """A frame to which something was said."""
        return self.question is None and self.text != ""

    @property
    def is_silent(self) -> bool:
        """A frame to which nothing was said."""
        return self.question is None and self.text == ""


class Transcript:
    """Everything a session has read and said, in order.

    Args:
        format: Spells it.
        settings: Instruction, limits and budget.
        history: What was said before, in words; read as text without images.

    Attributes:
        prompt: Ids before the first entry.
        entries: Frames and questions that are kept.
        num_known: How many of `ids` the reader holds.
        last_stop: The stop token emitted last.
        rules: What changes the logits.
        state: What those remember.

    Raises:
        InputError: The budget is too small for the prompt and two frames, or a text holds special tokens.
    """

    def __init__(self, format: StreamFormat, settings: LiveSettings, history: Sequence[HistoryItem] = ()) -> None:
        self.format, self.settings = format, settings
        self.prompt = format.opening(settings)
        self.entries: list[Entry] = []
        self.num_known = 0
        self.last_stop = format.stop_ids[0]
        self.rules = CaptionRules.from_settings(settings, format.stop_ids)
        self._priming = tuple(format.words("prompt", settings.prompt)) if settings.prompt and not history else ()
        self._seen: Entry | None = None
        self._check_budget()
        for item in history:
            self.entries.append(self._entry_from_history(item))
        self.make_room(self.frame_tokens)
        self.state = CaptionState()
        self._unread = list(self.ids)

    @property
    def ids(self) -> list[int]:
        """All ids in order."""
        return self.prompt + [token for entry in self.entries for token in entry.token_ids]

    @property
    def num_tokens(self) -> int:
        """Length of `ids`."""
        return len(self.prompt) + sum(len(entry.token_ids) for entry in self.entries)

    @property
    def frame_tokens(self) -> int:
        """Most tokens that the next frame adds: delimiters, caption and stop token."""
        delimiters = len(self.format.before_image) + len(self.format.after_image)
        return delimiters + len(self._priming) + self.settings.max_frame_tokens + 1

    @property
    def history(self) -> list[HistoryItem]:
        """What is kept, in words."""
        return [
            HistoryItem(caption=entry.text, timestamp=entry.timestamp)
            if entry.question is None
            else HistoryItem(question=entry.question, answer=entry.text)
            for entry in self.entries
        ]

    def make_room(self, num_new: int) -> bool:
        """Forget where `num_new` more tokens would exceed the budget.

        Returns:
            Whether something was forgotten, so that the reader has to start anew.

        Raises:
            InputError: What always stays leaves too little room.
        """
        budget = self.settings.text_budget
        if self.num_tokens + num_new <= budget:
            return False
        kept = self._select_entries(min(budget // 2, budget - num_new))
        num_kept = len(self.prompt) + sum(len(entry.token_ids) for entry in kept)
        if num_kept + num_new > budget:
            raise InputError(
                f"{num_new} more text tokens are needed, and the prompt and the last caption take {num_kept} of a "
                f"text_budget of {budget}; expected them to fit: shorten the text or raise text_budget."
            )
        self.entries = kept
        self.reset()
        return True

    def reset(self) -> None:
        """The reader has lost everything: the next chunk holds all text."""
        self.num_known = 0

    def frame_chunk(self) -> Chunk:
        """What to feed with the next frame; there must be room (`make_room(frame_tokens)`)."""
        opening = (*self.format.before_image, *self.format.after_image, *self._priming)
        pending = self.ids[self.num_known :]
        points = (*self._shown_again(), len(pending) + len(self.format.before_image))
        return self._chunk(pending, opening, points, self.settings.max_frame_tokens)

    def question_chunk(self, question: str) -> Chunk:
        """What to feed for a question, after making room for it and its answer.

        Raises:
            InputError: The question is too long for the budget, or holds special tokens.
        """
        first = () if self.entries else (self.last_stop,)
        opening = (*first, *self.format.question(question))
        wanted = len(opening) + self.settings.max_answer_tokens + 1
        least = len(opening) + min(self.settings.max_answer_tokens, self.settings.max_frame_tokens) + 1
        self.make_room(max(least, min(wanted, self.settings.text_budget // 2)))
        room = self.settings.text_budget - self.num_tokens - len(opening) - 1
        max_tokens = min(self.settings.max_answer_tokens, room)
        return self._chunk(self.ids[self.num_known :], opening, self._shown_again(), max_tokens, question)

    def text_of(self, chunk: Chunk, generated: Sequence[int]) -> str:
        """What was generated after a chunk in words, with the priming text; "" is silence."""
        priming = () if chunk.question is not None else self._priming
        said = generated[:-1] if generated and generated[-1] in self.format.stop_ids else generated
        return self.format.text([*priming, *said]).strip()

    def record(self, chunk: Chunk, generated: Sequence[int], timestamp: float | None = None) -> Entry:
        """Add what was generated after a chunk (one token or more; the last was only sampled).

        Returns:
            The new entry.
        """
        said, stopped = list(generated), generated[-1] in self.format.stop_ids
        if stopped:
            self.last_stop = said.pop()
        text = self.text_of(chunk, generated)
        entry = Entry(chunk.opening, tuple(said), self.last_stop, text, chunk.question, timestamp)
        known = self.num_tokens + len(chunk.opening) + len(generated) - 1
        self.entries.append(entry)
        self.num_known = known
        self.state = chunk.state.after(generated, self.rules)
        self._unread = self.ids[known:]
        if chunk.question is None:
            self._priming, self._seen = (), entry
        return entry

    def _chunk(
        self,
        pending: list[int],
        opening: tuple[int, ...],
        points: tuple[int, ...],
        max_tokens: int,
        question: str | None = None,
    ) -> Chunk:
        # What is fed a second time after a restart was read before.
        state = self.state.read([*self._unread, *opening], self.rules)
        return Chunk((*pending, *opening), opening, points, max_tokens, state, question)

    def _shown_again(self) -> tuple[int, ...]:
        """Where the latest frame stands in the text, for a reader that starts anew; nowhere for others."""
        if self.num_known or self._seen not in self.entries:
            return ()
        before = self.entries[: self.entries.index(self._seen)]
        start = len(self.prompt) + sum(len(entry.token_ids) for entry in before)
        return (start + len(self.format.before_image),)

    def _select_entries(self, target: int) -> list[Entry]:
        """The entries without silent frames, and without the oldest until at most `target` tokens are left."""
        entries = [entry for entry in self.entries if not entry.is_silent or entry is self._seen]
        last = next((entry for entry in reversed(entries) if entry.is_caption), None)
        left = len(self.prompt) + sum(len(entry.token_ids) for entry in entries)
        kept: list[Entry] = []
        for entry in entries:
            if left > target and entry is not last and entry is not self._seen:
                left -= len(entry.token_ids)
            else:
                kept.append(entry)
        if kept and kept[0].question is not None and kept[0].opening[0] not in self.format.stop_ids:
            # It followed an entry that ended with one; now it follows the prompt's open turn.
            kept[0] = replace(kept[0], opening=(self.last_stop, *kept[0].opening))
        return kept

    def _entry_from_history(self, item: HistoryItem) -> Entry:
        if item.question is not None:
            first = () if self.entries else (self.last_stop,)
            opening = (*first, *self.format.question(item.question))
            said = tuple(self.format.words("answer", item.answer or ""))
            return Entry(opening, said, self.last_stop, item.answer or "", item.question)
        text = (item.caption or "").strip()
        said = tuple(self.format.words("caption", text))
        opening = (*self.format.before_image, *self.format.after_image)
        return Entry(opening, said, self.last_stop, text, None, item.timestamp)

    def _check_budget(self) -> None:
        silence = len(self.format.before_image) + len(self.format.after_image) + 1
        needed = len(self.prompt) + 2 * self.frame_tokens + silence
        if needed > self.settings.text_budget:
            raise InputError(
                f"text_budget is {self.settings.text_budget}; expected at least {needed}: the prompt takes "
                f"{len(self.prompt)} tokens, and two frames with {self.frame_tokens} each and a silent one with "
                f"{silence} must fit beside it."
            )
