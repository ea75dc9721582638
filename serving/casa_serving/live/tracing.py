"""Spans of live sessions, in the tracer that vLLM's `--otlp-traces-endpoint` sets up; without it they are nothing.

    what the client sends as `traceparent`
      live_session ------------------------------- from the handshake to the close
        live_frame ---   live_frame ---   from a frame's arrival to the last token of its caption
        live_question ---                 from its turn to the last token of its answer

Attributes have vLLM's names where it has one (`vllm.tracing.SpanAttributes`), times in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm.tracing import SpanAttributes

from casa_serving.live.protocol import Statistics
from casa_serving.live.results import AnswerResult, FrameResult

NANOSECONDS = 1_000_000_000


class SessionTrace:
    """The span of one session, and of each of its frames and questions.

    Args:
        session: The session's id.
        model_name: The model's, as clients know it.
        headers: Of the handshake; its `traceparent` is the parent.
    """

    def __init__(self, session: str, model_name: str, headers: Mapping[str, str]) -> None:
        self._tracer = trace.get_tracer("casa_serving.live")
        self._span = self._tracer.start_span(
            "live_session",
            context=TraceContextTextMapPropagator().extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes={"casa.live.session": session, SpanAttributes.GEN_AI_RESPONSE_MODEL: model_name},
        )
        self._context = trace.set_span_in_context(self._span)

    def add_frame(self, number: int, arrived_s: float, result: FrameResult) -> None:
        """Add the span of a frame that has been captioned, or for which the model stayed silent.

        Args:
            number: The frame's.
            arrived_s: When it arrived, on the monotonic clock.
            result: Its result.
        """
        latencies = {SpanAttributes.GEN_AI_LATENCY_TIME_IN_QUEUE: result.queue_ms / 1000}
        result_name = "captioned" if result.caption else "silent"
        self._add("live_frame", number, arrived_s, result, result_name, result.delay_ms, latencies)

    def add_answer(self, number: int, begun_s: float, result: AnswerResult) -> None:
        """Add the span of a question that has been answered; `begun_s` is when its turn came."""
        self._add("live_question", number, begun_s, result, "answered", result.total_ms, {})

    def add_failure(self, name: str, number: int | None, begun_s: float, result: str, message: str) -> None:
        """Add the span of a frame or question that came to nothing.

        Args:
            name: "live_frame" or "live_question".
            number: Its number; None where it has none.
            begun_s: When it arrived, on the monotonic clock.
            result: "dropped", "refused", or at the session's end "failed" (with the engine) or "abandoned".
            message: What the client is told; "" for what was dropped or abandoned, which is no error.
        """
        span = self._start(name, number, begun_s, {"casa.live.result": result})
        if message:
            span.set_status(Status(StatusCode.ERROR, message))
        span.end()

    def end(self, reason: str, statistics: Statistics, failure: str) -> None:
        """End the session's span.

        Args:
            reason: Why the session ended.
            statistics: The session's.
            failure: What the client is told where the engine failed; "" for every other end, which is no error.
        """
        counts = {name: getattr(statistics, name) for name in ("frames", "questions", "dropped", "refused", "restarts")}
        self._span.set_attributes(
            {
                "casa.live.reason": reason,
                SpanAttributes.GEN_AI_USAGE_COMPLETION_TOKENS: statistics.tokens,
                **{f"casa.live.{name}": value for name, value in counts.items()},
            }
        )
        if failure:
            self._span.set_status(Status(StatusCode.ERROR, failure))
        self._span.end()

    def _add(
        self,
        name: str,
        number: int,
        begun_s: float,
        result: FrameResult | AnswerResult,
        result_name: str,
        total_ms: float,
        latencies: dict[str, float],
    ) -> None:
        attributes = {
            "casa.live.result": result_name,
            "casa.live.trimmed": result.trimmed,
            "casa.live.restarted": result.restarted,
            SpanAttributes.GEN_AI_USAGE_COMPLETION_TOKENS: result.num_tokens,
            SpanAttributes.GEN_AI_LATENCY_TIME_TO_FIRST_TOKEN: result.ttft_ms / 1000,
            SpanAttributes.GEN_AI_LATENCY_E2E: total_ms / 1000,
            **latencies,
        }
        self._start(name, number, begun_s, attributes).end()

    def _start(self, name: str, number: int | None, begun_s: float, attributes: dict[str, Any]) -> trace.Span:
        begun_ns = time.time_ns() - int((time.monotonic() - begun_s) * NANOSECONDS)
        if number is not None:
            attributes["casa.live.number"] = number
        return self._tracer.start_span(
            name, context=self._context, kind=SpanKind.INTERNAL, attributes=attributes, start_time=begun_ns
        )
