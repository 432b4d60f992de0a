# SPDX-License-Identifier: Apache-2.0
"""The host's side of an engine against a model: pages that hold what was written.

A page is a list of ids here. Whatever is admitted, cancelled, preempted and shared, in
whatever order, the pages of a row that runs hold its ids, and every page is accounted
for.
"""

import collections

import hypothesis
import hypothesis.strategies as st

from qwen_jax.serve import prefix as prefix_lib
from qwen_jax.serve import request as request_lib
from qwen_jax.serve import scheduler

Request = request_lib.Request
C, PIECE = 4, 8
EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(1, 22),  # tokens of the prompt
            st.integers(1, 9),  # of the answer
            st.integers(0, 2),  # which salt and beginning
        ),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.booleans()),
    ),
    max_size=60,
)


class World:
    """A device of lists, a step behind when it is told to be."""

    def __init__(self, rows, pages, sharing, state_units):
        self.plan = scheduler.Scheduler(
            rows=rows,
            pages=pages,
            page_tokens=C,
            piece=PIECE,
            sharing=sharing,
            state_units=state_units,
        )
        self.states = [None] * rows  # by slot: the ids that a state has seen
        self.units, self.restored = state_units, 0
        self.pages = collections.defaultdict(lambda: [None] * C)
        self.flying, self.rows, self.done = collections.deque(), [], []
        self.capacity = self.plan.total * C

    def add(self, prompt, answer, kind):
        ids = tuple((7 * kind + i) % 50 if i < 13 else i * kind for i in range(prompt))
        if prompt + answer > self.capacity:
            return
        request = Request(str(len(self.rows)), ids, answer, salt="ab"[kind % 2])
        self.rows.append(scheduler.Row(request, 0, 16))
        self.plan.add(self.rows[-1])

    def write(self, row, at, token):
        page = row.table[at // C]
        assert page != 0
        held = self.pages[page]
        owners = [r for r in self.plan.running if page in r.table[: len_of(r)]]
        if held[at % C] != token:  # nobody else has seen what was there
            assert all(r is row or r.length <= at for r in owners)
        held[at % C] = token

    def step(self, behind):
        plan = self.plan.plan()
        if plan is None:
            self.land(0)
            plan = self.plan.plan()
        for row in plan.restore if self.units else ():
            seen = self.pages[row.restore][0]
            assert seen == tuple(row.ids[: row.length])
            assert all(
                self.pages[row.restore + i][0] == seen for i in range(self.units)
            )
            self.states[row.slot] = seen
            self.restored += 1
        if plan.prefill is not None:
            now = plan.prefill
            self.sees(
                now.row, now.row.ids[now.start : now.start + now.count], now.start
            )
            for at in range(now.start, now.start + now.count):
                self.write(now.row, at, now.row.ids[at])
            now.row.length += now.count
            self.plan.share(now.row)
            state = self.plan.state_page(now.row)
            if state is not None:
                for i in range(self.units):
                    self.pages[state + i] = [self.states[now.row.slot]] * C
            if now.last and not now.row.said:
                self.flies([now.row])
        for row in plan.decode:
            assert row.slot >= 0 and not row.over
            token = row.ids[-1] if not row.ahead else next_id(row.ids)
            self.sees(row, [token], row.length)
            self.write(row, row.length, token)
            row.length += 1
        if plan.decode:
            self.flies(plan.decode)
        self.land(1 if behind and plan.decode else 0)
        return bool(plan)

    def sees(self, row, ids, start):
        """The state of the row's slot takes ids in; it has seen all before them."""
        before = self.states[row.slot] if start else ()
        assert not self.units or len(before) == start
        self.states[row.slot] = (*(before or ()), *ids)

    def flies(self, rows):
        for row in rows:
            row.ahead += 1
        self.flying.append(list(rows))

    def land(self, left):
        while len(self.flying) > left:
            for row in self.flying.popleft():
                if row.over:
                    continue
                row.ids.append(next_id(row.ids))
                row.ahead -= 1
                self.plan.share(row)
                if len(row.ids) - len(row.request.prompt) == row.request.max_tokens:
                    self.plan.end(row)
                    self.done.append(row)

    def check(self):
        plan = self.plan
        live = plan._arena.state().pages
        owned = []
        for row in plan.running:
            owned += row.pages
            assert row.slot >= 0
            table = [node.page for node in row.nodes] + row.pages
            assert list(row.table[: len(table)]) == table and not any(
                row.table[len(table) :]
            )
            for at in range(min(row.length, len(row.ids))):
                assert self.pages[row.table[at // C]][at % C] == row.ids[at]
        nodes = list(every_node(plan.prefix))
        owned += [node.page for node in nodes]
        assert sorted(owned) == [x.unit + 1 for x in live if x.size == 1]
        states = [node.state for node in nodes if node.state is not None]
        if plan._state_class != 1:
            big = [x.unit + 1 for x in live if x.size > 1]
            assert sorted(states) == big
        assert len(states) == len(plan.prefix._states)
        users = collections.Counter(id(n) for row in plan.running for n in row.nodes)
        assert all(node.users == users[id(node)] for node in nodes)
        assert plan.prefix.unused == sum(node.users == 0 for node in nodes)
        assert plan.prefix.nodes == len(nodes)
        slots = [row.slot for row in plan.running]
        assert len(set(slots)) == len(slots) and not set(slots) & set(plan._slots)
        assert plan.used == len({p for r in plan.running for p in r.table if p})


def len_of(row):
    return len(row.nodes) + len(row.pages)


def next_id(ids):
    return (sum(ids) * 31 + len(ids)) % 50


def every_node(prefix):
    stack = list(prefix._roots.values())
    while stack:
        node = stack.pop()
        if node.parent is not None:
            yield node
        stack += node.children.values()


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    events=EVENTS,
    rows=st.integers(1, 4),
    pages=st.integers(3, 40),
    sharing=st.booleans(),
    state_units=st.sampled_from([0, 0, 2, 3]),
)
def test_pages_hold_what_their_rows_say(events, rows, pages, sharing, state_units):
    world = World(rows, pages, sharing, state_units)
    for name, *how in events:
        if name == "add":
            world.add(*how)
        elif name == "cancel":
            mine = [row for row in world.rows if not row.over]
            if mine:
                world.plan.end(mine[how[0] % len(mine)])
        else:
            world.step(*how)
        world.check()
    for _ in range(3000):  # all that is left comes to an end
        if all(row.over for row in world.rows):
            break
        world.step(True)
        world.check()
    assert all(row.over for row in world.rows)
    assert world.plan.used == 0 and not world.plan.running
    for row in world.done:
        ids = list(row.request.prompt)
        while len(ids) < len(row.request.prompt) + row.request.max_tokens:
            ids.append(next_id(ids))
        assert row.ids == ids


def test_the_longest_unused_leaf_goes_first():
    tree = prefix_lib.Prefix(2)
    paths = {}
    for name, ids in (("a", (1, 2, 3, 4)), ("b", (1, 2, 5, 6)), ("c", (7, 8))):
        nodes = []
        for k in range(0, len(ids), 2):
            parent = nodes[-1] if nodes else None
            page = 10 * len(paths) + k
            nodes.append(tree.insert("", parent, ids[k : k + 2], page)[0])
        paths[name] = nodes
    assert paths["b"][0] is paths["a"][0]
    for name in "bac":
        tree.release(paths[name])
    assert tree.unused == tree.nodes == 4
    found, _ = tree.match("", (1, 2, 5, 6, 9))  # b is in use again
    assert [node.page for node in found] == [0, 12]
    # a's own page, then c's; those of b stay.
    assert [tree.evict() for _ in range(3)] == [[2], [20], []]
    tree.release(found)
    assert [tree.evict() for _ in range(3)] == [[12], [0], []]
    assert tree.match("", (1, 2, 3)) == ([], 0) and tree.nodes == 0
    assert tree.match("other", (1, 2, 3)) == ([], 0)


def test_a_path_is_taken_as_far_as_a_state_is_there():
    tree = prefix_lib.Prefix(2)
    one, _ = tree.insert("", None, (1, 2), 5)
    two, _ = tree.insert("", one, (3, 4), 6)
    tree.release([one, two])
    ids = (1, 2, 3, 4, 5)
    assert tree.match("", ids, states=True) == ([], 2)
    tree.keep(one, 70)
    found, there = tree.match("", ids, states=True)
    assert (found, there) == ([one], 2)
    tree.release(found)
    tree.keep(two, 80)
    assert tree.drop_state() == 70 and one.state is None
    assert tree.evict() == [6, 80] and tree.evict() == [5]
    assert tree.drop_state() is None
