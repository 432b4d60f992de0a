# SPDX-License-Identifier: Apache-2.0
"""Pages beside a dict that knows which units are taken: nothing twice, nothing lost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qwen_jax import config
from qwen_jax.serve import page_lines, pages

SLAB, SLABS = 16, 6
CLASSES = (1, 2, 4, 8, 16)
ANY = -1  # some slab was touched just now, or all were, and is not idle


def room_by_hand(state, size, low_units):
    """What an arena may still give, read off its live pages alone: whether some slab of
    the class has a free page, whether one is empty, and which could morph."""
    taken = set()
    inside = {i: [] for i in range(len(state.classes))}
    for page in state.pages:
        taken |= set(range(page.unit, page.unit + page.size))
        inside[page.unit // SLAB].append(page)
    served, low = False, []
    for index, mine in inside.items():
        spots = range(index * SLAB, (index + 1) * SLAB, size)
        fits = any(not taken & set(range(u, u + size)) for u in spots)
        mixed = any(page.size != state.classes[index] for page in mine)
        served |= state.classes[index] == size and fits
        if mine and not mixed and sum(p.size for p in mine) <= low_units:
            low.append((index, fits and state.classes[index] != size))
    return served, not all(inside.values()), low


class Arena(RuleBasedStateMachine):
    """Every call beside `live`: first unit -> (size, tag)."""

    @initialize(banks=st.sampled_from([1, 6]))
    def begin(self, banks):
        self.settings = pages.Settings(
            slab_units=SLAB,
            max_used=0.25,
            idle_ticks=0,
            low_share=0.0,
            banks=banks,
        )
        self.arena = pages.Pages(SLAB * SLABS, self.settings)
        self.live, self.touched = {}, None

    @rule(size=st.sampled_from(CLASSES), tag=st.sampled_from([0, 7, pages.MAX_TAG - 1]))
    def alloc(self, size, tag):
        before = self.arena.state()
        unit = self.arena.alloc(size, tag)
        served, empty, low = room_by_hand(before, size, SLAB // 4)
        idle = [index for index, fits in low if fits and index != self.touched]
        if unit is None:
            assert not served and not empty and not (idle and self.touched != ANY)
            self.touched = None  # time goes on
            return
        assert served or empty or idle
        assert unit % size == 0 and unit // SLAB == (unit + size - 1) // SLAB
        taken = {u for v, (n, _) in self.live.items() for u in range(v, v + n)}
        assert not taken & set(range(unit, unit + size))
        self.live[unit] = (size, tag)
        self.touched = unit // SLAB

    @rule(draw=st.randoms(use_true_random=False))
    def free(self, draw):
        if self.live:
            unit = draw.choice(sorted(self.live))
            self.arena.free(unit)
            del self.live[unit]
            self.touched = unit // SLAB

    @rule(draw=st.randoms(use_true_random=False), share=st.floats(0.5, 1.0))
    def free_many(self, draw, share):
        for unit in draw.sample(sorted(self.live), int(share * len(self.live))):
            self.arena.free(unit)
            del self.live[unit]
            self.touched = unit // SLAB

    @rule(size=st.sampled_from(CLASSES[:-1]))
    def fill_and_thin_out(self, size):
        """What is left is one page a slab: the slabs are ready to morph."""
        while (unit := self.arena.alloc(size)) is not None:
            self.live[unit] = (size, 0)
        kept = {unit // SLAB: unit for unit in sorted(self.live, reverse=True)}
        for unit in sorted(set(self.live) - set(kept.values())):
            self.arena.free(unit)
            del self.live[unit]
        self.touched = ANY

    @rule(count=st.integers(0, 12), size=st.sampled_from(CLASSES))
    def alloc_many(self, count, size):
        units = self.arena.alloc_many(count, size)
        self.touched = ANY
        if units is not None:
            assert len(units) == count and not set(units) & set(self.live)
            self.live |= dict.fromkeys(units, (size, 0))
            if units:
                self.touched = units[-1] // SLAB

    @rule()
    def carried_over(self):
        state = self.arena.state()
        self.arena = pages.Pages(SLAB * SLABS, self.settings)
        self.arena.restore(state)
        assert self.arena.state() == state
        self.touched = ANY

    @invariant()
    def equal_to_the_dict(self):
        found = {p.unit: (p.size, p.tag) for p in self.arena.state().pages}
        assert found == self.live
        assert self.arena.used == sum(size for size, _ in self.live.values())
        assert self.arena.used + self.arena.free_units == SLAB * SLABS

    def teardown(self):
        if not hasattr(self, "arena"):
            return
        for unit in sorted(self.live):
            self.arena.free(unit)
        whole = [self.arena.alloc(SLAB) for _ in range(SLABS)]
        assert sorted(whole) == [i * SLAB for i in range(SLABS)]
        assert self.arena.alloc(1) is None


Arena.TestCase.settings = settings(max_examples=60, stateful_step_count=60)
TestArena = Arena.TestCase


def asked(**changes):
    given_ = {"slab_units": 16, "idle_ticks": 0, "low_share": 0.0}
    return pages.Settings(**given_ | changes)


def filled_but(arena, left):
    """Every unit given out as pages of one, then all freed but the first `left` of each
    slab's: live stragglers lie at the slabs' beginnings."""
    units = arena.alloc_many(arena.units)
    size = arena.settings.slab_units
    for unit in units:
        if unit % size >= left:
            arena.free(unit)


def test_a_mostly_empty_slab_is_turned_over_around_its_live_pages():
    arena = pages.Pages(32, asked())
    filled_but(arena, 3)
    given_ = [arena.alloc(4) for _ in range(7)]
    # 4..16 of one slab, then of the other; 0..4 and 16..20 are held back by stragglers.
    assert given_[6] is None
    assert sorted(given_[:6]) == [4, 8, 12, 20, 24, 28]
    assert [p.unit for p in arena.state().pages if p.size == 1] == [0, 1, 2, 16, 17, 18]
    assert arena.counts.morphs == 2 and arena.counts.stragglers == 6
    arena.free(0)
    arena.free(1)
    assert arena.alloc(4) is None
    arena.free(2)
    assert arena.alloc(4) == 0


def test_a_small_class_moves_in_around_a_large_live_page():
    arena = pages.Pages(16, asked(max_used=0.5))
    units = [arena.alloc(8), arena.alloc(8)]
    arena.free(units[0])
    assert arena.alloc(1) is None  # the slab was touched just now
    small = arena.alloc_many(8)
    assert sorted(small) == list(range(units[0], units[0] + 8))
    assert arena.alloc(1) is None
    arena.free(units[1])
    assert sorted(arena.alloc_many(8)) == list(range(units[1], units[1] + 8))


@pytest.mark.parametrize(
    ("left", "settings_", "morphs"),
    [
        (3, {}, True),  # 3 of 16 is 18.75 %
        (4, {}, False),  # 25 %
        (4, {"max_used": 0.25}, True),
        (3, {"turnover": "empty"}, False),
        (3, {"idle_ticks": 13}, False),  # 13 frees came after
        (3, {"idle_ticks": 12}, True),
        (3, {"low_share": 0.5}, True),
        (3, {"low_share": 0.99}, True),
    ],
)
def test_thresholds_are_kept(left, settings_, morphs):
    arena = pages.Pages(32, asked(**settings_))
    units = sorted(arena.alloc_many(32))
    for unit in units[left:16] + units[16 + left :]:
        arena.free(unit)
    assert (arena.alloc(4) is not None) == morphs
    assert arena.counts.morphs == morphs


def test_few_low_slabs_are_left_alone():
    arena = pages.Pages(16 * 10, asked(low_share=0.10))
    units = sorted(arena.alloc_many(160))
    for unit in units[2:16]:
        arena.free(unit)
    arena.free(units[100])
    assert arena.alloc(4) is None  # 1 of 10 is not more than 10 %
    for unit in units[18:32]:
        arena.free(unit)
    assert arena.alloc(4) is not None


@pytest.mark.parametrize("rid", [False, True])
def test_slabs_with_stragglers_do_not_count_until_they_are_rid_of_them(rid):
    arena = pages.Pages(16 * 4, asked(low_share=0.5))
    filled_but(arena, 1)
    assert arena.alloc_many(7, 2) is not None  # all there is in the slab that morphed
    arena.alloc_many(15)  # another is full
    mixed = arena.state().classes.index(2)
    assert [p.size for p in arena.state().pages if p.unit // 16 == mixed].count(1) == 1
    if rid:
        arena.free(mixed * 16)
    # Two that are little used: of three, or of four.
    assert (arena.alloc(4) is None) == rid


def test_a_morph_looks_at_so_many_slabs():
    """Slabs whose straggler lies in the way of the asked class are passed over."""
    for scan, given_ in ((3, None), (4, 56)):
        arena = pages.Pages(16 * 4, asked(scan=scan, max_used=0.5, slab_units=16))
        units = sorted(arena.alloc_many(64))
        for slab in range(4):
            kept = {7, 8} if slab < 3 else {7}
            for offset in sorted(set(range(16)) - kept):
                arena.free(units[16 * slab + offset])
        assert arena.alloc(8) is None  # the last was touched just now
        assert arena.alloc(8) == given_


def test_the_slab_left_alone_longest_goes_first_and_is_normal_after_its_stragglers():
    arena = pages.Pages(48, asked())
    filled_but(arena, 1)
    assert arena.alloc(1) < 16  # slab 0 is touched last
    assert arena.alloc(8) == 24  # slab 1 begins at 16, its straggler there
    assert arena.state().classes == (1, 8, 1)
    arena.free(16)
    assert arena.alloc(8) == 16
    arena.free(16)
    arena.free(24)
    # Empty and normal again: whole slabs come from it first.
    assert arena.alloc(16) == 16 and arena.counts.emptied == 1


def test_only_slabs_without_a_class_get_one_where_none_turns_over():
    arena = pages.Pages(32, asked(turnover="never"))
    first = arena.alloc(1)
    arena.free(first)
    assert arena.room(4) == 4 and arena.alloc(4) == 16
    assert arena.alloc(8) is None and arena.room(8) == 0
    arena.free(16)
    assert arena.alloc(8) is None and arena.alloc(4) > 16


def test_room_is_what_can_be_had_without_morphing():
    arena = pages.Pages(64, asked())
    assert [arena.room(k) for k in CLASSES] == [64, 32, 16, 8, 4]
    arena.alloc(1)
    arena.alloc(4)
    assert [arena.room(k) for k in CLASSES] == [15 + 32, 16, 3 + 8, 4, 2]
    for size in (16, 1):
        while arena.room(size):
            assert arena.alloc(size) is not None
    assert arena.free_units == 12 and arena.room(4) == 3


def test_all_or_nothing():
    arena = pages.Pages(32, asked())
    assert arena.alloc_many(3, 16) is None and arena.used == 0
    arena.alloc(1)
    before = arena.state().pages
    assert arena.alloc_many(4, 8) is None and arena.state().pages == before


@pytest.mark.parametrize("banks", [1, 2, 6, 7])
@pytest.mark.parametrize("line_bits", [4, 512])
def test_pages_and_bits_are_one_to_one(banks, line_bits):
    count = 3 * banks * line_bits
    bits = [page_lines.bit_of(page, banks, line_bits) for page in range(count)]
    assert sorted(bits) == list(range(count))
    assert [page_lines.page_of(bit, banks, line_bits) for bit in bits] == [
        *range(count)
    ]
    # Any `banks` pages in a row lie on as many lines.
    lines = [bit // line_bits for bit in bits]
    for at in range(0, count - banks, banks):
        assert len(set(lines[at : at + banks])) == banks


def flushes(banks, slab_units, count):
    meter = page_lines.Meter()
    cut = pages.Settings(slab_units=slab_units, banks=banks)
    arena = pages.Pages(slab_units, cut, meter=meter)
    units = [arena.alloc(1) for _ in range(count)]
    assert units == list(range(count))
    return arena, meter


def test_lines_in_order_are_flushed_again_at_once_and_interleaved_after_the_others():
    _, meter = flushes(1, 512, 512)
    assert meter.distances == {1: 511} and meter.again == 511
    _, meter = flushes(6, 512, 512)
    assert meter.distances == {6: 506} and meter.again == 0


def test_pages_in_use_and_out_again_keep_their_distance():
    """After frees in any order the turns of the banks still spread what is given."""
    near = {}
    for banks in (1, 6):
        arena, meter = flushes(banks, 512, 512)
        draw = random.Random(0)
        held = [*range(512)]
        for unit in draw.sample(held, 256):
            arena.free(unit)
        before = meter.flushes, meter.again
        for _ in range(180):
            arena.alloc(1)
        near[banks] = (meter.again - before[1]) / (meter.flushes - before[0])
    assert near[1] == 1.0 and near[6] < 0.05


@given(st.data())
@settings(max_examples=200)
def test_no_state_makes_an_arena_that_gives_units_twice(data):
    """Any list of pages is either refused or kept as it is, and goes on rightly."""
    page = st.builds(
        pages.Page, st.integers(-1, 33), st.sampled_from([1, 2, 3, 4, 16]), st.just(0)
    )
    found = tuple(sorted(data.draw(st.lists(page, max_size=4, unique=True))))
    classes = tuple(data.draw(st.sampled_from([0, 1, 2, 4, 5])) for _ in range(2))
    state = pages.State(32, 16, classes, found)
    arena = pages.Pages(32, asked())
    taken = [u for p in found for u in range(p.unit, p.unit + p.size)]
    try:
        arena.restore(state)
    except config.InputError:
        return
    assert arena.state() == state and arena.used == len(taken) == len(set(taken))
    while True:
        unit = arena.alloc(1)
        if unit is None:
            break
        assert unit not in taken
        taken.append(unit)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: pages.Settings(slab_units=48), "slab_units=48: wanted a power of two"),
        (lambda: pages.Settings(turnover="mroph"), "did you mean 'morph'"),
        (lambda: pages.Settings(max_used=1.0), "max_used=1.0: wanted a share"),
        (lambda: pages.Settings(banks=0), "banks=0: wanted at least 1"),
        (lambda: pages.Pages(1000), "units=1000: .* such as 960"),
        (lambda: pages.Pages(0), "units=0: .* such as 64"),
        (lambda: pages.Pages(64).alloc(3), "size=3: wanted a class, any of 1, 2, 4"),
        (lambda: pages.Pages(64).alloc(128), "size=128: wanted a class"),
        (lambda: pages.Pages(64).room(0), "size=0: wanted a class"),
        (lambda: pages.Pages(64).alloc(1, 2**40), "wanted 0 to 1099511627775"),
        (lambda: pages.Pages(64).free(0), "unit 0: no live page begins there"),
        (lambda: pages.Pages(64).free(-1), "unit -1: no live page begins there"),
        (lambda: pages.Pages(64).free(64), "unit 64: no live page begins there"),
    ],
)
def test_what_does_not_fit_is_told(make, told):
    with pytest.raises(config.InputError, match=told):
        make()


def test_a_page_is_freed_once_and_by_its_first_unit():
    arena = pages.Pages(64)
    unit = arena.alloc(4)
    with pytest.raises(config.InputError, match="not its first unit"):
        arena.free(unit + 1)
    assert arena.page(unit) == pages.Page(unit, 4) and arena.page(unit + 1) is None
    arena.free(unit)
    with pytest.raises(config.InputError, match="freed twice"):
        arena.free(unit)
    assert arena.used == 0
