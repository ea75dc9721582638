"""The text KV of a session in the engine is exactly its transcript, with either kind of scheduling.

With asynchronous scheduling the step that computes a stop token is on its way before anyone knows that it is one.
"""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from casa_digits.cases import draw_video
from casa_engine.checkpoints import load_model
from casa_engine.digits import checkpoint_path
from casa_engine.live import LiveSettings, Transcript
from casa_engine.live.caption_logits import to_dict
from casa_engine.live.eager_stream import EagerStream
from casa_engine.live.stream_format import StreamFormat

pytestmark = pytest.mark.vllm
NUM_FRAMES = 16
PROCESSOR = "casa_vllm.caption_processor:CaptionLogitsProcessor"
PLAIN = replace(LiveSettings.for_checkpoint(checkpoint_path()), text_budget=480)
# Captions are cut at three tokens, and every rule bites.
RULES = replace(
    PLAIN, repetition_penalty=1.3, stop_bias=0.7, ngram_size=3, ngram_window=40, max_frame_tokens=3, max_answer_tokens=9
)


class Driver:
    """A session through vLLM's synchronous engine, whose scheduler is within reach."""

    def __init__(self, engine, spelling, settings, name):
        self.engine, self.transcript, self.name = engine, Transcript(spelling, settings), name
        self.latest = None

    def send(self, chunk, image):
        from vllm import SamplingParams
        from vllm.renderers.inputs.preprocess import parse_model_prompt
        from vllm.sampling_params import RequestOutputKind

        inner, ids = self.engine.engine, list(chunk.token_ids)
        prompt = {"prompt_token_ids": ids}
        for point in reversed(chunk.insertion_points):
            ids.insert(point, self.transcript.format.image_token_id)
        if images := chunk.images(self.latest, image):
            prompt["multi_modal_data"] = {"image": images}
        parsed = parse_model_prompt(inner.model_config, prompt)
        (rendered,) = inner.renderer.render_cmpl([parsed], inner.renderer.default_cmpl_tok_params)
        params = SamplingParams(
            temperature=0,
            max_tokens=chunk.max_tokens,
            stop_token_ids=list(self.transcript.format.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"casa_live": to_dict(chunk.state, self.transcript.rules)},
        )
        tasks = inner.get_supported_tasks()
        request = inner.input_processor.process_inputs(self.name, rendered, params, tasks, resumable=True)
        request.external_req_id = self.name
        # In one process both would extend the same list.
        theirs = copy(request)
        theirs.prompt_token_ids = list(request.prompt_token_ids)
        inner.output_processor.add_request(theirs, None, None, 0)
        inner.engine_core.add_request(request)

    def answers(self, outputs):
        """Ids that the engine sent for this session, and whether the chunk has ended."""
        mine = [output.outputs[0] for output in outputs if output.request_id == self.name]
        ids = [token for completion in mine for token in completion.token_ids]
        return ids, any(completion.finish_reason is not None for completion in mine)


def play(engine, drivers, chunks, images):
    """Send a chunk to each session and step until all have ended."""
    generated = [[] for _ in drivers]
    for driver, chunk, image in zip(drivers, chunks, images, strict=True):
        driver.send(chunk, image)
    waiting = set(range(len(drivers)))
    while waiting:
        outputs = engine.engine.step()
        for index, driver in enumerate(drivers):
            ids, ended = driver.answers(outputs)
            assert not ids or index in waiting, "a chunk that had ended said more"
            generated[index] += ids
            waiting -= {index} if ended else set()
    for driver, chunk, image, ids in zip(drivers, chunks, images, generated, strict=True):
        driver.transcript.record(chunk, ids)
        driver.latest = image or driver.latest


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_text_is_exactly_the_transcript(is_async, engine):
    folder = checkpoint_path()
    spelling, model = StreamFormat.from_checkpoint(folder), load_model(folder)
    runner = engine(folder, is_async=is_async, max_model_len=512, logits_processors=[PROCESSOR])
    settings = [PLAIN, RULES]
    eager = [EagerStream(model, spelling, each) for each in settings]
    drivers = [Driver(runner, spelling, each, f"session-{i}") for i, each in enumerate(settings)]
    free = runner.num_free_blocks
    videos = [draw_video(np.random.default_rng(20 + i), NUM_FRAMES, 1, 4) for i in range(2)]
    for number in range(NUM_FRAMES):
        images = [Image.fromarray(video.frames[number]) for video in videos]
        chunks = [driver.transcript.frame_chunk() for driver in drivers]
        play(runner, drivers, chunks, images)
        if number % 6 == 5:
            # Longer than a caption may be: every chunk has a limit of its own.
            chunks = [driver.transcript.question_chunk("Read the digits.") for driver in drivers]
            play(runner, drivers, chunks, [None, None])
        for stream, image in zip(eager, images, strict=True):
            stream.caption(image)
            if number % 6 == 5:
                stream.ask("Read the digits.")
        for driver, stream in zip(drivers, eager, strict=True):
            request = runner.scheduler.requests[driver.name]
            known = request.num_computed_tokens - request.num_output_placeholders
            assert driver.transcript.ids == stream.transcript.ids
            assert known == driver.transcript.num_known
            assert list(request.all_token_ids)[:known] == driver.transcript.ids[:known]
    assert any(len(entry.said) == 3 for entry in drivers[1].transcript.entries)
    from vllm.v1.request import RequestStatus

    runner.scheduler.finish_requests([driver.name for driver in drivers], RequestStatus.FINISHED_ABORTED)
    runner.engine.output_processor.abort_requests([driver.name for driver in drivers], internal=True)
    assert runner.num_free_blocks == free
