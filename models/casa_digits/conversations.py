r"""Training conversations: token ids, which of them are learned, and where the images are.

    chat     <|im_start|>user\n<|vision_start|>[image]<|vision_end|>Read the digits.<|im_end|>\n
             <|im_start|>assistant\n 3 7 1<|im_end|> \n ...                              (learned: 3 7 1<|im_end|>)

    stream   <|im_start|>user\nSay the digits when they change.<|im_end|>\n<|im_start|>assistant\n
             <|vision_start|>[frame]<|vision_end|> 3 7 1<|im_end|>                        first frame: always captioned
             <|vision_start|>[frame]<|vision_end|> <|im_end|>                             the same digits: silence
             <|vision_start|>[frame]<|vision_end|> 3 7 2<|im_end|>                        others: captioned

    form     ... Read the digits as JSON.<|im_end|>\n<|im_start|>assistant\n
             {"digits": [3, 7, 1]}<|im_end|>                                              names may be forced: forms.py

    tools    <|im_start|>system\n<tools>\n{"name": "report", "arguments": {"digits": [integer]}}\n</tools><|im_end|>\n
             ... <|im_start|>assistant\n
             <tool_call>\n{"name": "report", "arguments": {"digits": [3, 7, 1]}}\n</tool_call><|im_end|>\n
             <|im_start|>user\n<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>assistant\n3 7 1<|im_end|>

(No spaces or line breaks but those written as \n.) A stream is one assistant turn that never ends. Its rule compares
with the last *caption*, right or wrong, so some streams have captions that are wrong or missing and not learned.

Questions about what was read before are about the text that is still there, right or wrong: the first caption is the
oldest one that a session has kept.
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from casa_digits.data import MAX_DIGITS
from casa_digits.forms import (
    COMPACT,
    INTEGER,
    INTEGERS,
    NAME_SHARES,
    SPACED,
    Form,
    NameShares,
    Spelled,
    draw_form,
    draw_name,
    fill_form,
    schema_of,
    spell_form,
    spell_pieces,
)
from casa_digits.frames import FramePool
from casa_digits.memory import CHAT_QUESTIONS, QUESTIONS, recall
from casa_digits.phrases import (
    COUNT,
    COUNT_JSON,
    NO_IMAGE,
    READ,
    READ_JSON,
    REPORT,
    SMALL_TALK,
    SYSTEM,
    TOOL_NAMES,
    TOOL_RESULTS,
    WATCH,
)
from casa_engine.tokenization import IMAGE_END, IMAGE_START, TURN_END, TURN_START

IGNORED = -100
NO_DIGIT = 10
NOTES, NOTE_CLASSES = MAX_DIGITS + 1, 11
UNSEEN = -1  # an image of which only the place is known: its window begins there
SILENCE_LEARNED = 0.5  # of the unchanged frames: a missed change costs more than a repeated caption


@dataclass
class Conversation:
    """One row of a batch, built piece by piece.

    Attributes:
        ids: token ids of the text stream.
        labels: the same where the model learns, else -100.
        points: insertion point of each image.
        images: which image of the pool it is, or `UNSEEN`.
        notes: what a token should know about the past, of `NOTES` kinds: (token, kind, class). See `_note`.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    points: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    notes: list[tuple[int, int, int]] = field(default_factory=list)

    def append(self, ids: tuple[int, ...], learn: bool = False) -> None:
        """Add tokens, learned or only read."""
        self.ids += ids
        self.labels += ids if learn else [IGNORED] * len(ids)


class Writer:
    """Writes random conversations about the images of a pool.

    Args:
        tokenizer: Spells the text.
        rng: Source of all randomness.
    """

    # How often a stream asks after a frame, and at its end; with and without images.
    question_rates: tuple[float, ...] = (0.0, 0.03, 0.1)
    last_questions: tuple[int, ...] = (0, 1, 2)
    last_questions_of_text: tuple[int, ...] = (1, 2, 4)
    name_shares = NAME_SHARES
    # Whether frames of the past, whose image is not shown, still begin a window.
    marks_the_past = False

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        self.rng = rng
        self.tokenizer = tokenizer
        self.spell = lru_cache(maxsize=20_000)(lambda text: tuple(tokenizer(text)["input_ids"]))

    def chat(self, pool: FramePool) -> Conversation:
        """Write one to four turns with an image (some with two), each read or counted, perhaps asked again."""
        talk = self._begin()
        if self._chance(0.1):
            self._exchange(talk, self._pick(SMALL_TALK + READ + COUNT), NO_IMAGE)
        for _ in range(self.rng.choice([1, 2, 3, 4], p=[0.5, 0.3, 0.12, 0.08])):
            image = pool.any(self.rng)
            images = [pool.any(self.rng), image] if self._chance(0.05) else [image]
            self._ask(talk, pool, images, image)
            while self._chance(0.25):
                self._ask(talk, pool, [], image)
        return talk

    def memory(self, pool: FramePool) -> Conversation:
        """Write readings and questions for earlier ones, which may have been wrong: the text decides.

        In half of them only the answers to those questions are learned: they are the hardest, and easily drowned.
        """
        talk = self._begin()
        wrong, learn = self._chance(0.4), self._chance(0.5)
        said: list[str] = []
        for _ in range(self.rng.choice([1, 2, 3, 4], p=[0.1, 0.4, 0.4, 0.1])):
            image = pool.any(self.rng)
            answer = pool.texts[pool.any(self.rng)] if wrong else pool.texts[image]
            if not said or self._chance(0.7):
                said.append(answer)
                self._exchange(talk, self._pick(READ), answer, [image], learn=learn and not wrong)
                self._note(talk, said, len(talk.ids) - 2)
            else:
                self._exchange(talk, self._pick(COUNT), str(len(pool.texts[image].split())), [image], learn)
            if self._chance(0.15):
                self._exchange(talk, self._pick(COUNT), str(len(pool.texts[image].split())), learn=learn)
            if self._chance(0.4):
                self._exchange(talk, *self._recall(said, CHAT_QUESTIONS))
        self._exchange(talk, *self._recall(said, CHAT_QUESTIONS))
        if self._chance(0.2):
            self._ask(talk, pool, [], image, learn)
        return talk

    def _recall(self, said: list[str], kinds: tuple[str, ...]) -> tuple[str, str]:
        """Draw a question about what was said before, and its answer."""
        kind = kinds[int(self.rng.integers(len(kinds)))]
        return self._pick(QUESTIONS[kind]), recall(kind, said)

    def stream(self, pool: FramePool, num_tokens: int, text_only: bool = False) -> Conversation:
        """Write frames in one assistant turn, up to about `num_tokens`; at times resumed, with questions within.

        Args:
            pool: The images.
            num_tokens: Length of the text.
            text_only: No image is shown, and only what was said before is asked for: that costs little to learn from.
        """
        talk = self._begin()
        self._turn(talk, "user", self._pick(WATCH))
        talk.append(self.spell(f"{TURN_START}assistant\n"))
        image, said = pool.any(self.rng), []
        if self._chance(0.03):
            self._interrupt(talk, pool, None, said)
        change = self.rng.choice([0.08, 0.2, 0.4, 0.7])
        faults = self.rng.choice([0.0, 0.05, 0.15], p=[0.6, 0.3, 0.1])
        text_only_until = len(talk.ids) + int(self.rng.random() * 0.8 * num_tokens) if self._chance(0.35) else 0
        drop_silent = self._chance(0.5)
        asks = self.rng.choice(self.question_rates)
        while len(talk.ids) < num_tokens:
            remembered = text_only or len(talk.ids) < text_only_until
            caption = "" if said and said[-1] == pool.texts[image] else pool.texts[image]
            learn = not remembered and (caption != "" or self._chance(SILENCE_LEARNED))
            if self._chance(faults):
                caption, learn = (
                    ("" if said and self._chance(0.5) else pool.texts[pool.sibling(self.rng, image)]),
                    False,
                )
            said += [caption] if caption else []
            if not (remembered and drop_silent and not caption):
                self._frame(talk, None if remembered else image, caption, learn)
                if caption:
                    self._note(talk, said, len(talk.ids) - 1)
            if text_only or not remembered:
                while self._chance(asks):
                    self._interrupt(talk, pool, None if text_only else image, said)
            image = self._next_frame(pool, image, change)
        for _ in range(int(self.rng.choice(self.last_questions_of_text if text_only else self.last_questions))):
            self._interrupt(talk, pool, None if text_only else image, said, at_end=True)
        return talk

    def form(self, pool: FramePool) -> Conversation:
        """Write one or two answers in JSON: of its own accord, or with names and blanks that a grammar forces."""
        talk = self._begin()
        if self._chance(0.15):
            self._turn(talk, "system", self._instructions())
        for _ in range(1 if self._chance(0.75) else 2):
            image = pool.any(self.rng)
            if self._chance(0.3):
                kind = self._chance(0.6)
                question = self._pick(READ_JSON if kind else COUNT_JSON)
                filled = fill_form({"digits": INTEGERS} if kind else {"count": INTEGER}, pool.texts[image])
                self._answer_with(talk, question, image, spell_form(filled), loose=False, learn_all=True)
                continue
            question = self._pick(READ_JSON + COUNT_JSON + REPORT + READ + COUNT)
            style = self.rng.random()
            separators, indent = (
                (SPACED, None) if style < 0.65 else (COMPACT, None) if style < 0.88 else ((",", ": "), 2)
            )
            spelled = spell_form(
                fill_form(draw_form(self.rng, shares=self.name_shares), pool.texts[image]), separators, indent
            )
            self._answer_with(talk, question, image, spelled, loose=self._chance(0.4), learn_all=False)
        return talk

    def tools(self, pool: FramePool) -> Conversation:
        """Write calls of the first of one to three tools, their results and closing answers."""
        talk = Conversation()
        tools = draw_tools(self.rng, int(self.rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])), self.name_shares)
        lines = [show_tool(name, form) for name, form in tools]
        called, form = tools[0]
        self._turn(talk, "system", "<tools>\n" + "".join(f"{line}\n" for line in lines) + "</tools>")
        if self._chance(0.3):
            self._turn(talk, "system", self._pick(SYSTEM))
        for _ in range(1 if self._chance(0.75) else 2):
            image = pool.any(self.rng)
            counts = self._chance(0.25)
            question = self._pick(COUNT if counts else REPORT + READ)
            filled = fill_form(form, pool.texts[image])
            call = json.dumps({"name": called, "arguments": filled})
            self._exchange(talk, question, f"<tool_call>\n{call}\n</tool_call>", [image])
            if self._chance(0.6):
                answer = str(len(pool.texts[image].split())) if counts else pool.texts[image]
                result = json.dumps(filled) if self._chance(0.2) else self._pick(TOOL_RESULTS)
                self._exchange(talk, f"<tool_response>\n{result}\n</tool_response>", answer)
            else:
                break
        return talk

    def _answer_with(
        self, talk: Conversation, question: str, image: int, spelled: Spelled, *, loose: bool, learn_all: bool
    ) -> None:
        """Write an exchange whose answer is JSON; what the image does not tell is not learned unless `learn_all`."""
        self._turn(talk, "user", question, [image], image_first=self._chance(0.5))
        talk.append(self.spell(f"{TURN_START}assistant\n"))
        if loose:
            start = 0
            for end in range(1, len(spelled.text) + 1):
                if end == len(spelled.text) or spelled.known[end] != spelled.known[start]:
                    text = spelled.text[start:end]
                    ids = self.spell(text) if spelled.known[start] else spell_pieces(self.rng, self.spell, text)
                    talk.append(ids, spelled.known[start])
                    start = end
        else:
            encoded = self.tokenizer(spelled.text, return_offsets_mapping=True)
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                talk.append((token,), learn_all or any(spelled.known[start:end]))
        talk.append(self.spell(TURN_END), learn=True)
        talk.append(self.spell("\n"))

    def _instructions(self) -> str:
        """Write what some clients put before the question: a schema, to be passed over."""
        return f"Return JSON: {json.dumps(schema_of(draw_form(self.rng, 2)))}"

    def _next_frame(self, pool: FramePool, image: int, change: float) -> int:
        if not self._chance(change):
            return image if self._chance(0.5) else pool.take(self.rng, image)
        return pool.sibling(self.rng, image) if self._chance(0.75) else pool.any(self.rng)

    def _frame(self, talk: Conversation, image: int | None, caption: str, learn: bool) -> None:
        talk.append(self.spell(IMAGE_START))
        if image is not None or self.marks_the_past:
            self._show(talk, UNSEEN if image is None else image)
        talk.append(self.spell(IMAGE_END))
        talk.append(self.spell(caption + TURN_END), learn)

    def _interrupt(
        self, talk: Conversation, pool: FramePool, image: int | None, said: list[str], at_end: bool = False
    ) -> None:
        """Write a question typed into a stream; the frames go on right after its answer."""
        # The prompt ends within a turn: what stops it is written where nothing was said before.
        talk.append(self.spell("\n" if talk.ids[-1] == self.spell(TURN_END)[0] else f"{TURN_END}\n"))
        about_image = image is not None and not at_end and self._chance(0.3)
        question, answer = self._question(pool.texts[image]) if about_image else self._recall(said, tuple(QUESTIONS))
        self._turn(talk, "user", question)
        talk.append(self.spell(f"{TURN_START}assistant\n"))
        talk.append(self.spell(answer + TURN_END), learn=True)

    def _note(self, talk: Conversation, said: list[str], end: int) -> None:
        """Note what the tokens of the newest reading should know; the last of them, at `end`, ends its turn.

        A token knows the token that stands in its place in the reading before; the last one also those that follow it,
        and how often the reading has changed.
        """
        before = [int(digit) for digit in said[-2].split()] if len(said) > 1 else []
        length = len(said[-1].split())
        padded = [*before, *[NO_DIGIT] * MAX_DIGITS][:MAX_DIGITS]
        talk.notes += [(end - length + place, 0, padded[place]) for place in range(length)]
        talk.notes += [(end, kind, digit) for kind, digit in enumerate(padded[length:])]
        talk.notes.append((end, MAX_DIGITS, min(len(said) - 1, NOTE_CLASSES - 1)))

    def _begin(self) -> Conversation:
        talk = Conversation()
        kind = self.rng.random()
        if kind < 0.3:
            self._turn(talk, "system", self._pick(SYSTEM))
        elif kind < 0.36:
            letters = self.rng.integers(32, 127, self.rng.integers(1, 40))
            self._turn(talk, "system", bytes(letters.tolist()).decode())
        return talk

    def _question(self, text: str) -> tuple[str, str]:
        if self._chance(0.6):
            return self._pick(READ), text
        return self._pick(COUNT), str(len(text.split()))

    def _ask(self, talk: Conversation, pool: FramePool, images: list[int], about: int, learn: bool = True) -> None:
        self._exchange(talk, *self._question(pool.texts[about]), images, learn)

    def _exchange(
        self, talk: Conversation, question: str, answer: str, images: list[int] | tuple = (), learn: bool = True
    ) -> None:
        self._turn(talk, "user", question, images, image_first=self._chance(0.5))
        talk.append(self.spell(f"{TURN_START}assistant\n"))
        talk.append(self.spell(answer + TURN_END), learn)
        talk.append(self.spell("\n"))

    def _turn(
        self, talk: Conversation, role: str, text: str, images: list[int] | tuple = (), image_first: bool = True
    ) -> None:
        talk.append(self.spell(f"{TURN_START}{role}\n"))
        if not image_first:
            talk.append(self.spell(text))
        for image in images:
            talk.append(self.spell(IMAGE_START))
            self._show(talk, image)
            talk.append(self.spell(IMAGE_END))
        if image_first:
            talk.append(self.spell(text))
        talk.append(self.spell(f"{TURN_END}\n"))

    def _show(self, talk: Conversation, image: int) -> None:
        talk.points.append(len(talk.ids))
        talk.images.append(image)

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _pick(self, phrases: tuple[str, ...]) -> str:
        """Return the first phrase, the canonical one, half of the time."""
        return phrases[0] if self._chance(0.5) else phrases[int(self.rng.integers(len(phrases)))]


def draw_tools(rng: np.random.Generator, most: int, shares: NameShares) -> list[tuple[str, Form]]:
    """Draw names and arguments of up to `most` tools; a name that was drawn before is left out."""
    names = list(dict.fromkeys(draw_name(rng, TOOL_NAMES, shares) for _ in range(most)))
    return [(name, {} if rng.random() < 0.04 else draw_form(rng, depth=0, shares=shares)) for name in names]


def show_tool(name: str, form: Form) -> str:
    """Return a tool as the chat template shows it: like a call, with types in the places of values."""
    arguments = ", ".join(f'"{field}": {kind}' for field, kind in form.items())
    return f'{{"name": "{name}", "arguments": {{{arguments}}}}}'
