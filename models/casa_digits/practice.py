"""What stages 3 to 6 practise: finding something in the text, near or far.

Stage 2's streams of text alone are one long window, in which CA sees everything; in a stream every frame begins a
window, and CA sees nothing of those before. Here frames of the past keep their place, though no image is shown. It is
the same with the names of tools, which stand before the image: stage 6 writes `copies` in windows too.
"""

import json
from collections.abc import Mapping

import numpy as np
from transformers import PreTrainedTokenizerFast

from casa_digits.conversations import UNSEEN, Conversation, Writer, draw_tools, show_tool
from casa_digits.forms import CALL_END, CALL_START, NameShares, fill_form, spell_form
from casa_digits.frames import FramePool
from casa_digits.memory import QUESTIONS, recall
from casa_digits.phrases import REPORT
from casa_engine.tokenization import TURN_END, TURN_START


class PracticeWriter(Writer):
    """Writes the same kinds of conversations as `Writer`, with more to be found in them; see there."""

    question_rates = (0.0, 0.1, 0.3)
    last_questions = (1, 2, 4)
    last_questions_of_text = (2, 4, 6)
    name_shares = NameShares(first=0.1, known=0.3)
    marks_the_past = True


class FinishWriter(PracticeWriter):
    """Writes what is hardest more often: the questions that need two steps, and the names of tools."""

    question_shares: Mapping[str, float] = {"first": 0.2, "last": 0.15, "before": 0.35, "changes": 0.3}
    # Calls of a row of `copies`, and what each question shows: nothing, so that all is one window.
    num_copies = 3
    shown_in_copies: tuple[int, ...] = ()

    def copies(self, pool: FramePool) -> Conversation:
        """Write calls of a tool without any image: its name and those of its arguments are learned, not the values."""
        talk = Conversation()
        ((name, form),) = draw_tools(self.rng, 1, self.name_shares)
        self._turn(talk, "system", f"<tools>\n{show_tool(name, form)}\n</tools>")
        for _ in range(self.num_copies):
            spelled = spell_form(fill_form(form, pool.texts[pool.any(self.rng)]))
            self._turn(talk, "user", self._pick(REPORT), self.shown_in_copies)
            head, tail = f'{CALL_START}{{"name": {json.dumps(name)}, "arguments": ', f"}}{CALL_END}"
            known = [False] * len(head) + spelled.known + [False] * len(tail)
            encoded = self.tokenizer(head + spelled.text + tail, return_offsets_mapping=True)
            talk.append(self.spell(f"{TURN_START}assistant\n"))
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                talk.append((token,), learn=not any(known[start:end]))
            talk.append(self.spell(TURN_END), learn=True)
            talk.append(self.spell("\n"))
        return talk

    def _recall(self, said: list[str], kinds: tuple[str, ...]) -> tuple[str, str]:
        shares = [self.question_shares[kind] for kind in kinds]
        kind = str(self.rng.choice(kinds, p=[share / sum(shares) for share in shares]))
        return self._pick(QUESTIONS[kind]), recall(kind, said)


class ResumeWriter(FinishWriter):
    """Writes half of the streams as they are resumed: what was said before is one window of text, without frames."""

    def stream(self, pool: FramePool, num_tokens: int, text_only: bool = False) -> Conversation:
        """Write a stream; see `Writer`."""
        self.marks_the_past = self._chance(0.5)
        return super().stream(pool, num_tokens, text_only)


class NamesWriter(ResumeWriter):
    """Writes names of the tokenizer's own pieces, to be found across windows, and asks for numbers of changes."""

    question_shares: Mapping[str, float] = {"first": 0.12, "last": 0.1, "before": 0.28, "changes": 0.5}
    # The name stands in the list of tools and nowhere else.
    num_copies = 1
    shown_in_copies = (UNSEEN,)

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        super().__init__(tokenizer, rng)
        pieces = sorted(
            piece for piece in tokenizer.get_vocab() if piece.isascii() and piece.islower() and piece.isalpha()
        )
        self.name_shares = NameShares(first=0.1, known=0.2, pieces=tuple(pieces))
