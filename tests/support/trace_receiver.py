"""Receives spans as an OpenTelemetry collector does: OTLP over HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """One span; ids in hexadecimal, times in seconds, attributes as plain values."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begun_s: float
    ended_s: float
    is_error: bool
    attributes: dict[str, Any]


@dataclass
class TraceReceiver:
    """Attributes: the address that spans are sent to, and those that came so far."""

    url: str
    spans: list[Span] = field(default_factory=list)

    def named(self, name: str) -> list[Span]:
        """Return the spans of a name."""
        return [span for span in self.spans if span.name == name]


def read_spans(body: bytes) -> list[Span]:
    """Return the spans of a request's body."""
    request = ExportTraceServiceRequest.FromString(body)
    found = []
    for resource in request.resource_spans:
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            attributes = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}
            begun_s, ended_s = (1e-9 * time for time in (span.start_time_unix_nano, span.end_time_unix_nano))
            ids = (each.hex() for each in (span.trace_id, span.span_id, span.parent_span_id))
            found.append(Span(span.name, *ids, begun_s, ended_s, span.status.code == 2, attributes))
    return found


@contextmanager
def trace_receiver() -> Iterator[TraceReceiver]:
    """Listen on a port of this machine until the body is done."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.spans.extend(read_spans(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = TraceReceiver(f"http://127.0.0.1:{server.server_address[1]}/v1/traces")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
