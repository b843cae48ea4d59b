"""The thread that owns the engine, and its conversation with the event loop.

The engine is single-threaded. The loop hands it requests through a queue; tokens come
back to the loop once per step, and there to the queues of those that wait for them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dualpipe_jax.api.errors import ApiError
from dualpipe_jax.api.measures import Measures
from dualpipe_jax.deepseek.serve import Engine, Token


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request in the hands of the engine.

    Attributes:
      index: which of several choices it is.
      received: where its tokens go, as (index, token); an `ApiError` if it fails.
      started: when it was submitted, and then when its last token came, in seconds.
      number: the engine's; None until it knows the request.
      is_open: whether tokens are still to come.
      has_token: whether its first token has come.
    """

    index: int
    received: asyncio.Queue[tuple[int, Token | ApiError]]
    started: float
    number: int | None = None
    is_open: bool = True
    has_token: bool = False


class EngineWorker:
    """Runs an engine in a thread of its own.

    Attributes:
      engine: None while it starts.
      failure: what ended the engine, if anything did.
      measures: of requests.
    """

    def __init__(self, start: Callable[[], Engine], max_waiting: int):
        """Makes a worker; `begin` starts it.

        Args:
          start: makes the engine, in the thread.
          max_waiting: most requests beyond those that have a request slot.
        """
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self.measures = Measures()
        self._open: set[Ticket] = set()
        self._results: set[asyncio.Future[Any]] = set()
        self._start, self._max_waiting = start, max_waiting
        self._calls: queue.SimpleQueue[Callable[[Engine], Any] | None]
        self._calls = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: Callable[[], Any] = lambda: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From the event loop.

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._open)

    def begin(
        self, loop: asyncio.AbstractEventLoop, ended: Callable[[], Any] | None = None
    ) -> None:
        """Starts the thread.

        Args:
          loop: where tokens are handed out.
          ended: called in the loop when the engine has failed.
        """
        self._loop = loop
        self._ended = ended or self._ended
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread after the step that runs."""
        self._calls.put(None)
        self._thread.join(timeout)

    def check_running(self) -> Engine:
        """Returns the engine.

        Raises:
          ApiError: it is not ready, or has failed.
        """
        if self.failure is not None:
            reason = type(self.failure).__name__
            raise ApiError(503, f"The engine has failed ({reason}).", code="failed")
        if self.engine is None:
            raise ApiError(503, "The model is still being loaded.", code="loading")
        return self.engine

    def submit(
        self,
        requests: Sequence[Mapping[str, Any]],
        received: asyncio.Queue[tuple[int, Token | ApiError]],
    ) -> list[Ticket]:
        """Queues several requests, all or none.

        Args:
          requests: arguments of `Engine.submit`, which are checked.
          received: where their tokens go.

        Raises:
          ApiError: the engine is not ready, or the queue is full.
        """
        engine = self.check_running()
        most = engine.config.num_request_slots + self._max_waiting
        if self.num_open + len(requests) > most:
            raise ApiError(
                429, f"{self.num_open} requests run or wait.", code="queue_full"
            )
        now = time.perf_counter()
        tickets = [Ticket(index, received, now) for index in range(len(requests))]
        self._open.update(tickets)
        for ticket, request in zip(tickets, requests, strict=True):
            self._calls.put(functools.partial(self._submit, ticket, request))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request early, if it is not finished."""
        if ticket.is_open:
            self._end(ticket)
            self._calls.put(functools.partial(self._cancel, ticket))

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Returns what a function of the engine returns, between two steps."""
        self.check_running()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()

        def run(engine: Engine) -> None:
            self._tell(_set, result, function(engine))

        self._results.add(result)
        self._calls.put(run)
        try:
            return await result
        finally:
            self._results.discard(result)

    def _end(self, ticket: Ticket) -> None:
        ticket.is_open = False
        self._open.discard(ticket)

    def _hand_out(self, items: Sequence[tuple[Ticket, Token | ApiError]]) -> None:
        for ticket, item in items:
            if not ticket.is_open:
                continue
            if isinstance(item, ApiError) or item.is_last:
                self._end(ticket)
            ticket.received.put_nowait((ticket.index, item))

    def _fail(self, error: ApiError) -> None:
        self._hand_out([(ticket, error) for ticket in self._open.copy()])
        for result in self._results:
            if not result.done():
                result.set_exception(error)
        self._ended()

    # In the engine's thread.

    def _run(self) -> None:
        try:
            engine = self._start()
            self.engine = engine
            self._serve(engine)
        except BaseException as error:
            self.failure = error
            kind = type(error).__name__
            self._tell(self._fail, ApiError(503, f"The engine has failed ({kind})."))

    def _serve(self, engine: Engine) -> None:
        while True:
            try:
                while True:
                    call = self._calls.get(block=not self._tickets)
                    if call is None:
                        return
                    call(engine)
            except queue.Empty:
                pass
            tokens = engine.step()
            now = time.perf_counter()
            items = []
            for token in tokens:
                if (ticket := self._tickets.get(token.request)) is None:
                    continue
                self.measures.add_token(now - ticket.started, not ticket.has_token)
                ticket.started, ticket.has_token = now, True
                if token.is_last:
                    del self._tickets[token.request]
                items.append((ticket, token))
            if items:
                self._tell(self._hand_out, items)

    def _submit(self, ticket: Ticket, request: Mapping[str, Any], engine: Engine):
        if not ticket.is_open:
            return  # cancelled before the engine saw it
        try:
            ticket.number = engine.submit(**request)
        except ValueError as error:
            self._tell(self._hand_out, [(ticket, ApiError(400, str(error)))])
        else:
            self._tickets[ticket.number] = ticket

    def _cancel(self, ticket: Ticket, engine: Engine) -> None:
        if ticket.number is not None and self._tickets.pop(ticket.number, None):
            engine.cancel(ticket.number)

    def _tell(self, function: Callable[..., Any], *args: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _set(result: asyncio.Future[Any], value: Any) -> None:
    if not result.done():
        result.set_result(value)
