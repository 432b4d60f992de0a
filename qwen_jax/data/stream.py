# SPDX-License-Identifier: Apache-2.0
"""Lanes: the endless streams of packed rows of which every global batch is made.

The row stream of a run is divided in lanes. A lane draws documents (mixture.py) in
windows, reads and encodes a window at once, packs it (packing.py), and returns its rows
in a shuffled order. Each lane is one function of its own small state, so processes and
workers can share the lanes out in any way and give the same rows.

A window is `window_docs` draws, or fewer once they hold `window_bytes`. It is made
again from its first draw when a run resumes: that costs one window a lane and keeps
the state a few numbers. The next window of a lane is made by a thread meanwhile.

Formats, a lane's state (JSON): lane; rows (returned so far); stage; draws (the stage's
shares); begun (draws of each source when the stage began); drawn (the same before the
open window); next (draw of the stage that opens the window); row (rows returned from
the window); counts. Counts of a window are added when its first row is returned.
Invariants: the rows after a state are a function of (plan, state) alone; a stage holds
for exactly the batches of its steps; a change of weights on resume is a new stage.
Raises: InputError from sources, for ready ids outside of the vocabulary, and for a lane
that finds no usable document in a whole pass.
"""

import collections
import dataclasses
import sys
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import grain
import numpy as np

from qwen_jax import config, rng
from qwen_jax.data import mixture, packing, source, tokenizer

# Records asked for at once: large enough to open a file once, small enough not to
# overshoot window_bytes by much.
_READ = 16
# A pass without one usable document is looked for over at least this many draws.
_BARREN_DRAWS = 10_000
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that decides what the lanes return."""

    sources: tuple[source.Source, ...]
    mixture: mixture.Mixture
    tokenizer: tokenizer.Tokenizer
    seq_tokens: int
    lanes: int
    rows_per_lane: int
    holdout_share: float
    window_docs: int
    window_bytes: int
    seed: int


@dataclasses.dataclass
class Window:
    """Packed rows of some draws, what was drawn and counted, and what was broken."""

    rows: packing.Rows
    num_draws: int
    drawn: list[int]
    counts: collections.Counter
    bad: list[tuple[str, source.Bad]]


@dataclasses.dataclass
class Chunk:
    """What goes with the rows of one lane in one batch (no pytree: a leaf to Grain)."""

    lane: int
    state: State
    bad: list[tuple[str, source.Bad]]


def first_state(plan: Plan, lane: int) -> State:
    """The state of a lane before its first row."""
    none = [0] * len(plan.sources)
    return {
        "lane": lane,
        "rows": 0,
        "stage": plan.mixture.stage_at(0),
        "draws": list(plan.mixture.draws[plan.mixture.stage_at(0)]),
        "begun": none,
        "drawn": none,
        "next": 0,
        "row": 0,
        "counts": {},
    }


def read_window(plan: Plan, state: State) -> Window:
    """The window that a state opens: draw, read, encode, pack."""
    documents, window = _draw(plan, state)
    chosen = [document for _, document in documents]
    ids = encode(plan.tokenizer, chosen)
    for (name, _), one in zip(documents, ids, strict=True):
        window.counts["documents"] += 1
        window.counts["split_documents"] += len(one) - 1 > plan.seq_tokens
        window.counts[f"documents/{name}"] += 1
        window.counts[f"tokens/{name}"] += len(one) - 1
    rows = pack(plan.tokenizer, chosen, ids, plan.seq_tokens)
    # Longest-first packing leaves full rows before mixed ones: shuffle them. The legacy
    # generator's stream is frozen by NumPy, so old states keep their meaning.
    name = f"rows/{state['lane']}/{state['stage']}/{state['next']}"
    shuffle = np.random.RandomState(rng.seed_for(plan.seed, name))
    order = shuffle.permutation(len(rows["tokens_bt"]))
    return dataclasses.replace(window, rows=packing.take(rows, order))


def _draw(plan: Plan, state: State) -> tuple[list[tuple[str, source.Document]], Window]:
    """The (source name, document) pairs of a window to train on, and its counts."""
    draws = plan.mixture.lane(state["stage"], state["lane"], plan.lanes, state["begun"])
    window = Window({}, 0, [0] * len(plan.sources), collections.Counter(), [])
    counts, documents, size = window.counts, [], 0
    while window.num_draws < plan.window_docs and size < plan.window_bytes:
        first = state["next"] + window.num_draws
        take = min(_READ, plan.window_docs - window.num_draws)
        pairs = [draws[i] for i in range(first, first + take)]
        window.num_draws += take
        records = source.read_pairs(plan.sources, pairs)
        for (number, _), record in zip(pairs, records, strict=True):
            lane_draw = state["drawn"][number] + window.drawn[number]
            place = state["lane"] + lane_draw * plan.lanes
            first_epoch = place < plan.mixture.num_records[number]
            window.drawn[number] += 1
            counts["records"] += 1
            counts["records_first_epoch"] += first_epoch
            name = plan.sources[number].name
            if isinstance(record, source.Bad):
                counts["bad_records"] += 1
                counts[f"bad_records/{record.reason}"] += 1
                lost = record.reason != "empty_file"
                counts["bad_first_epoch"] += first_epoch and lost
                window.bad.append((name, record))
            elif record.held_out(plan.holdout_share):
                counts["held_out"] += 1
            else:
                documents.append((name, record))
                size += record.num_bytes or 4 * len(record.tokens)
    return documents, window


def encode(
    vocabulary: tokenizer.Tokenizer, documents: Sequence[source.Document]
) -> list[np.ndarray]:
    """[end] + ids + [end] of every document."""
    texts = [document.text for document in documents if document.tokens is None]
    encoded = iter(vocabulary.encode_batch(texts) if texts else ())
    end, out = np.array([vocabulary.eos_id], np.int32), []
    for document in documents:
        ids = document.tokens
        if ids is None:
            ids = next(encoded)
        elif ids.min() < 0 or ids.max() >= vocabulary.vocab_size:
            raise config.InputError(
                f"a document of ready ids holds {int(ids.max())}; the tokenizer has "
                f"the ids 0..{vocabulary.vocab_size - 1}. Encode it with this "
                "tokenizer, or name the right one in data.tokenizer"
            )
        out.append(np.concatenate([end, ids, end]))
    return out


def pack(
    vocabulary: tokenizer.Tokenizer,
    documents: Sequence[source.Document],
    ids: Sequence[np.ndarray],
    seq_tokens: int,
) -> packing.Rows:
    """Encoded documents as rows; the ids of a prompt are inputs and no targets."""
    first_targets = [document.prompt_tokens + 1 for document in documents]
    return packing.pack(
        ids, seq_tokens, pad_id=vocabulary.pad_id, first_targets=first_targets
    )


class Lane:
    """One lane, from a state on; `pool` (or None) makes the next window meanwhile."""

    def __init__(self, plan: Plan, state: State, pool: futures.Executor | None):
        self._plan, self._state, self._pool = plan, dict(state), pool
        self._window: Window | None = None
        self._coming: tuple[State, futures.Future] | None = None
        self._barren = 0
        self._prefetch(self._state)

    def _prefetch(self, state: State) -> None:
        if self._pool is not None:
            future = self._pool.submit(read_window, self._plan, dict(state))
            self._coming = (dict(state), future)

    def _open(self) -> None:
        """Make the window of the state present; count it if none of it was returned."""
        state, self._window = self._state, None
        if self._coming is not None:
            made_for, future = self._coming
            self._coming = None
            place = ("stage", "begun", "next")
            if all(made_for[key] == state[key] for key in place):
                self._window = future.result()
            else:
                future.cancel()
        self._window = self._window or read_window(self._plan, state)
        self._prefetch(self._after())

    def _after(self) -> State:
        """The state after the open window."""
        state, window = self._state, self._window
        drawn = [a + b for a, b in zip(state["drawn"], window.drawn, strict=True)]
        moved = {"next": state["next"] + window.num_draws, "row": 0, "drawn": drawn}
        return {**state, **moved}

    def _switch(self, stage: int) -> None:
        """End the stage: drop what is left of the open window, and count it."""
        state = self._state
        if state["row"] and self._window is None:
            self._open()
        if self._window is not None:
            dropped = self._window.rows["mask_bt"][state["row"] :].sum()
            counts = collections.Counter(state["counts"])
            counts["dropped_tokens"] += int(dropped)
            self._state = state = {**self._after(), "counts": dict(counts)}
        draws = list(self._plan.mixture.draws[stage])
        begun = {"begun": state["drawn"], "next": 0, "row": 0}
        self._state = {**state, "stage": stage, "draws": draws, **begun}
        self._window = None

    def take(self) -> tuple[packing.Rows, Chunk]:
        """The lane's rows of the next batch."""
        plan, parts, bad = self._plan, [], []
        missing = plan.rows_per_lane
        stage = plan.mixture.stage_at(self._state["rows"] // plan.rows_per_lane)
        draws = list(plan.mixture.draws[stage])
        if (stage, draws) != (self._state["stage"], self._state["draws"]):
            self._switch(stage)
        while missing:
            if self._window is None:
                self._open()
            window, row = self._window, self._state["row"]
            if row == 0:
                bad += window.bad
                counts = collections.Counter(self._state["counts"])
                self._state["counts"] = dict(counts + window.counts)
            got = min(missing, len(window.rows["tokens_bt"]) - row)
            parts.append(packing.take(window.rows, slice(row, row + got)))
            missing -= got
            self._state["row"] = row + got
            self._state["rows"] += got
            self._barren = 0 if got else self._barren + window.num_draws
            if self._state["row"] == len(window.rows["tokens_bt"]):
                self._check_barren()
                self._state, self._window = self._after(), None
        rows = packing.join(parts) if len(parts) > 1 else parts[0]
        self._count(rows)
        return rows, Chunk(self._state["lane"], dict(self._state), bad)

    def _count(self, rows: packing.Rows) -> None:
        counts = self._state["counts"] = dict(self._state["counts"])
        tokens = int(np.count_nonzero(rows["mask_bt"]))
        padding = rows["segments_bt"].size - int(np.count_nonzero(rows["segments_bt"]))
        counts["tokens"] = counts.get("tokens", 0) + tokens
        counts["padding_tokens"] = counts.get("padding_tokens", 0) + padding

    def _check_barren(self) -> None:
        """A whole pass without a document would go on for ever."""
        shares = zip(self._plan.mixture.num_records, self._state["draws"], strict=True)
        records = sum(number for number, share in shares if share > 0)
        if self._barren < max(_BARREN_DRAWS, 2 * records):
            return
        counts = self._state["counts"]
        reasons = {k: v for k, v in counts.items() if "/" not in k or k[:3] == "bad"}
        raise config.InputError(
            f"no document to train on in {self._barren} records of the corpus "
            f"({reasons}); look at text_field, holdout_share and the files"
        )


class RowDataset(grain.IterDataset):
    """The rows of some lanes in turn, for ever, as (rows, Chunk) pairs.

    Grain's worker processes slice it: worker i of n takes the lanes i, i + n, ...
    """

    def __init__(self, plan: Plan, states: Sequence[State], read_threads: int):
        super().__init__()
        self.plan, self.states, self.read_threads = plan, list(states), read_threads

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep a share of the lanes (Grain's contract for sources)."""
        del sequential_slice
        self.states = self.states[sl]

    def __iter__(self) -> "RowIterator":
        return RowIterator(self)

    def __str__(self) -> str:
        return f"RowDataset({len(self.states)} lanes)"


class RowIterator(grain.DatasetIterator):
    """Iterator of a RowDataset, with exact state."""

    def __init__(self, dataset: RowDataset):
        super().__init__()
        self._dataset = dataset
        self._pool: futures.Executor | None = None
        self._lanes: list[Lane] = []
        self.set_state({"states": dataset.states, "turn": 0})

    def start_prefetch(self) -> None:
        """Begin to read the first windows."""
        if self._lanes:
            return
        if self._dataset.read_threads:
            self._pool = futures.ThreadPoolExecutor(
                self._dataset.read_threads, thread_name_prefix="qwen_jax_data"
            )
        plan = self._dataset.plan
        self._lanes = [Lane(plan, state, self._pool) for state in self._states]

    def __next__(self) -> tuple[packing.Rows, Chunk]:
        self.start_prefetch()
        rows, chunk = self._lanes[self._turn].take()
        self._states[self._turn] = chunk.state
        self._turn = (self._turn + 1) % len(self._lanes)
        return rows, chunk

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"states": list(self._states), "turn": self._turn}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of get_state."""
        self._stop()
        self._states, self._turn = list(state["states"]), state["turn"]

    def _stop(self) -> None:
        self._lanes = []
        # No waiting, and nothing when Python ends: a forgotten iterator is collected by
        # any thread, one of its own among them, or when threads are gone already.
        if self._pool is not None and not sys.is_finalizing():
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def close(self) -> None:
        """Stop the reading threads."""
        self._stop()
        super().close()
