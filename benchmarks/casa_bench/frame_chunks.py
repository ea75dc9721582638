"""The ids of a growing conversation of frames, one assistant turn that never ends (the published captioner's).

opening, before image | after image          first turn
stop token, before image | after image       every other one: the stop token of the answer before it
"""

from __future__ import annotations

from casa_engine.live import LiveSettings
from casa_engine.live.stream_format import StreamFormat


class FrameChunks:
    """Spells one conversation.

    Args:
        format: How its checkpoint spells a stream.
        folds_stop: Whether the stop token begins the next chunk; else the reader has recorded it itself.
    """

    def __init__(self, format: StreamFormat, *, folds_stop: bool) -> None:
        self.format, self._folds_stop = format, folds_stop
        self._begins = True

    def next(self, num_markers: int) -> tuple[list[int], int]:
        """Return the ids of the next turn with `num_markers` image markers, and the index of the first marker."""
        if self._begins:
            ids = self.format.opening(LiveSettings())
        else:
            ids = [self.format.stop_ids[0]] if self._folds_stop else []
        self._begins = False
        ids += self.format.before_image
        return [*ids, *[self.format.image_token_id] * num_markers, *self.format.after_image], len(ids)
