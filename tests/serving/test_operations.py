"""What an operator sees of a plain `casa-serve`: the end of its start, its log, its metrics and spans, usage."""

import json
import re
import struct
from uuid import uuid4

import pytest
from websockets.asyncio.client import connect

from casa_serving.live.protocol import read_event
from image_files import encoded, plain
from waiting import soon

pytestmark = pytest.mark.vllm
MODEL = "casa-tiny-digits"


def test_the_start_ends_in_one_line(server):
    """With the address, also where the port was chosen by the system, and the model; behind everything of vLLM's."""
    lines = server.log.read_text().splitlines()
    (ready,) = [number for number, line in enumerate(lines) if "Ready: " in line]
    assert lines[ready].endswith(f"Ready: {server.url} serves {MODEL}.")
    starting = [number for number, line in enumerate(lines) if re.search("Uvicorn running|startup complete", line)]
    assert starting and max(starting) < ready


def test_usage_says_what_was_found_in_the_cache(ask):
    text = "The same question, long enough for some pages of the cache. " * 4
    first, second = (ask(text).usage for _ in range(2))
    assert first.prompt_tokens == second.prompt_tokens
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


async def test_a_live_session_in_log_metrics_and_spans(server, traces):
    """One frame, one that is no image, a question, all below the client's own span."""
    trace_id, parent_id = uuid4().hex, uuid4().hex[:16]
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
    async with connect(server.live_url, additional_headers=headers) as socket:

        async def send(message, until):
            await socket.send(message if isinstance(message, bytes) else json.dumps(message))
            while (event := read_event(await socket.recv())).type != until:
                pass
            return event

        created = await send({"type": "session.create"}, "session.created")
        done = await send(struct.pack("<d", 0.0) + encoded(plain(56, 28)), "frame.done")
        await send(struct.pack("<d", 1.0) + b"no image", "error")
        await send({"type": "question", "text": "What did you read?"}, "answer.done")
        statistics = (await send({"type": "session.stop"}, "session.closed")).statistics
    assert (statistics.frames, statistics.refused, statistics.questions) == (2, 1, 1)

    def ended():
        return [line for line in server.log.read_text().splitlines() if f"Live session {created.session} ended" in line]

    await soon(lambda: ended())
    (line,) = ended()
    words = r"after \d+\.\d s: stopped; 2 frames \((\d+) captioned, (\d+) silent, 0 dropped, 1 refused, \d+ late\), "
    found = re.search(words + r"1 questions, (\d+) tokens, 0 trims, 0 restarts\.$", line)
    assert found and [int(number) for number in found.groups()] == [
        statistics.captioned,
        statistics.silent,
        statistics.tokens,
    ]

    labels = f'engine="0",model_name="{MODEL}"'
    metrics = server.get("/metrics")
    for name in ("live_sessions", "live_trims_total", "live_restarts_total", "live_late_frames_total"):
        assert re.search(rf"^casa:{name}\{{{labels}\}} ", metrics, re.MULTILINE), name
    for result in ("captioned", "silent", "dropped", "refused"):
        assert re.search(rf'^casa:live_frames_total\{{{labels},result="{result}"\}} ', metrics, re.MULTILINE), result
    assert re.search(rf"^casa:live_frame_delay_seconds_count\{{{labels}\}} [1-9]", metrics, re.MULTILINE)

    # vLLM sends spans every five seconds.
    await soon(lambda: [span for span in traces.named("live_session") if span.trace_id == trace_id], timeout_s=30)
    of_client = [span for span in traces.spans if span.trace_id == trace_id]
    (session,) = [span for span in of_client if span.name == "live_session"]
    assert session.parent_id == parent_id and session.attributes["casa.live.session"] == created.session
    assert session.attributes["gen_ai.response.model"] == MODEL
    assert session.attributes["casa.live.reason"] == "stopped" and session.attributes["casa.live.frames"] == 2
    frame, refused = sorted(
        (span for span in of_client if span.name == "live_frame"), key=lambda span: span.attributes["casa.live.number"]
    )
    (question,) = [span for span in of_client if span.name == "live_question"]
    assert {frame.parent_id, refused.parent_id, question.parent_id} == {session.span_id}
    assert frame.attributes["casa.live.result"] == ("captioned" if done.caption else "silent")
    assert frame.attributes["gen_ai.usage.completion_tokens"] == done.num_tokens
    assert frame.attributes["gen_ai.latency.e2e"] == pytest.approx(done.delay_ms / 1000, abs=0.01)
    assert frame.ended_s - frame.begun_s == pytest.approx(done.delay_ms / 1000, abs=0.5)
    assert refused.is_error and refused.attributes["casa.live.result"] == "refused"
    assert not frame.is_error and question.attributes["casa.live.result"] == "answered"
