# SPDX-License-Identifier: Apache-2.0
"""Which rows run, which wait, and whose the pages are: the host's side of an engine.

Source: continuous batching (Orca, OSDI'22), pages that are taken back from the youngest
row when they run out (arXiv 2309.06180), prompts in pieces beside decoding
(Sarathi-Serve, arXiv 2403.02310). A `Row` is one answer in the making. `plan` says what
the next step does: at most one piece of a prompt, and one token for every row that has
its prompt in. Rows are admitted in the order they came; one that was preempted goes to
the front of the queue with what it has said, and its tokens are computed anew (as far
as no page of them was kept).

Ids may be a step behind: a row is planned with what the device was given to do.

With recurrent layers (`state_units`) a row can only begin where a state was kept: one
is kept behind the last whole page of each prompt, and where a prompt leaves a path that
others went before. Those pages are of another size class: see `pages.py`.

Invariants: a page is free, or one row's, or a node's of `prefix.py`; page 0 is
nobody's. A row that runs has pages for all its tokens and the next. The pages that a
row shares are whole, so no row writes into them. Nothing here touches a device, and
time is not looked at: the same calls give the same plans.
Raises: nothing; what can never fit is refused before it comes here.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen_jax.serve import images as images_lib
from qwen_jax.serve import pages as pages_lib
from qwen_jax.serve import prefix as prefix_lib
from qwen_jax.serve import request as request_lib


class Row:
    """One answer: its ids, and where they lie.

    ids: of prompt and answer, as far as they are known. ahead: ids that were given to
    the device to draw and are not known yet. length: tokens in pages, once the device
    has done what it was given. begins: those of them that were there when it was last
    admitted. table: pages in order, 0 behind the last. laid: where the images of its
    prompt lie, or None.
    """

    def __init__(self, request: request_lib.Request, index: int, table_pages: int):
        self.request, self.index = request, index
        self.ids = list(request.prompt)
        self.length = self.ahead = self.begins = 0
        self.slot = -1
        self.over = False
        self.nodes: list[prefix_lib.Node] = []
        self.pages: list[int] = []  # its own, behind those of its nodes
        self.table = np.zeros(table_pages, np.int32)
        self.restore: int | None = None  # pages of the state it begins with
        self.marks: tuple[int, ...] = ()  # lengths behind which its state is kept
        self.cached = 0  # tokens of the prompt that were there when it first ran
        self.ran = False
        self.laid: images_lib.Laid | None = None
        # The engine's: when it came, when it first had a slot, what makes text of ids.
        self.come_s, self.begun_s = 0.0, None
        self.answer: Any = None
        self.drafted: Any = None  # how drafts fare with it: see `drafts.py`

    def keys(self, start: int = 0, stop: int | None = None) -> Sequence[int]:
        """What ids start .. stop are shared by: themselves, or their images."""
        if self.laid is None:
            return self.ids[start:stop]
        prompt = self.laid.keys
        return (*prompt[start:stop], *self.ids[max(start, len(prompt)) : stop])

    @property
    def said(self) -> int:
        """Ids of the answer so far, those that are not known yet included."""
        return len(self.ids) + self.ahead - len(self.request.prompt)

    @property
    def wanted(self) -> int:
        """Tokens that go in before the next id can be drawn by a decoding step."""
        return len(self.ids) + self.ahead - (1 if self.said else 0)

    @property
    def goes_on(self) -> bool:
        """Whether a decoding step can draw its next id."""
        return 0 < self.said < self.request.max_tokens and self.length == self.wanted


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A piece of a prompt: tokens start .. start + count of `row`."""

    row: Row
    start: int
    count: int

    @property
    def last(self) -> bool:
        """Whether the row has all it wants after this."""
        return self.start + self.count == self.row.wanted


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step does. restore: rows whose states are copied before anything else;
    preempted: rows that lost their pages to others."""

    prefill: Prefill | None
    decode: list[Row]
    restore: list[Row]
    preempted: list[Row]

    def __bool__(self) -> bool:
        return self.prefill is not None or bool(self.decode)


class Scheduler:
    """The queue, the rows that run, and the pages.

    Args:
      rows: most rows that run at once.
      pages: pages of the pool, page 0 among them.
      page_tokens: tokens of a page.
      piece: most tokens of a prompt that a step computes, a multiple of the page.
      sharing: whether whole pages are kept for prompts that begin alike.
      state_units: pages that a state takes; 0 for models without.
    """

    def __init__(
        self,
        *,
        rows: int,
        pages: int,
        page_tokens: int,
        piece: int,
        sharing: bool,
        state_units: int = 0,
    ):
        self.page_tokens, self.piece, self.sharing = page_tokens, piece, sharing
        # A power of two, as size classes are.
        size = 1 << (state_units - 1).bit_length() if state_units else 0
        if 4 * size > pages - 1:  # states would push out all else
            size, self.sharing = 0, sharing and not state_units
        self._state_class = size
        slabs = [n * size for n in (8, 4, 2) if 4 * n * size <= pages - 1]
        slab = max([*slabs, size, 1]) if size else 1
        self.total = (pages - 1) // slab * slab
        # A class that lacks a page may take any slab that is not full.
        how = {"max_used": 0.99, "idle_ticks": 0, "low_share": 0.0}
        self._arena = pages_lib.Pages(
            self.total, pages_lib.Settings(slab_units=slab, **how)
        )
        self.waiting: collections.deque[Row] = collections.deque()
        self.running: list[Row] = []  # in the order they were admitted
        self.prefix = prefix_lib.Prefix(page_tokens)
        self._slots = list(range(rows - 1, -1, -1))
        self.asked = self.found = self.preempted = 0

    @property
    def used(self) -> int:
        """Pages that rows have, alone or together."""
        shared = {id(node) for row in self.running for node in row.nodes}
        return len(shared) + sum(len(row.pages) for row in self.running)

    def add(self, row: Row) -> None:
        """One more row in the queue."""
        self.waiting.append(row)

    def plan(self) -> Plan | None:
        """What the next step does; rows and pages are as it needs them. None when a row
        has to give way and ids are not known yet: call again when they are."""
        preempted: list[Row] = []
        for row in list(self.running):
            if row.slot >= 0 and row.goes_on and not self._room(row, preempted):
                if row.slot >= 0:
                    return None
        restore = [] if preempted else self._admit()
        prefill = None
        for row in self.running:
            if row.length < row.wanted:
                ends = [mark for mark in row.marks if mark > row.length]
                end = min([row.wanted, row.length + self.piece, *ends])
                prefill = Prefill(row, row.length, end - row.length)
                break
        # Those among them that were admitted just now have all they want already.
        decode = [row for row in self.running if row.goes_on]
        return Plan(prefill, decode, restore, preempted)

    def _room(self, row: Row, preempted: list[Row]) -> bool:
        """A page for the next token of `row`, from the youngest rows where none is
        free; False when `row` itself had to give way, or one that cannot yet."""
        if row.length < self.page_tokens * (len(row.nodes) + len(row.pages)):
            return True
        while (page := self._page()) is None:
            victim = self.running[-1]
            if victim.ahead:
                return False
            self._leave(victim)
            self.waiting.appendleft(victim)
            self.preempted += 1
            preempted.append(victim)
            if victim is row:
                return False
        self._give(row, [page])
        return True

    def together(self, rows: list[Row], count: int) -> int:
        """`count`, where all `rows` have room for so many ids in a row, else 1; one
        that wants fewer is given them for nothing."""
        if any(row.length + count > len(row.table) * self.page_tokens for row in rows):
            return 1
        if any(self.reach(row, count - 1) < count - 1 for row in rows):
            return 1
        return count

    def reach(self, row: Row, most: int) -> int:
        """Of `most` tokens behind the next one of a row that runs, how many there is
        room for without anyone giving way."""
        there = self.page_tokens * (len(row.nodes) + len(row.pages))
        while there < row.length + 1 + most and (page := self._page()) is not None:
            self._give(row, [page])
            there += self.page_tokens
        return min(most, there - row.length - 1)

    def _page(self, size: int = 1) -> int | None:
        """A page of a class, in the place of what nobody uses where none is free."""
        tries = 4 * size if size > 1 else self.total
        while (unit := self._arena.alloc(size)) is None:
            pages = self.prefix.evict() if tries > 0 else []
            tries -= 1
            if not pages:
                state = self.prefix.drop_state()
                if state is None:
                    return None
                pages = [state]
            self._back(pages)
        return unit + 1

    def _back(self, pages: list[int]) -> None:
        for page in pages:
            self._arena.free(page - 1)

    def _give(self, row: Row, pages: list[int]) -> None:
        at = len(row.nodes) + len(row.pages)
        row.table[at : at + len(pages)] = pages
        row.pages += pages

    def _admit(self) -> list[Row]:
        """Rows that wait, in their order, as far as there are slots and pages; those
        among them that begin with a state."""
        begun = []
        while self.waiting and self._slots:
            row = self.waiting[0]
            nodes, there, c = [], 0, self.page_tokens
            if self.sharing and row.request.prompt_logprobs is None:
                states = self._state_class > 0
                nodes, there = self.prefix.match(
                    row.request.salt, row.keys(), states=states
                )
            need = -(-(len(row.ids) + 1) // c) - len(nodes)
            # Copied before anything else is done, so it may be dropped meanwhile.
            state, pages = nodes[-1].state if nodes else None, []
            while len(pages) < need and (page := self._page()) is not None:
                pages.append(page)
            if len(pages) < need:
                self._back(pages)
                self.prefix.release(nodes)
                return begun
            self.waiting.popleft()
            row.nodes = nodes
            row.table[: len(nodes)] = [node.page for node in nodes]
            self._give(row, pages)
            row.length = row.begins = len(nodes) * c
            row.slot = self._slots.pop()
            if self._state_class and self.sharing:
                row.marks = (there * c, (row.wanted - 1) // c * c)
                row.restore = state
                begun += [row] if nodes else []
            if not row.ran:
                row.ran, row.cached = True, row.length
                self.asked += len(row.ids)
                self.found += row.length
            self.running.append(row)
        return begun

    def state_page(self, row: Row) -> int | None:
        """Where the state of a row is to be kept, behind the ids that are in its pages;
        None where it need not, or cannot."""
        if row.length not in row.marks or not row.nodes or row.ahead:
            return None
        node = row.nodes[-1]
        if len(row.nodes) * self.page_tokens != row.length or node.state is not None:
            return None
        state = self._page(self._state_class)
        if state is not None:
            self.prefix.keep(node, state)
        return state

    def share(self, row: Row) -> None:
        """Whole pages of the row, where their ids are known, can be shared."""
        c, known = self.page_tokens, min(row.length, len(row.ids))
        while self.sharing and (len(row.nodes) + 1) * c <= known:
            at = len(row.nodes)
            parent = row.nodes[-1] if row.nodes else None
            keys, page = tuple(row.keys(at * c, (at + 1) * c)), row.pages[0]
            node, new = self.prefix.insert(row.request.salt, parent, keys, page)
            row.pages.pop(0)
            row.nodes.append(node)
            if not new:  # another row computed the same page before: that one is kept
                self._back([page])
                row.table[at] = node.page

    def _leave(self, row: Row) -> None:
        """The row without slot and pages; shared ones may stay for others."""
        self.running.remove(row)
        self._slots.append(row.slot)
        self.prefix.release(row.nodes)
        self._back(row.pages)
        row.slot, row.length, row.nodes, row.pages = -1, 0, [], []
        row.restore, row.marks = None, ()
        row.table[:] = 0

    def end(self, row: Row) -> None:
        """The row is over, wherever it is."""
        row.over = True
        if row.slot >= 0:
            self._leave(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def forget(self) -> None:
        """Nothing is kept of prompts any more; for when no rows are there."""
        while pages := self.prefix.evict():
            self._back(pages)

    def rows(self, fits: Callable[[Row], bool]) -> list[Row]:
        """Rows, running or waiting, that fit."""
        return [row for row in (*self.running, *self.waiting) if fits(row)]
