"""One thread that answers requests one at a time, and its queue.

submit ─► bounded queue ─► thread: cached prefix, prefill, decoding ─► pieces to the request's event loop
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from zebra.errors import ZebraError, machine_fault
from zebra.serve.errors import ApiError, internal_error
from zebra.serve.events import Finish, Piece
from zebra.serve.metrics import Metrics

Job = TypeVar("Job")
_log = logging.getLogger(__name__)
RETRY_AFTER = 5
"""Seconds after which a client should try again."""


class Ticket(Generic[Job]):
    """One request in the engine. Read its pieces in the event loop in which it was submitted."""

    def __init__(self, job: Job, max_seconds: float) -> None:
        self.job, self.arrival = job, time.monotonic()
        self._deadline, self._max_seconds = self.arrival + max_seconds, max_seconds
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Piece | Finish | ApiError]()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether the answer is no longer needed; the thread checks this after each token and between chunks."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop answering at the next token."""
        self._cancelled.set()

    def send(self, item: Piece | Finish | ApiError) -> None:
        """Hand an item to the event loop, from any thread. No-op after `cancel`: the loop may be closed by then."""
        if not self.cancelled:
            self._loop.call_soon_threadsafe(self._events.put_nowait, item)

    async def items(self) -> AsyncIterator[Piece | Finish]:
        """Iterate over the pieces, then a `Finish`. Leaving the iteration early cancels the request.

        Raises:
            ApiError: the request timed out, or failed in the engine.
        """
        try:
            while True:
                left = self._deadline - time.monotonic()
                try:
                    item = await asyncio.wait_for(self._events.get(), left)
                except TimeoutError:
                    raise ApiError(
                        504,
                        f"this request took longer than the {self._max_seconds:g} s that the server allows. Request "
                        "fewer tokens, or start the server with a larger --timeout.",
                        code="timeout",
                    ) from None
                if isinstance(item, ApiError):
                    raise item
                yield item
                if isinstance(item, Finish):
                    return
        finally:
            self.cancel()


class Engine(Generic[Job]):
    """Answers requests in the order of their arrival.

    Args:
        answer: sends the pieces of a ticket's job and returns how it ended; None if the ticket was cancelled.
        max_queue: maximum number of waiting requests.
        max_seconds: time limit of a request, including its time in the queue.
    """

    def __init__(
        self,
        answer: Callable[[Ticket[Job]], Finish | None],
        metrics: Metrics,
        *,
        max_queue: int,
        max_seconds: float,
    ) -> None:
        self._answer, self._metrics = answer, metrics
        self._max_queue, self._max_seconds = max_queue, max_seconds
        self._waiting: deque[Ticket[Job]] = deque()
        self._change = threading.Condition()
        self._running: Ticket[Job] | None = None
        self.draining = False
        threading.Thread(target=self._run, name="zebra-engine", daemon=True).start()

    def submit(self, job: Job) -> Ticket[Job]:
        """Add a job to the queue. Call it in the event loop that reads the answer.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server is stopping.
        """
        with self._change:
            if self.draining:
                raise stopping()
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            if len(self._waiting) >= self._max_queue:
                raise ApiError(
                    429,
                    f"the queue is full: {len(self._waiting)} requests are waiting. Try again in a few seconds.",
                    code="queue_full",
                    retry_after=RETRY_AFTER,
                )
            ticket = Ticket(job, self._max_seconds)
            self._waiting.append(ticket)
            self._metrics.waiting.set(len(self._waiting))
            self._change.notify_all()
            return ticket

    def drain(self) -> None:
        """Accept no more requests; those already accepted are still answered."""
        with self._change:
            self.draining = True

    def abort(self) -> None:
        """Accept no more requests, and end those that wait or run with a 503 error."""
        with self._change:
            self.draining = True
            for ticket in filter(None, (self._running, *self._waiting)):
                ticket.send(stopping())
                ticket.cancel()

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        with self._change:
            return self._running is None and not any(not ticket.cancelled for ticket in self._waiting)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting:
                    self._change.wait()
                ticket = self._waiting.popleft()
                self._running = ticket
                self._metrics.waiting.set(len(self._waiting))
            self._metrics.running.set(1)
            try:
                self._serve(ticket)
            finally:
                self._metrics.running.set(0)
                with self._change:
                    self._running = None
                del ticket  # frees its prompt, which may be long

    def _serve(self, ticket: Ticket[Job]) -> None:
        ending = "cancelled"
        try:
            finish = None if ticket.cancelled else self._answer(ticket)
            if finish is not None:
                ending = finish.reason
                self._count(finish, time.monotonic() - ticket.arrival)
                ticket.send(finish)
        except BaseException as error:  # a panic in a tokenizer is no Exception; the thread must survive
            ending = "error"
            ticket.send(_as_api_error(error))
        self._metrics.endings.labels(ending).inc()

    def _count(self, finish: Finish, seconds: float) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.inc(finish.prompt_tokens)
        metrics.cached_tokens.inc(finish.cached_tokens)
        metrics.completion_tokens.inc(finish.new_tokens)
        metrics.duration.observe(seconds)
        metrics.first_token.observe(seconds - finish.seconds)


def stopping() -> ApiError:
    """The error of a request that arrives while the server is stopping, or is ended by it."""
    text = "this server is stopping. Use another, or try again later."
    return ApiError(503, text, code="stopping", retry_after=RETRY_AFTER)


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ZebraError):  # not the client's fault: requests are checked earlier
        return ApiError(500, str(error), code="model_error")
    if (fault := machine_fault(error)) is not None:
        return ApiError(503, fault, code="machine", retry_after=RETRY_AFTER)
    _log.exception("a request failed", exc_info=error)
    return internal_error()
