"""A frame's result is the same for the engine, the wire, the client and the files, each under its own names."""

import json
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from casa_serving.caption.subtitles import line
from casa_serving.live.metrics import LiveMetrics, SessionStatistics
from casa_serving.live.protocol import FrameDone, read_event
from casa_serving.live.results import FrameResult

pytestmark = pytest.mark.unit
RESULT = FrameResult(
    timestamp=1 / 3,
    caption="four",
    num_tokens=3,
    truncated=False,
    trimmed=True,
    restarted=False,
    queue_ms=1.23456,
    ttft_ms=2.34567,
    total_ms=3.45678,
    delay_ms=4.69134,
    text_tokens=40,
    image_tokens=4,
    image_pages=2,
    kv_bytes=8192,
    insertion_bytes=1024,
)
EVENT = {
    "type": "frame.done",
    "frame": 7,
    "timestamp": 1 / 3,
    "caption": "four",
    "num_tokens": 3,
    "truncated": False,
    "trimmed": True,
    "restarted": False,
    "queue_ms": 1.23,
    "ttft_ms": 2.35,
    "total_ms": 3.46,
    "delay_ms": 4.69,
    "text_tokens": 40,
    "image_tokens": 4,
    "image_pages": 2,
    "kv_bytes": 8192,
    "insertion_bytes": 1024,
}


def test_the_event_has_these_fields_in_this_order():
    text = FrameDone.of(7, RESULT).model_dump_json()
    assert list(json.loads(text).items()) == list(EVENT.items())


def test_a_client_gets_the_result_back():
    event = read_event(json.dumps(EVENT | {"of_a_later_version": 1}))
    assert event.frame == 7
    assert event.result == replace(RESULT, queue_ms=1.23, ttft_ms=2.35, total_ms=3.46, delay_ms=4.69)


def test_a_line_of_the_captioner_has_its_own_names():
    assert list(line(RESULT).items()) == [
        ("timestamp", 0.333333),
        ("caption", "four"),
        ("tokens", 3),
        ("ttft_ms", 2.346),
        ("delay_ms", 4.691),
        ("text_tokens", 40),
        ("image_pages", 2),
    ]


def test_delays_of_the_statistics_are_rounded():
    statistics = SessionStatistics(LiveMetrics(["m", "0"], CollectorRegistry()), frame_interval_ms=4.69)
    statistics.add_frame(RESULT)
    summary = statistics.summary()
    assert summary.delay_ms.model_dump() == {"p50": 4.7, "p95": 4.7, "max": 4.69}
    assert (summary.captioned, summary.tokens, summary.trims, summary.late) == (1, 3, 1, 1)
