"""Sessions in vLLM's scheduler: requests whose prompt grows by chunks, and the pages that they keep in between.

    chunk -> check_chunk -- exceeds a limit --> rejected with an error; the session is unchanged
          -> joins the session's text -> scheduled like a prompt -> answer -> idle, pages kept

Stock vLLM preempts running requests only. Sessions that are not running keep their pages (and idle ones count for
`max_num_seqs`), so a few of them can block all requests, each other included. After a step in which nothing runs and
nothing could be scheduled, one session is therefore evicted; see `_resolve_stall`, which guarantees progress.
"""

import logging
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus, StreamingUpdate

from casa_vllm import compat

logger = logging.getLogger("vllm.casa_sessions")

IDLE = RequestStatus.WAITING_FOR_STREAMING_REQ
# Records of ended sessions whose clients have not closed them yet; beyond that the oldest are dropped.
MAX_ENDED_SESSIONS = 10_000


class SessionScheduling:
    """Mixin over `Scheduler`: rejects chunks, evicts sessions, and adds a reason to every error.

    The reason of an error is in the output's `stop_reason`, which `AsyncLLM.generate` returns.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Outputs that belong to no step, with the index of their client.
        self._notices: list[tuple[int, EngineCoreOutput]] = []
        # Reasons of requests that end with an error, by id, until their last output is created.
        self._reasons: dict[str, str] = {}
        self._ended_sessions: dict[str, str] = {}
        self._stopped_while_preempted: list[Request] = []

    def check_chunk(self, session: Request, update: StreamingUpdate, num_tokens: int) -> None:
        """Check that a chunk fits after the `num_tokens` text tokens that its session keeps.

        Raises:
            ValueError: It does not.
        """
        num_new = len(update.prompt_token_ids or ())
        if num_new == 0:
            raise ValueError("the chunk has no text token; expected at least one.")
        if num_tokens + num_new >= self.max_model_len:
            raise ValueError(
                f"the session has {num_tokens} text tokens and the chunk {num_new}; expected fewer than "
                f"{self.max_model_len} together (--max-model-len): begin another session."
            )

    def reject(self, request: Request, reason: str) -> None:
        """End a request with an error after this step. Safe to call while requests are being scheduled."""
        logger.warning("Request %s ends with an error: %s", request.request_id, reason)
        self._reasons[request.request_id] = reason
        # Both vLLM versions end the requests in this set with an error after the step.
        self.grammar_compile_error_reqs.add(request.request_id)

    # Methods called by vLLM.

    def add_request(self, request: Request) -> None:
        """Stock, unless a chunk is rejected or its session has ended."""
        session = self.requests.get(request.request_id)
        if session is None:
            if request.request_id in self._ended_sessions:
                self._reject_chunk_of_ended_session(request)
                return
        elif session.status == IDLE:
            update = StreamingUpdate.from_request(request)
            if update is not None and self._reject_invalid_chunk(session, update):
                return
        super().add_request(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Stock, and records sessions that end with an error: their clients may send more chunks."""
        if isinstance(request_ids, str):
            request_ids = [request_ids]
        request_ids = None if request_ids is None else list(request_ids)
        finished = super().finish_requests(request_ids, finished_status)
        if finished_status == RequestStatus.FINISHED_ERROR:
            for request in finished:
                if request.resumable:
                    self._record_ended_session(request)
        else:
            for request_id in request_ids or ():
                self._ended_sessions.pop(request_id, None)
        return finished

    def has_requests(self) -> bool:
        """Stock, or True while an output waits for a step."""
        return bool(self._notices) or super().has_requests()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Stock; if nothing could be scheduled, ensures that the next step can schedule a request."""
        had_running = bool(self.running)
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens == 0 and not self.running:
            self._resolve_stall(had_running)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """Stock, plus outputs that belong to no step, and the reasons of errors."""
        outputs = super().update_from_output(*args, **kwargs)
        for request in self._stopped_while_preempted:
            # Stock removes them from the queues that it has just added them to.
            if request.request_id in self.requests:
                self._enqueue_waiting_request(request)
        self._stopped_while_preempted.clear()
        for client in outputs.values():
            for output in client.outputs:
                if output.finish_reason == FinishReason.ERROR:
                    output.stop_reason = self._reasons.get(output.request_id)
        self._reasons.clear()  # All of them have ended, or were aborted before.
        for client_index, output in self._notices:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(output)
        self._notices.clear()
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Stock; if running requests are preempted, evicts sessions that are not running as well."""
        if reset_running_requests:
            for session in self._sessions_with_pages():
                self._evict(session)
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _handle_stopped_request(self, request: Request) -> bool:
        """Stock, after a session's steps in flight are dropped and queued chunks are checked.

        A chunk ends with a token that was only sampled, and the next chunk begins with it. With asynchronous
        scheduling the step that computes it may be in flight already: if it counted, the token would be there twice.
        """
        if request.resumable:
            if request.num_computed_tokens == 0:
                self._stopped_while_preempted.append(request)
            compat.drop_steps_in_flight(request)
            queue = request.streaming_queue
            while queue and queue[0] is not None and self._reject_invalid_chunk(request, queue[0]):
                queue.popleft()
        return super()._handle_stopped_request(request)

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """Stock, also for a session without pages, with two fixes of 0.29.0.

        They apply the chunk's own token limit, and drop hashes of text that was removed.
        """
        num_computed_tokens = session.num_computed_tokens
        session.num_computed_tokens = _num_kept_tokens(session)
        del session.block_hashes[session.num_computed_tokens // self.hash_block_size :]
        super()._update_request_as_session(session, update)
        session.max_tokens = update.max_tokens
        session.num_computed_tokens = num_computed_tokens

    # Chunks.

    def _reject_invalid_chunk(self, session: Request, update: StreamingUpdate) -> bool:
        """Reject a chunk that does not fit; the session goes on with its next chunk."""
        try:
            self.check_chunk(session, update, _num_kept_tokens(session))
        except ValueError as error:
            self._send_error(session, str(error))
            return True
        return False

    def _reject_chunk_of_ended_session(self, request: Request) -> None:
        """Reject a chunk of a session that the engine has ended; stock would start a new one with it."""
        if request.resumable:
            self._send_error(request, self._ended_sessions[request.request_id])
        else:
            del self._ended_sessions[request.request_id]

    def _record_ended_session(self, session: Request) -> None:
        reason = self._reasons.get(session.request_id, "an error in the engine")
        reason = f"the engine has ended the session: {reason}"
        self._ended_sessions[session.request_id] = reason
        if len(self._ended_sessions) > MAX_ENDED_SESSIONS:
            del self._ended_sessions[next(iter(self._ended_sessions))]
        for update in session.streaming_queue:
            if update is None:
                self._ended_sessions.pop(session.request_id, None)
            else:
                self._send_error(session, reason)

    def _send_error(self, request: Request, reason: str) -> None:
        """Send an error output for a chunk."""
        logger.warning("A chunk of session %s is refused: %s", request.request_id, reason)
        output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=reason)
        self._notices.append((request.client_index, output))

    # Progress.

    def _resolve_stall(self, had_running: bool) -> None:
        """Ensure that a request can be scheduled, after a step in which none was and none is running.

        Waiting requests are then blocked by sessions that are not running, and by these alone. One is evicted, the
        longest idle one first; if `max_num_seqs` is reached, one ends. A request that cannot be scheduled with all
        pages and slots free never could be.

        Args:
            had_running: Whether requests were running before the step, all of which were preempted.
        """
        if self.pause_state != PauseState.UNPAUSED or self._reasons:
            return
        ready = [request for request in compat.waiting_requests(self) if _is_ready(request)]
        if not ready:
            return
        holders = self._sessions_with_pages()
        idle = [request for request in self.requests.values() if request.status == IDLE]
        if holders:
            idle_holders = [session for session in holders if session.status == IDLE]
            session = min(idle_holders, key=lambda it: it.arrival_time) if idle_holders else max(holders)
            logger.warning("Session %s gives up its pages: no request could run.", session.request_id)
            self._evict(session)
        elif had_running:
            return
        elif len(idle) >= compat.max_running_requests(self):
            session = min(idle, key=lambda it: it.arrival_time)
            self.reject(session, "its seat was needed: all seats are idle sessions' (--max-num-seqs).")
        else:
            self.reject(ready[0], "it cannot be scheduled although nothing else is running.")

    def _sessions_with_pages(self) -> list[Request]:
        """Return sessions that have pages and are not running."""
        waiting = (IDLE, RequestStatus.WAITING)
        return [
            request
            for request in self.requests.values()
            if request.resumable and request.status in waiting and request.num_computed_tokens > 0
        ]

    def _evict(self, session: Request) -> None:
        """Release the pages of a session that is not running; they stay cached until they are evicted.

        Its next chunk recomputes what is not cached any more, or ends the session if that needs frames that are gone.
        """
        self._free_request_blocks(session)
        self.encoder_cache_manager.free(session)
        session.num_computed_tokens = 0
        session.num_preemptions += 1
        # Like a preempted request it is sent to the worker again.
        self.reset_preempted_req_ids.add(session.request_id)


def _num_kept_tokens(session: Request) -> int:
    """Return how many text tokens the next chunk follows: all but the last, which was only sampled."""
    if session.num_computed_tokens == 0:  # Evicted or preempted.
        return session.num_tokens - 1
    return session.num_computed_tokens - session.num_output_placeholders


def _is_ready(request: Request) -> bool:
    """Return whether a request waits for nothing but pages and `max_num_seqs`."""
    is_waiting = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
    return is_waiting and (request.num_stale_output_tokens == 0 or request.drop_stale_output)
