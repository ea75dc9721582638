"""The eager session, frame by frame, against one pass over everything that it read and said."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from casa_digits.cases import draw_video
from casa_engine.checkpoints import load_model
from casa_engine.digits import checkpoint_path
from casa_engine.live import LiveSettings
from casa_engine.live.caption_logits import CaptionState, caption_logits
from casa_engine.live.eager_stream import EagerStream
from casa_engine.live.stream_format import StreamFormat

NUM_FRAMES = 10
PLAIN = LiveSettings.for_checkpoint(checkpoint_path())
# A model that reads digits runs into every rule when these are on.
RULES = replace(PLAIN, repetition_penalty=1.3, stop_bias=0.7, ngram_size=3, ngram_window=40, max_frame_tokens=7)


@pytest.fixture(scope="module")
def model():
    return load_model(checkpoint_path())


@pytest.fixture(scope="module")
def spelling():
    return StreamFormat.from_checkpoint(checkpoint_path())


@pytest.mark.parametrize("settings", [PLAIN, RULES], ids=["plain", "rules"])
@torch.inference_mode()
def test_one_pass_says_the_same(model, spelling, settings):
    frames = [Image.fromarray(frame) for frame in draw_video(np.random.default_rng(3), NUM_FRAMES).frames]
    stream = EagerStream(model, spelling, settings)
    captions = [stream.caption(frame) for frame in frames]
    assert any(captions)

    ids, points, choices = list(stream.transcript.prompt), [], []
    for entry in stream.transcript.entries:
        points.append(len(ids) + len(spelling.before_image))
        ids += entry.opening
        choices += range(len(ids), len(ids) + len(entry.said) + (len(entry.said) < settings.max_frame_tokens))
        ids += (*entry.said, entry.stop)
    vision = spelling.processor.process_images(frames)
    logits = model(torch.tensor([ids]), insertion_points=torch.tensor(points), **vision).logits[0].float()

    state, read, rules = CaptionState(), 0, stream.transcript.rules
    for index in choices:
        state = state.read(ids[read:index], rules).decay_counts(rules)
        read = index
        assert int(caption_logits(logits[index - 1], state, rules).argmax()) == ids[index]


def test_a_seed_makes_sampling_repeatable(model, spelling):
    frames = [Image.fromarray(frame) for frame in draw_video(np.random.default_rng(4), 5).frames]
    settings = replace(RULES, temperature=10.0, top_k=50, seed=5)
    said = [[stream.caption(frame) for frame in frames] for stream in _streams(model, spelling, settings, settings)]
    assert said[0] == said[1]
    others = _streams(model, spelling, replace(settings, seed=6), replace(settings, temperature=0))
    assert all([other.caption(frame) for frame in frames] != said[0] for other in others)


def test_a_session_knows_its_history(model, spelling):
    """What was said is known to a session that starts from it, and to no other."""
    video, other = (draw_video(np.random.default_rng(seed), 1) for seed in (5, 6))

    def first_read(history=()):
        stream = EagerStream(model, spelling, PLAIN, history)
        assert stream.caption(Image.fromarray(other.frames[0])) == other.texts[0]
        return stream.ask("What did you read first?")

    before = EagerStream(model, spelling, PLAIN)
    assert before.caption(Image.fromarray(video.frames[0])) == video.texts[0] != other.texts[0]
    assert first_read(before.transcript.history) == video.texts[0]
    assert first_read() == other.texts[0]


def _streams(model, spelling, *settings):
    return [EagerStream(model, spelling, each) for each in settings]
