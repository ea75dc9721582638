"""Live captioning without an engine: what a session is told, what it has said, and how its next words are chosen.

    settings.py        what a session is asked to do
    demonstration.py   what a checkpoint says about itself to visitors
    transcript.py      the text KV of a session as one explicit value, and what leaves it when it grows too long
    caption_logits.py  repetition penalty, stop bias and n-gram ban, with a state that travels with the session
    eager_stream.py    a session of the eager model: the reference

Text is all that lasts: everything that a session needs to go on is in its transcript.
"""

from casa_engine.live.settings import LiveSettings
from casa_engine.live.transcript import HistoryItem, Transcript

__all__ = ["HistoryItem", "LiveSettings", "Transcript"]
