# SPDX-License-Identifier: Apache-2.0
"""How fast an engine is of late, and so how long one more request would wait.

A request waits for the prompts before it, of which one piece is computed at a time,
and, where all slots are taken, for as many rows to end as it needs slots. Both times
are averages in which the newest has the weight LATE. Seconds and tokens of pieces are
averaged apart, as a step for a piece of one token takes as long as one for many.

Units: seconds of any clock. Invariants: where nothing is before a request it waits 0 s,
whatever was measured, so a limit of waits refuses nobody for good; of its own waits
nothing is measured. Raises: nothing.
"""

from collections.abc import Iterable

from qwen_jax.serve import request as request_lib
from qwen_jax.serve import scheduler

LATE = 0.2


class Pace:
    """See the module docstring. rows: slots of the engine.

    piece_s, piece_tokens: of a step that has a piece of a prompt. end_s: between two
    ends of rows while all slots are taken.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self.piece_s = self.piece_tokens = self.end_s = 0.0
        self._ended_s: float | None = None

    def stepped(self, took_s: float, tokens: int) -> None:
        """A step took so long, with so many tokens of a prompt in it."""
        self.piece_s += LATE * (took_s - self.piece_s)
        self.piece_tokens += LATE * (tokens - self.piece_tokens)

    def ended(self, now_s: float, full: bool) -> None:
        """A row ends; full: all slots are taken."""
        if full and self._ended_s is not None:
            self.end_s += LATE * (now_s - self._ended_s - self.end_s)
        self._ended_s = now_s if full else None

    def wait_s(
        self,
        n: int,
        *,
        computing: int,
        new: Iterable[request_lib.Request],
        rows: list[scheduler.Row],
    ) -> float:
        """What a new request of n answers is expected to wait for others.

        Args:
          n: answers.
          computing: tokens of prompts in the step that is being made.
          new: requests before it that are no rows yet.
          rows: those that run or wait.
        """
        tokens = computing + sum(row.wanted - row.length for row in rows)
        slots = len(rows) + min(n, self._rows)
        for request in new:
            tokens += len(request.prompt)
            slots += request.n
        token_s = self.piece_s / self.piece_tokens if self.piece_tokens else 0.0
        return tokens * token_s + max(0, slots - self._rows) * self.end_s
