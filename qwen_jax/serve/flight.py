# SPDX-License-Identifier: Apache-2.0
"""A request on its way through an engine, from the side of an asyncio program.

    async with Flight(served, request, board) as flight:
        async for pieces in flight: ...

The engine tells pieces from its own thread; here they come in the loop's, as many at a
time as have come: a loop that falls behind has less to do for each. Whoever leaves the
block early (a client that hangs up, an error) has the request cancelled.

Invariants: every flight that begins ends on the board, for whatever reason.
Raises: errors.ApiError: 429 overloaded, 400 for what the engine cannot ever do, 500 for
a fault of the engine's, 503 where it ends requests because it is closing.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from qwen_jax import config
from qwen_jax.serve import engine, errors, metrics
from qwen_jax.serve import request as request_lib
from qwen_jax.serve import served as served_lib

logger = logging.getLogger("qwen_jax.serve")


class Board:
    """What is in flight in this server, and where it is counted."""

    def __init__(self, told: metrics.Metrics, max_waiting: int = 256):
        """max_waiting: requests without a first piece; more are refused."""
        self.told, self.max_waiting = told, max_waiting
        self.flights: set[Flight] = set()
        self._coming = 0  # requests that are being prepared
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Requests without a first piece."""
        with self._lock:
            told = sum(flight.first_s is None for flight in self.flights)
            return told + self._coming

    def check_room(self, engines: Sequence[served_lib.Engine]) -> None:
        """Refuse where too many wait, or where none of the engines takes any more.

        Raises:
          errors.ApiError: 429 overloaded.
        """
        if self.waiting >= self.max_waiting:
            waits_s = [one.load().wait_s for one in engines]
        else:
            refusals = [one.refusal() for one in engines]
            if not refusals or None in refusals:
                return
            waits_s = [one.retry_after_s for one in refusals]
        self.told.shed("queue_full")
        raise errors.overloaded(min(waits_s, default=1.0))

    @contextlib.contextmanager
    def coming(self, of: served_lib.Served) -> Iterator[None]:
        """The block makes a request ready; refused at once where too many wait.

        Raises:
          errors.ApiError: 429 overloaded.
        """
        self.check_room([of.engine])
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    def add(self, flight: "Flight") -> None:
        """One more."""
        with self._lock:
            self.flights.add(flight)

    def drop(self, flight: "Flight") -> None:
        """One fewer."""
        with self._lock:
            self.flights.discard(flight)

    def end_all(self, error: errors.ApiError) -> None:
        """End what is in flight with an error; from the loop's thread."""
        with self._lock:
            flights = list(self.flights)
        for flight in flights:
            flight.end(error)


class Flight:
    """See the module docstring."""

    def __init__(
        self,
        served: served_lib.Served,
        request: request_lib.Request,
        board: Board,
    ):
        self.served, self.request, self._board = served, request, board
        self._loop = asyncio.get_running_loop()
        self._come: asyncio.Queue[Any] = asyncio.Queue()
        self._left = set(range(request.n))
        self.begun_s, self.first_s = time.monotonic(), None
        self._last_s: dict[int, float] = {}
        self._ended = False
        self.usage: dict[int, request_lib.Usage] = {}
        self.answer_ids = 0
        self.weights = 0  # number of those that answer

    async def __aenter__(self) -> "Flight":
        told = self._board.told
        try:
            self.weights = self.served.engine.submit(self.request, self._tell)
        except config.InputError as error:
            raise errors.invalid(None, "invalid_value", str(error)) from None
        except engine.Overloaded as error:
            told.shed("queue_full")
            raise errors.overloaded(error.retry_after_s) from None
        except engine.Closed:
            raise errors.unavailable(
                "draining", "The server is shutting down."
            ) from None
        self._board.add(self)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._board.drop(self)
        if self._left:
            self.served.engine.cancel(self.request.id)
            self._board.told.cancelled(self.served.name)

    @property
    def fingerprint(self) -> str:
        """Of the model and the weights that answer."""
        return self.served.fingerprint(self.weights)

    def end(self, error: errors.ApiError) -> None:
        """Have the reader end with an error."""
        self._come.put_nowait(error)

    def cancel(self) -> None:
        """Nobody needs the rest: end the request, wait for its last pieces."""
        if not self._ended:
            self._ended = True
            self.served.engine.cancel(self.request.id)

    def _tell(self, piece: request_lib.Piece) -> None:
        # The loop may be closed when a server ends in the midst of answers.
        with contextlib.suppress(RuntimeError):
            come = (time.monotonic(), piece)
            self._loop.call_soon_threadsafe(self._come.put_nowait, come)

    async def __aiter__(self) -> AsyncIterator[list[request_lib.Piece]]:
        while self._left:
            come = [await self._come.get()]
            while not self._come.empty():
                come.append(self._come.get_nowait())
            pieces = []
            for one in come:
                error = one if isinstance(one, errors.ApiError) else self._count(*one)
                if error is None:
                    pieces.append(one[1])
                    continue
                if pieces:  # what came before it is told before it
                    yield pieces
                raise error
            yield pieces

    def _count(self, now_s: float, piece: request_lib.Piece) -> errors.ApiError | None:
        """Note what a piece says on the board; the error that it is, if it is one."""
        told, name = self._board.told, self.served.name
        if piece.ids:
            self.answer_ids += len(piece.ids)
            last_s = self._last_s.get(piece.index)
            if self.first_s is None:
                told.first_token(name, now_s - self.begun_s, piece)
            elif last_s is not None:
                told.next_tokens(name, now_s - last_s, len(piece.ids))
            self._last_s[piece.index] = now_s
        if self.first_s is None:
            self.first_s = now_s
        if piece.finish is not None:
            self._left.discard(piece.index)
            if piece.usage is not None:
                self.usage[piece.index] = piece.usage
            if not self._left:
                told.finished(self, piece.finish, now_s)
        if piece.finish == request_lib.ERROR:
            logger.error("request %s: %s", self.request.id, piece.error)
            return errors.internal(self.request.id, "internal_error")
        if piece.finish == request_lib.CANCELLED and not self._ended:
            return errors.unavailable("draining", "The server is shutting down.")
        return None
