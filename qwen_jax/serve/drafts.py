# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding's host side: which rows get drafts, of how many ids, and when.

    a step checks d drafted ids of a row at once and gives 1 to d + 1 ids of its answer

Source: speculative decoding (arXiv 2211.17192) with drafts by prompt lookup (in the
manner of LLMA, arXiv 2304.04487): what followed when the row's last ids stood in it
before; or from the model's MTP head (`models/paged_mtp.py`). Deviation: nothing is
drawn anew where a draft is refused. Every id is drawn as it would be without drafts, by
seed and number, and a draft is right when it is that id (`programs.verify`); for drafts
that are not themselves drawn this accepts as often as the source does, and the answer
is, token for token, that of the engine without drafts.

When it pays: checking costs `draft_cost` plain steps beyond one (measured when the
engine is warmed, or as it is told), and one more for rows that take no drafts
(`device.is_full`). With `right` for how often a
row's drafts were right of late, d of them are worth right + right^2 + ... + right^d ids
in plain steps of one id each. A step checks when the rows' drafts are worth more than
it costs all rows. A row that was not worth it is tried again: `right` creeps back to
where it began with every id that comes without drafts. Looking for drafts costs as
well: ids must be known, so the next step cannot be under way meanwhile. Where nothing
is found it is done after 1 more id, then 2, 4 and so on to PAUSE, until something is.

Invariants: the same ids give the same drafts; what they cost changes when there are
any, never what an answer is; nobody gives way for drafts: a row has as many as there is
room for.
Raises: nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qwen_jax.serve import device as device_lib
from qwen_jax.serve import scheduler

GRAMS = (4, 3, 2)  # ids that must have stood there before, the longest tried first
BEGIN = 0.8  # `right` of a row that nothing is known of: a try or two say more
WEIGHT = 0.3  # of the newest, in what is known of late
PAUSE = 16  # most ids of a row between two looks for drafts
BACK = 0.01  # of the way back to BEGIN with each plain id


class Lookup:
    """Ids that followed when the last ids of a growing list stood in it before."""

    def __init__(self):
        self._ends: dict[tuple[int, ...], int] = {}  # gram: where it last ended
        self._before: dict[int, int | None] = {}  # of the last gram of each size
        self._seen = 0

    def after(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` ids, none where nothing is found; `ids` grows between calls.
        What would follow behind the end repeats, as the ids themselves do."""
        for end in range(self._seen + 1, len(ids) + 1):
            for n in GRAMS:
                if n <= end:
                    gram = tuple(ids[end - n : end])
                    self._before[n] = self._ends.get(gram)
                    self._ends[gram] = end
        self._seen = len(ids)
        at = next((x for x in (self._before.get(n) for n in GRAMS) if x), None)
        if at is None:
            return []
        period = len(ids) - at
        return [ids[at + i % period] for i in range(most)]


@dataclasses.dataclass
class Track:
    """What is known of a row: how often its drafts were right of late, ids to wait for
    before it is looked for more, and how many the next time."""

    right: float = BEGIN
    wait: int = 0
    pause: int = 1
    lookup: Lookup = dataclasses.field(default_factory=Lookup)


class Drafts:
    """See the module docstring. `cost`: of checking so many rows, in plain steps.
    `ids`: (row, most) -> what is drafted for it, None where the device drafts."""

    def __init__(
        self,
        settings: device_lib.Settings,
        cost: Callable[[int], float],
        ids: Callable[[scheduler.Row, int], Sequence[int]] | None = None,
    ):
        self._settings, self._cost = settings, cost
        ways = {"": None, "mtp": None, "lookup": _looked_up}
        self.ids = ids or ways[settings.drafts]
        self.rounds = self.drafted = self.accepted = 0

    def counts(self) -> dict[str, int]:
        """How many there were: see `request.Load`."""
        found = self.rounds, self.drafted, self.accepted
        return dict(zip(("drafts", "drafted", "accepted"), found, strict=True))

    def hopes(self, rows: Sequence[scheduler.Row]) -> bool:
        """Whether rows that run may be worth checking: ids must be known then before a
        step is planned."""
        settings = self._settings
        if not settings.drafts or len(rows) > settings.draft_rows:
            return False
        most, cost = settings.draft_tokens, self._cost(max(len(rows), 1))
        return any(
            _worth(track_of(row).right, min(most, _left(row))) > cost
            for row in rows
            if not device_lib.is_full(row) and not track_of(row).wait
        )

    def plan(
        self,
        rows: list[scheduler.Row],
        reach: Callable[[scheduler.Row, int], int],
    ) -> tuple[list[scheduler.Row], np.ndarray, np.ndarray | None] | None:
        """Who is checked of rows that each want an id, where that is worth it: (rows,
        how many ids each has drafted, which [b, i]; None where the device drafts).

        Args:
          rows: in the order of the step.
          reach: (row, most) -> how many ids there is room for behind the next.
        """
        settings = self._settings
        if not self.hopes(rows) or any(row.ahead for row in rows):
            return None
        some = [row for row in rows if not device_lib.is_full(row)]
        most, drafted, worth = settings.draft_tokens, [], 0.0
        for row in some:
            wanted = min(most, _left(row))
            if self.ids is not None:
                ids = self.ids(row, wanted)
            else:  # of a row that begins with what was there the head knows nothing
                ids = [0] * (wanted if row.length > row.begins else 0)
            drafted.append(list(ids)[:wanted])
            track = track_of(row)
            track.wait = 0 if drafted[-1] else track.pause
            track.pause = 1 if drafted[-1] else min(2 * track.pause, PAUSE)
            worth += _worth(track_of(row).right, len(drafted[-1]))
        costs = self._cost(len(some)) + (1 if len(some) < len(rows) else 0)
        if worth <= costs * len(rows):
            return None
        count_b = np.zeros(len(some), np.int32)
        drafts_bi = np.zeros((len(some), most), np.int32)
        for i, (row, ids) in enumerate(zip(some, drafted, strict=True)):
            count_b[i] = reach(row, len(ids))
            drafts_bi[i, : count_b[i]] = ids[: count_b[i]]
        return some, count_b, None if self.ids is None else drafts_bi

    def came(self, row: scheduler.Row, drafted: int, accepted: int) -> None:
        """What became of a row's drafts in a step; 0 and 0 for a plain id."""
        track = row.drafted
        if not drafted:
            if track is not None:
                track.right += BACK * (BEGIN - track.right)
                track.wait = max(track.wait - 1, 0)
            return
        # Of those behind a wrong one nothing is known.
        share = accepted / min(accepted + 1, drafted)
        track.right += WEIGHT * (share - track.right)
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted


def track_of(row: scheduler.Row) -> Track:
    """What is known of a row."""
    if row.drafted is None:
        row.drafted = Track()
    return row.drafted


def _left(row: scheduler.Row) -> int:
    """Ids of the answer that can come behind the next."""
    return max(row.request.max_tokens - row.said - 1, 0)


def _worth(right: float, drafted: int) -> float:
    return sum(right**i for i in range(1, drafted + 1))


def _looked_up(row: scheduler.Row, most: int) -> list[int]:
    return track_of(row).lookup.after(row.ids, most)
