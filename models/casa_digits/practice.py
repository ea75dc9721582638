"""What stage 3 practises: finding something in the text, near or far. Streams with many questions, unknown names.

Stage 2's streams of text alone are one long window, in which CA sees everything; in a stream every frame begins a
window, and CA sees nothing of those before. Here frames of the past keep their place, though no image is shown.
"""

from casa_digits.conversations import UNSEEN, Conversation, Writer
from casa_engine.tokenization import IMAGE_END, IMAGE_START, TURN_END


class PracticeWriter(Writer):
    """Writes the same kinds of conversations as `Writer`, with more to be found in them; see there."""

    question_rates = (0.0, 0.1, 0.3)
    last_questions = (1, 2, 4)
    last_questions_of_text = (2, 4, 6)
    name_shares = (0.1, 0.3)

    def _frame(self, talk: Conversation, image: int | None, caption: str, learn: bool) -> None:
        talk.append(self.spell(IMAGE_START))
        if image is None:
            talk.points.append(len(talk.ids))
            talk.images.append(UNSEEN)
        else:
            self._show(talk, image)
        talk.append(self.spell(IMAGE_END))
        talk.append(self.spell(caption + TURN_END), learn)
