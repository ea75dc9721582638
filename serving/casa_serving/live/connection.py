"""One WebSocket connection, which is one live session.

Two tasks share it: `_read` receives the client's messages, `_process_queue` captions frames and answers
questions, one at a time. Whatever ends the session ends both: a stop, a disconnect in the middle of a
frame, a timeout, the server's shutdown. There is no queue of outgoing messages: each is awaited until
the socket accepts it, so a client that does not read blocks only its own session, costs no more memory
than the socket's buffers, and is disconnected after a timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from starlette.websockets import WebSocket, WebSocketDisconnect
from vllm.exceptions import GracefulHTTPError

from casa_engine.errors import InputError
from casa_engine.live import HistoryItem, LiveSettings
from casa_serving.drain.connections import abort_connection
from casa_serving.endpoint.media import GuardedImageIO
from casa_serving.live.frame_queue import LatestFrameQueue, PendingQuestion
from casa_serving.live.metrics import LiveMetrics, SessionStatistics
from casa_serving.live.protocol import (
    ENGINE_ERROR,
    IDLE,
    POLICY,
    SHUTTING_DOWN,
    SLOW_CLIENT,
    STOPPED,
    SUBPROTOCOL,
    AnswerDelta,
    AnswerDone,
    CaptionDelta,
    Closed,
    Create,
    Created,
    ErrorEvent,
    Event,
    Frame,
    FrameDone,
    FrameDropped,
    Limits,
    LiveError,
    Question,
    Stop,
    read_frame,
    read_text,
)
from casa_serving.live.results import TextDelta
from casa_serving.live.session import LiveEngine, LiveSession
from casa_serving.live.session_slots import SessionSlots
from casa_serving.live.tracing import SessionTrace
from casa_serving.options.live_options import LiveOptions

logger = logging.getLogger("vllm.casa_live")
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class LiveService:
    """What all sessions of a server process share.

    Attributes:
        engine: Opens sessions in the engine.
        options: The operator's limits.
        slots: Limits the number of sessions.
        metrics: The process's counters.
        image_io: Decodes frames after the checks of the image guard.
    """

    engine: LiveEngine
    options: LiveOptions
    slots: SessionSlots
    metrics: LiveMetrics
    image_io: GuardedImageIO


class SessionEnd(Exception):  # noqa: N818 - a normal end is no error
    """Ends the session.

    Args:
        reason: For `session.closed` and the close frame.
        close_code: The WebSocket's.
        error: Sent as an `error` event before, if any.
    """

    def __init__(self, reason: str, close_code: int, error: LiveError | None = None) -> None:
        super().__init__(reason)
        self.reason, self.close_code, self.error = reason, close_code, error


class Connection:
    """One connection, from the handshake to the close frame.

    Args:
        socket: Not accepted yet.
        service: Shared by all connections.
    """

    def __init__(self, socket: WebSocket, service: LiveService) -> None:
        self.socket, self.service = socket, service
        self.statistics = SessionStatistics(service.metrics)
        self.queue = LatestFrameQueue()
        self.id = uuid.uuid4().hex
        self.trace: SessionTrace | None = None
        self.created = self.busy = False
        # In work, with no result and so no span yet.
        self.unfinished: Frame | PendingQuestion | None = None

    async def run(self) -> None:
        """Run the connection to its end; raise nothing."""
        offered = self.socket.scope["subprotocols"]
        try:
            await self.socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            with self.service.slots.acquire():
                await self._run_in_slot()
        except LiveError as error:
            await self._send_error_and_close(SessionEnd("too many sessions", POLICY, error))
        except (WebSocketDisconnect, RuntimeError):  # Starlette raises either for a closed socket.
            logger.info("Live session: the client disconnected before the handshake was complete.")

    async def _run_in_slot(self) -> None:
        reason, failure = "cancelled", ""
        try:
            await run_until_first_completes(self._run_session(), self._wait_for_shutdown())
        except SessionEnd as end:
            reason = end.reason
            await self._send_error_and_close(end)
        except WebSocketDisconnect:
            reason = "the client disconnected"
        except Exception:  # last resort: no error of the engine may crash the server
            reason = "engine error"
            logger.exception("Live session %s: the engine failed.", self.id)
            error = LiveError("engine_error", "The engine failed; connect again and resume with `history`.")
            failure = str(error)
            await self._send_error_and_close(SessionEnd(reason, ENGINE_ERROR, error))
        finally:
            self._record_end(reason, failure)

    def _record_end(self, reason: str, failure: str) -> None:
        """Log the session's end, and end its span and those of what was in work or waiting."""
        counts = self.statistics.summary()
        if self.trace is not None:
            for item in [*([self.unfinished] if self.unfinished else []), *self.queue.waiting()]:
                name = "live_frame" if isinstance(item, Frame) else "live_question"
                result = "failed" if failure else "abandoned"
                self.trace.add_failure(name, item.number, item.arrived_s, result, failure)
            self.trace.end(reason, counts, failure)
        logger.info(
            "Live session %s ended after %.1f s: %s; %s frames (%s captioned, %s silent, %s dropped, %s refused, %s "
            "late), %s questions, %s tokens, %s trims, %s restarts.",
            self.id,
            counts.duration_s,
            reason if self.created else f"{reason}, before it was created",
            counts.frames,
            counts.captioned,
            counts.silent,
            counts.dropped,
            counts.refused,
            counts.late,
            counts.questions,
            counts.tokens,
            counts.trims,
            counts.restarts,
        )

    async def _wait_for_shutdown(self) -> None:
        await self.service.slots.closing.wait()
        raise SessionEnd("server is shutting down", SHUTTING_DOWN)

    async def _run_session(self) -> None:
        create, settings = await self._wait_for_create()
        with contextlib.ExitStack() as resources:
            session = await self._open(create, settings, resources)
            try:
                await run_until_first_completes(self._read(session), self._process_queue(session))
            finally:
                await session.close()

    # Before the session: one valid `session.create` is expected.

    async def _wait_for_create(self) -> tuple[Create, LiveSettings]:
        try:
            async with asyncio.timeout(self.service.options.live_create_timeout):
                while True:
                    asked = await self._read_create()
                    if asked is not None:
                        return asked
        except TimeoutError as timeout:
            error = LiveError("idle_timeout", "No session was created in time. Send `session.create` first.")
            raise SessionEnd("no session was created", IDLE, error) from timeout

    async def _read_create(self) -> tuple[Create, LiveSettings] | None:
        """Read one message; return it and its settings if it is a valid `session.create`."""
        try:
            message = await self._receive()
            if isinstance(message, bytes):
                raise LiveError("no_session", "There is no session yet: send `session.create` before the first frame.")
            parsed = read_text(message)
            if not isinstance(parsed, Create):
                asked = parsed.id if isinstance(parsed, Question) else None
                raise LiveError("no_session", "There is no session yet: send `session.create` first.", id=asked)
            return parsed, self._settings(parsed)
        except LiveError as error:
            await self._send(ErrorEvent(code=error.code, message=str(error), id=error.id))
            return None

    def _settings(self, create: Create) -> LiveSettings:
        settings = create.settings(self.service.engine.defaults)
        cap = self.service.options.live_text_budget or self.service.engine.defaults.text_budget
        if settings.text_budget > cap:
            raise LiveError(
                "bad_settings",
                f"text_budget is too large: got {settings.text_budget} tokens, at most {cap} are taken "
                "(--live-text-budget). Ask for less or leave it out.",
            )
        return settings

    async def _open(self, create: Create, settings: LiveSettings, resources: contextlib.ExitStack) -> LiveSession:
        engine, options = self.service.engine, self.service.options
        try:
            capacity = engine.capacity(settings)
            resources.enter_context(self.service.slots.reserve_memory(capacity))
            session = await engine.open(settings, [HistoryItem(**item.model_dump()) for item in create.history])
        except LiveError as error:
            raise SessionEnd("too many sessions", POLICY, error) from error
        except InputError as error:
            raise SessionEnd("bad settings", POLICY, LiveError("bad_settings", str(error))) from error
        self.created = True
        self.statistics.frame_interval_ms = 1000 / settings.fps
        limits = Limits(
            max_frame_bytes=options.live_max_frame_bytes,
            max_frame_pixels=self.service.image_io.limits.max_image_pixels,
            max_frame_side=self.service.image_io.limits.max_image_side,
            idle_timeout_s=options.live_idle_timeout,
            max_sessions=min(options.live_max_sessions, capacity),
        )
        self.trace = SessionTrace(self.id, self.service.engine.model_name, self.socket.headers)
        await self._send(Created(session=self.id, settings=asdict(settings), limits=limits))
        return session

    # Incoming messages.

    async def _read(self, session: LiveSession) -> None:
        """Handle messages until the client disconnects or is idle for too long."""
        while True:
            try:
                async with asyncio.timeout(self.service.options.live_idle_timeout):
                    message = await self._receive()
            except TimeoutError as timeout:
                if self.busy:
                    continue
                error = LiveError("idle_timeout", "Nothing was sent for too long. Connect again, with `history`.")
                raise SessionEnd("idle", IDLE, error) from timeout
            if not self.queue.ended:
                await self._handle_message(message)

    async def _handle_message(self, message: str | bytes) -> None:
        number = self.statistics.frames if isinstance(message, bytes) else None
        try:
            if isinstance(message, bytes):
                await self._queue_frame(message)
            else:
                self._handle_text(read_text(message))
        except LiveError as error:
            await self._reject(error, time.monotonic(), frame=number)

    async def _queue_frame(self, message: bytes) -> None:
        number = self.statistics.frames
        self.statistics.frames += 1
        frame = read_frame(message, number, time.monotonic(), self.service.options.live_max_frame_bytes)
        replaced = self.queue.put_frame(frame)
        if replaced is not None:
            self.statistics.count("dropped")
            self.trace.add_failure("live_frame", replaced.number, replaced.arrived_s, "dropped", "")
            await self._send(
                FrameDropped(frame=replaced.number, timestamp=replaced.timestamp, replaced_by=frame.number)
            )

    def _handle_text(self, message: Create | Question | Stop) -> None:
        if isinstance(message, Stop):
            self.queue.end()
        elif isinstance(message, Question):
            number, arrived_s = self.statistics.questions, time.monotonic()
            self.queue.put_question(PendingQuestion(number, message.text, message.id, arrived_s))
            self.statistics.questions += 1
        else:
            raise LiveError("already_created", "This connection has a session: one connection is one session.")

    async def _receive(self) -> str | bytes:
        message = await self.socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        text = message.get("text")
        return message["bytes"] if text is None else text

    # Processing.

    async def _process_queue(self, session: LiveSession) -> None:
        """Caption frames and answer questions until a stop; any exception but LiveError ends the session."""
        while (item := await self.queue.get()) is not None:
            self.busy, self.unfinished, begun_s = True, item, time.monotonic()
            try:
                if isinstance(item, Frame):
                    await self._caption(session, item)
                else:
                    await self._answer(session, item)
            except LiveError as error:
                self.unfinished = None
                if isinstance(item, Frame):
                    await self._reject(error, item.arrived_s, frame=item.number)
                else:
                    await self._reject(error, begun_s, question=item.number)
            finally:
                self.busy = False
        raise SessionEnd("stopped", STOPPED)

    async def _caption(self, session: LiveSession, frame: Frame) -> None:
        image = await asyncio.to_thread(self._decode, frame.data)
        try:
            async with contextlib.aclosing(session.caption(image, frame.timestamp, frame.arrived_s)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, TextDelta):
                        await self._send(CaptionDelta(frame=frame.number, timestamp=frame.timestamp, text=piece.text))
        except InputError as error:
            raise LiveError("bad_frame", str(error)) from error
        self.statistics.add_frame(piece)
        self.trace.add_frame(frame.number, frame.arrived_s, piece)
        self.unfinished = None
        await self._send(FrameDone.of(frame.number, piece))

    def _decode(self, data: bytes) -> Image.Image:
        try:
            return self.service.image_io.load_bytes(data).media
        except InputError as error:
            raise LiveError("bad_frame", str(error)) from error
        except GracefulHTTPError as error:  # The process's pixel budget is exhausted.
            raise LiveError("bad_frame", str(error)) from error

    async def _answer(self, session: LiveSession, question: PendingQuestion) -> None:
        begun_s = time.monotonic()
        try:
            async with contextlib.aclosing(session.ask(question.text)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, TextDelta):
                        await self._send(AnswerDelta(question=question.number, id=question.id, text=piece.text))
        except InputError as error:
            raise LiveError("bad_message", str(error), id=question.id) from error
        self.trace.add_answer(question.number, begun_s, piece)
        self.unfinished = None
        await self._send(
            AnswerDone(
                question=question.number,
                id=question.id,
                text=piece.answer,
                num_tokens=piece.num_tokens,
                total_ms=round(piece.total_ms, 2),
            )
        )

    # Outgoing messages.

    async def _reject(
        self, error: LiveError, begun_s: float, *, frame: int | None = None, question: int | None = None
    ) -> None:
        if frame is not None:
            self.statistics.count("refused")
            self.trace.add_failure("live_frame", frame, begun_s, "refused", str(error))
        elif question is not None:
            self.trace.add_failure("live_question", question, begun_s, "refused", str(error))
        await self._send(ErrorEvent(code=error.code, message=str(error), frame=frame, question=question, id=error.id))

    async def _send(self, event: Event) -> None:
        """Send one message and wait until the socket's buffer accepts it."""
        try:
            async with asyncio.timeout(self.service.options.live_send_timeout):
                await self.socket.send_text(event.model_dump_json())
        except TimeoutError as timeout:
            error = LiveError("slow_client", "The client did not read what it was sent. Connect again, with `history`.")
            raise SessionEnd("slow client", SLOW_CLIENT, error) from timeout

    async def _send_error_and_close(self, end: SessionEnd) -> None:
        """Send the error and `session.closed`, and close; abort the connection if the client does not read."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if end.error is not None:
                    event = ErrorEvent(code=end.error.code, message=str(end.error), fatal=True)
                    await self.socket.send_text(event.model_dump_json())
                if self.created:
                    closed = Closed(reason=end.reason, statistics=self.statistics.summary())
                    await self.socket.send_text(closed.model_dump_json())
                await self.socket.close(end.close_code, end.reason)
        except TimeoutError:
            abort_connection(self.socket.scope)
        except (WebSocketDisconnect, RuntimeError):  # The latter after a send has failed.
            logger.info("Live session: the client disconnected before the session was closed.")


async def run_until_first_completes(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run coroutines until one of them ends or raises, then cancel the others and wait for them.

    Raises:
        BaseException: Whatever the first one raised.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
