r"""Training conversations: token ids, which of them are learned, and where the images are.

    chat     <|im_start|>user\n<|vision_start|>[image]<|vision_end|>Read the digits.<|im_end|>\n
             <|im_start|>assistant\n 3 7 1<|im_end|> \n ...                              (learned: 3 7 1<|im_end|>)

    stream   <|im_start|>user\nSay the digits when they change.<|im_end|>\n<|im_start|>assistant\n
             <|vision_start|>[frame]<|vision_end|> 3 7 1<|im_end|>                        first frame: always captioned
             <|vision_start|>[frame]<|vision_end|> <|im_end|>                             the same digits: silence
             <|vision_start|>[frame]<|vision_end|> 3 7 2<|im_end|>                        others: captioned

(No spaces or line breaks but those written as \n.) A stream is one assistant turn that never ends. Its rule compares
with the last *caption*, right or wrong, so some streams have captions that are wrong or missing and not learned.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from casa_digits.frames import FramePool
from casa_digits.phrases import COUNT, FIRST, NO_IMAGE, READ, SMALL_TALK, SYSTEM, WATCH
from casa_engine.tokenization import IMAGE_END, IMAGE_START, TURN_END, TURN_START

IGNORED = -100
SILENCE_LEARNED = 0.5  # of the unchanged frames: a missed change costs more than a repeated caption


@dataclass
class Conversation:
    """One row of a batch, built piece by piece.

    Attributes:
        ids: token ids of the text stream.
        labels: the same where the model learns, else -100.
        points: insertion point of each image.
        images: which image of the pool it is.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    points: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def append(self, ids: tuple[int, ...], learn: bool = False) -> None:
        """Adds tokens, learned or only read."""
        self.ids += ids
        self.labels += ids if learn else [IGNORED] * len(ids)


class Writer:
    """Writes random conversations about the images of a pool.

    Args:
        tokenizer: Spells the text.
        rng: Source of all randomness.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        self.rng = rng
        self.spell = lru_cache(maxsize=20_000)(lambda text: tuple(tokenizer(text)["input_ids"]))

    def chat(self, pool: FramePool) -> Conversation:
        """Writes one to four turns with an image (some with two), each read or counted, perhaps asked again."""
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
        """Writes a conversation that asks for its first answer; it may have been wrong, the text decides.

        In half of them nothing else is learned: this is the hardest thing to find out about, and easily drowned.
        """
        talk = self._begin()
        wrong, learn = self._chance(0.4), self._chance(0.5)
        first = None
        for _ in range(self.rng.choice([1, 2, 3, 4], p=[0.1, 0.4, 0.4, 0.1])):
            image = pool.any(self.rng)
            answer = pool.texts[pool.any(self.rng)] if wrong else pool.texts[image]
            if first is None:
                first = answer
                self._exchange(talk, self._pick(READ), answer, [image], learn=learn and not wrong)
            else:
                self._ask(talk, pool, [image], image, learn)
            if self._chance(0.15):
                self._ask(talk, pool, [], image, learn)
            if self._chance(0.4):
                self._exchange(talk, self._pick(FIRST), first)
        self._exchange(talk, self._pick(FIRST), first)
        if self._chance(0.2):
            self._ask(talk, pool, [], image, learn)
        return talk

    def stream(self, pool: FramePool, num_tokens: int) -> Conversation:
        """Writes frames in one assistant turn, up to about `num_tokens`; at times resumed or with questions."""
        talk = self._begin()
        self._turn(talk, "user", self._pick(WATCH))
        talk.append(self.spell(f"{TURN_START}assistant\n"))
        image, said = pool.any(self.rng), None
        change = self.rng.choice([0.08, 0.2, 0.4, 0.7])
        faults = self.rng.choice([0.0, 0.05, 0.15], p=[0.6, 0.3, 0.1])
        text_only_until = len(talk.ids) + int(self.rng.random() * 0.8 * num_tokens) if self._chance(0.35) else 0
        drop_silent = self._chance(0.5)
        while len(talk.ids) < num_tokens:
            remembered = len(talk.ids) < text_only_until
            caption = "" if said == pool.texts[image] else pool.texts[image]
            learn = not remembered and (caption != "" or self._chance(SILENCE_LEARNED))
            if self._chance(faults):
                caption, learn = (
                    ("" if said and self._chance(0.5) else pool.texts[pool.sibling(self.rng, image)]),
                    False,
                )
            said = caption or said
            if not (remembered and drop_silent and not caption):
                self._frame(talk, None if remembered else image, caption, learn)
            if not remembered and self._chance(0.02):
                self._interrupt(talk, pool, image)
            image = self._next_frame(pool, image, change)
        return talk

    def _next_frame(self, pool: FramePool, image: int, change: float) -> int:
        if not self._chance(change):
            return image if self._chance(0.5) else pool.take(self.rng, image)
        return pool.sibling(self.rng, image) if self._chance(0.75) else pool.any(self.rng)

    def _frame(self, talk: Conversation, image: int | None, caption: str, learn: bool) -> None:
        talk.append(self.spell(IMAGE_START))
        if image is not None:
            self._show(talk, image)
        talk.append(self.spell(IMAGE_END))
        talk.append(self.spell(caption + TURN_END), learn)

    def _interrupt(self, talk: Conversation, pool: FramePool, image: int) -> None:
        """Writes a question typed into a stream; the frames go on right after its answer."""
        talk.append(self.spell("\n"))
        question, answer = self._question(pool.texts[image])
        self._turn(talk, "user", question)
        talk.append(self.spell(f"{TURN_START}assistant\n"))
        talk.append(self.spell(answer + TURN_END), learn=True)

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
        """Returns the first phrase, the canonical one, half of the time."""
        return phrases[0] if self._chance(0.5) else phrases[int(self.rng.integers(len(phrases)))]
