# SPDX-License-Identifier: Apache-2.0
"""A log of pages after a kill at any byte, after damage, and against its own lies."""

import pathlib
import random
import signal
import struct
import subprocess
import sys
import textwrap
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qwen_jax import config
from qwen_jax.serve import page_entries, page_log, pages

SLAB, UNITS = 16, 48
ARENA = pages.Settings(slab_units=SLAB, idle_ticks=4, low_share=0.0, max_used=0.25)
SMALL = page_log.Settings(chunk_bytes=96)  # 8 entries a chunk
OFTEN = page_log.Settings(chunk_bytes=96, look_every=9, slow_from=1e9)
COPIES = page_log.Settings(chunk_bytes=96, look_every=9, fast_from=1.5, slow_from=1.5)


class Recorder(page_log.Disk):
    """A disk that also tells what was done to it, in order."""

    seen: list

    def append(self, name, data):
        self.seen.append(("append", name, bytes(data)))
        return super().append(name, data)

    def truncate(self, name, size):
        self.seen.append(("truncate", name, size))
        super().truncate(name, size)

    def unlink(self, name):
        self.seen.append(("unlink", name))
        super().unlink(name)

    def replace(self, name, data):
        self.seen.append(("replace", name, bytes(data)))
        super().replace(name, data)


def work(arena, steps, seed, told=lambda: None):
    """Pages of one class after another fill the arena and are thinned out to a few,
    with and without tags; the slabs of those few morph."""
    draw = random.Random(seed)
    held, filling, size = [], True, 1
    for step in range(steps):
        unit = None
        if filling:
            tag = draw.choice((0, step + 1))
            unit = arena.alloc(draw.choice((size, size, 2)), tag)
        if unit is not None:
            held.append(unit)
        elif held:
            arena.free(held.pop(draw.randrange(len(held))))
        filling = unit is not None or len(held) < 3
        size = {1: 4, 4: 8, 8: 1}[size] if filling and unit is None else size
        told()


def history(tmp_path, how, steps, seed=0):
    """What the disk saw, and the arena's state and number of disk changes per step."""
    recorder = type("Seen", (Recorder,), {"seen": []})
    arena = page_log.create(tmp_path / "log", UNITS, ARENA, how, disk=recorder)
    marks = [(len(recorder.seen), arena.state(), arena.log.entries_written)]

    def told():
        marks.append((len(recorder.seen), arena.state(), arena.log.entries_written))

    work(arena, steps, seed, told)
    arena.log.close()
    return recorder.seen, marks, arena


def folders(seen):
    """(number of the change, files) at every instant a kill may choose: each byte of
    each write, before and after each change of a name."""
    files = {}
    for number, (what, name, *rest) in enumerate(seen):
        yield number, dict(files)
        if what == "append":
            before = files.get(name, b"")
            for cut in range(1, len(rest[0])):
                yield number, files | {name: before + rest[0][:cut]}
            files[name] = before + rest[0]
        elif what == "truncate":
            files[name] = files[name][: rest[0]]
        elif what == "unlink":
            del files[name]
        else:
            for cut in range(0, len(rest[0]), 9):
                yield number, files | {name + ".new": rest[0][:cut]}
            yield number, files | {name + ".new": rest[0]}
            files[name] = rest[0]
    yield len(seen), dict(files)


class Folder:
    """A folder that is made to hold given files, and only these."""

    def __init__(self, path):
        self.path, self.held = path, {}
        path.mkdir()

    def fill(self, files):
        now = {p.name: p.read_bytes() for p in self.path.iterdir()}
        for name in set(now) - set(files):
            (self.path / name).unlink()
        for name, data in files.items():
            if now.get(name) != data:
                (self.path / name).write_bytes(data)
        return self.path


def recovered(path):
    """The state, after making sure that recovering again changes nothing."""
    arena = page_log.recover(path, UNITS, ARENA, SMALL)
    state = arena.state()
    arena.log.close()
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    again = page_log.recover(path, UNITS, ARENA, SMALL)
    again.log.close()
    assert again.state() == state
    assert {p.name: p.read_bytes() for p in path.iterdir()} == files
    return state


def test_every_byte_prefix_is_the_replay_of_its_whole_entries(tmp_path):
    seen, marks, _ = history(tmp_path, SMALL, 90)
    assert {what for what, *_ in seen} == {"append", "replace"}
    place, count = Folder(tmp_path / "cut"), 0
    for _, files in folders(seen):
        if "current" not in files:
            continue
        sizes = [len(x) for name, x in files.items() if name.endswith(".log")]
        whole = sum(max(0, size - 32) // 8 for size in sizes)
        step = max(i for i, mark in enumerate(marks) if mark[2] <= whole)
        state = page_log.read(place.fill(files))
        assert state.pages == marks[step][1].pages
        count += 1
        if count % 10 == 0:
            assert recovered(place.path) == state
    assert count > 1000


@pytest.mark.parametrize("how", [OFTEN, COPIES], ids=["unlinking", "copying"])
def test_a_kill_amid_collection_gives_a_step_and_never_an_earlier_one(tmp_path, how):
    seen, marks, arena = history(tmp_path, how, 120)
    assert {"append", "unlink", "replace"} == {what for what, *_ in seen}
    assert (arena.log.fast > 2) == (how is OFTEN)
    assert (arena.log.slow > 2) == (how is COPIES)
    assert arena.counts.morphs and arena.counts.stragglers
    place, before = Folder(tmp_path / "cut"), 0
    for number, (change, files) in enumerate(folders(seen)):
        if "current" not in files:
            continue
        # The step whose changes of the disk were under way, and the one before it.
        step = sum(mark[0] <= change for mark in marks)
        near = [i for i in (step - 1, step) if before <= i < len(marks)]
        path = place.fill(files)
        state = recovered(path) if number % 13 == 0 else page_log.read(path)
        fits = [i for i in near if marks[i][1].pages == state.pages]
        assert fits
        before = max(before, fits[0])
    assert before == len(marks) - 1 and state == marks[-1][1]


def test_what_comes_back_goes_on(tmp_path):
    """Killed at random instants, again and again: the log of a recovered arena is as
    good as the first, and its file never holds what recovery did not see."""
    seen, _, _ = history(tmp_path, OFTEN, 150)
    choices = [files for _, files in folders(seen) if "current" in files]
    draw = random.Random(1)
    for number in range(20):
        place = Folder(tmp_path / f"cut{number}")
        place.fill(draw.choice(choices))
        for seed in range(3):
            arena = page_log.recover(place.path, UNITS, ARENA, OFTEN)
            for page in arena.state().pages[::2]:
                arena.free(page.unit)
            work(arena, 40, seed)
            arena.log.close()
            assert recovered(place.path) == arena.state()


class Killed(RuleBasedStateMachine):
    """Pages beside a dict, with kills in between: nothing is lost, nothing rises."""

    @initialize(how=st.sampled_from([SMALL, OFTEN, COPIES]))
    def begin(self, how):
        self.how, self.live = how, {}
        self.path = pathlib.Path(self.folder) / str(len(self.made))
        self.made.append(1)
        self.arena = page_log.create(self.path, UNITS, ARENA, how)

    @rule(size=st.sampled_from([1, 2, 4, 8, 16]), tag=st.integers(0, pages.MAX_TAG - 1))
    def alloc(self, size, tag):
        unit = self.arena.alloc(size, tag)
        if unit is not None:
            self.live[unit] = (size, tag)

    @rule(draw=st.randoms(use_true_random=False), share=st.floats(0, 1))
    def free(self, draw, share):
        for unit in draw.sample(sorted(self.live), int(share * len(self.live))):
            self.arena.free(unit)
            del self.live[unit]

    @rule()
    def kill(self):
        before = self.arena.state()
        self.arena.log._disk.close()  # nothing is flushed: all was written
        self.arena = page_log.recover(self.path, UNITS, ARENA, self.how)
        assert self.arena.state() == before

    @invariant()
    def equal_to_the_dict(self):
        found = {p.unit: (p.size, p.tag) for p in self.arena.state().pages}
        assert found == self.live
        assert self.arena.log.num_chunks == len([*self.path.glob("*.log")])

    def teardown(self):
        if hasattr(self, "arena"):
            self.kill()
            self.arena.log.close()


def test_pages_are_as_a_dict_says_through_kills(tmp_path):
    Killed.folder, Killed.made = tmp_path, []
    case = Killed.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=40)
    case("runTest").runTest()


def test_a_process_that_is_killed_loses_at_most_what_it_had_not_told(tmp_path):
    path = tmp_path / "log"
    program = textwrap.dedent(
        f"""
        import random
        from qwen_jax.serve import page_log, pages
        arena = page_log.create({str(path)!r}, 6400)
        draw, held = random.Random(0), []
        while True:
            if held and draw.random() < 0.45:
                unit = held.pop(draw.randrange(len(held)))
                print("free", unit, flush=True)
                arena.free(unit)
            else:
                unit = arena.alloc(draw.choice((1, 2, 8)), 5)
                held.append(unit)
                print("alloc", unit, flush=True)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    with child:
        lines = [child.stdout.readline() for _ in range(3000)]
        with pytest.raises(config.InputError, match="open in another process"):
            page_log.recover(path)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read()  # its last line may be torn
        lines += rest[: rest.rfind(b"\n") + 1].splitlines()
    live = set()
    maybe = None  # told before it is done
    for line in lines:
        what, unit = line.split()
        if maybe is not None:
            live.discard(maybe)
        maybe = int(unit) if what == b"free" else None
        if maybe is None:
            live.add(int(unit))
    arena = page_log.recover(path)
    found = {page.unit for page in arena.state().pages}
    # One page may have been given that was not told; one that was to be freed may live.
    assert len(found - live - {maybe}) <= 1 and not live - found - {maybe}
    assert {page.tag for page in arena.state().pages} == {5}
    arena.log.close()


# --- damage and lies ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of a small log after collections, and its state."""
    path = tmp_path_factory.mktemp("whole")
    seen, marks, _ = history(path, OFTEN, 60)
    files = {p.name: p.read_bytes() for p in (path / "log").iterdir()}
    assert len(files) > 4
    return files, marks[-1][1]


@pytest.mark.slow
def test_every_flipped_bit_is_told(tmp_path, whole):
    files, state = whole
    place = Folder(tmp_path / "bad")
    assert page_log.read(place.fill(files)) == state
    for name, data in files.items():
        for bit in range(0, 8 * len(data)):
            bad = bytearray(data)
            bad[bit // 8] ^= 1 << bit % 8
            (place.path / name).write_bytes(bad)
            with pytest.raises(config.InputError, match="damaged"):
                page_log.read(place.path)
        (place.path / name).write_bytes(data)


def test_a_cut_head_is_the_beginning_of_one(tmp_path, whole):
    """A last chunk shorter than a head is what a kill left, or damage."""
    files, _ = whole
    name = max(n for n in files if n.endswith(".log"))
    place = Folder(tmp_path / "cut")
    for size in range(page_entries.HEAD_BYTES):
        page_log.read(place.fill(files | {name: files[name][:size]}))
    for start in range(1, len(files[name])):
        piece = files[name][start : start + page_entries.HEAD_BYTES - 1]
        place.fill(files | {name: piece})
        if piece.rstrip(b"\0"):
            with pytest.raises(config.InputError, match="another chunk"):
                page_log.read(place.path)


@given(st.data())
@settings(max_examples=300)
def test_damage_is_told_or_changes_nothing(tmp_path_factory, whole, data):
    """Cuts, holes, files gone, moved and made longer; never a heap that never was."""
    files, state = whole
    path = tmp_path_factory.mktemp("bad")
    (path / "at").mkdir()
    names = sorted(files)
    name = data.draw(st.sampled_from(names))
    held = files[name]
    at = data.draw(st.integers(0, len(held)))
    until = data.draw(st.integers(at, len(held)))
    noise = data.draw(st.binary(min_size=until - at, max_size=until - at + 16))
    bad = data.draw(
        st.sampled_from(
            [
                {name: held[:at] + held[until:]},
                {name: held[:at] + bytes(until - at) + held[until:]},
                {name: held[:at] + noise + held[until:]},
                {name: held + held[at:until]},
                {name: None},
                {name: files[data.draw(st.sampled_from(names))]},
            ]
        )
    )
    for other, content in (files | bad).items():
        if content is not None:
            (path / "at" / other).write_bytes(content)
    try:
        found = page_log.read(path / "at")
    except config.InputError:
        return
    tail = max(n for n in names if n.endswith(".log"))
    if (files | bad) == files:
        assert found == state
        return
    # A prefix of the last chunk, or none of it: what a kill leaves.
    assert set(bad) == {tail}
    left = (bad[tail] or b"").rstrip(b"\0")
    assert files[tail].startswith(left[: len(left) // 8 * 8])


def written(path, *entries, units=UNITS, chunks=1):
    """A log of given entries whose checks are right."""
    path.mkdir()
    current = page_entries.Current(units, SLAB, 4096)
    (path / "current").write_bytes(current.pack())
    data = page_entries.head(0, 0, ())
    crc = zlib.crc32(data)
    for kind, payload in entries:
        made, crc = page_entries.entry(kind, payload, crc)
        data += made
    (path / page_entries.chunk_name(0, 0)).write_bytes(data)
    return path


def given_out(unit, size):
    return page_entries.ALLOC, unit | size.bit_length() - 1 << 32


def served(index, size):
    return page_entries.SLAB, index | size.bit_length() - 1 << 32


def freed(slot, serial=0):
    return page_entries.FREE, slot | serial << 17


ONES, FOURS = served(0, 1), served(0, 4)
LIES = {
    "twice": ([ONES, given_out(3, 1), given_out(3, 1)], "unit 3 is given out twice"),
    "overlap": ([ONES, given_out(5, 1), FOURS, given_out(4, 4)], "gives units twice"),
    "askew": ([FOURS, given_out(2, 4)], "wanted a multiple of its size"),
    "beyond": ([ONES, given_out(UNITS, 1)], "in a slab without class"),
    "no class": ([given_out(0, 1)], "in a slab without class"),
    "other class": ([ONES, given_out(0, 4)], "a page of 4 units in a slab of another"),
    "two old": (
        [ONES, given_out(0, 1), served(0, 2), given_out(2, 2), FOURS],
        "at most one more",
    ),
    "no slab": ([served(3, 1)], "slab 3 of class 2"),
    "no such class": ([served(0, 32)], "slab 0 of class 2"),
    "size": ([ONES, given_out(0, 32)], "a page of 2.5 units"),
    "freed twice": (
        [ONES, given_out(0, 1), freed(1), freed(1)],
        "no live page in slot",
    ),
    "freed what is none": ([ONES, freed(0)], "no live page in slot 0"),
    "freed ahead": ([ONES, freed(2), given_out(0, 1)], "a tombstone of what comes"),
    "freed elsewhere": ([ONES, freed(0, 1)], "a tombstone of what comes"),
    "tag": ([ONES, (page_entries.TAG, 5), served(1, 1)], "a tag without its page"),
    "wide tag": ([ONES, (page_entries.TAG, 2**40), given_out(0, 1)], "a tag of 1099"),
    "drop": ([ONES, (page_entries.DROP, 0)], "chunks it counts on are missing"),
    "kind": ([ONES, (7, 0)], "an entry of kind 7"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_log_that_contradicts_itself_is_told(tmp_path, name):
    entries, told = LIES[name]
    path = written(tmp_path / "log", *entries)
    for open_ in (page_log.read, page_log.recover):
        with pytest.raises(config.InputError, match=told):
            open_(path)
    assert [*path.glob("*.log")]  # left as it was
    page_log.Disk(path).close()  # and let go of


def test_the_bytes_are_as_documented(tmp_path):
    """Read with nothing but struct and zlib."""
    arena = page_log.create(tmp_path / "log", UNITS, ARENA)
    unit = arena.alloc(4, tag=0xABCDE)
    arena.free(unit)
    arena.log.close()
    data = (tmp_path / "log" / "00000000-0000000.log").read_bytes()
    assert data[:4] == b"QPGC" and len(data) == 32 + 4 * 8
    crc, values = zlib.crc32(data[:32]), []
    for at in range(32, 64, 8):
        crc = zlib.crc32(data[at : at + 6], crc)
        assert struct.unpack_from("<H", data, at + 6)[0] == crc & 0xFFFF
        values.append(int.from_bytes(data[at : at + 6], "little"))
    assert values == [
        4 | (0 | 2 << 32) << 3,  # slab 0, class 4
        3 | 0xABCDE << 3,
        1 | (unit | 2 << 32) << 3,
        2 | (2 | 0 << 17) << 3,  # slot 2 of chunk 0
    ]
    assert arena.log.bytes_written == len(data)


def test_collections_bound_the_log(tmp_path):
    """1,000 pages come and go around 10 that stay; NVAlloc's thresholds, sooner."""
    how = page_log.Settings(chunk_bytes=1024, look_every=100)
    arena = page_log.create(tmp_path / "log", 640, settings=how)
    stay = arena.alloc_many(10, tag=9)
    for _ in range(1000):
        arena.free(arena.alloc(1))
    log = arena.log
    assert log.slow > 0 and log.num_chunks <= 4
    size = sum(p.stat().st_size for p in (tmp_path / "log").glob("*.log"))
    assert size <= 4 * 1024 < log.bytes_written
    log.close()
    found = page_log.read(tmp_path / "log").pages
    assert [p.unit for p in found] == sorted(stay) and {p.tag for p in found} == {9}


def test_what_is_held_back_is_lost_and_nothing_else(tmp_path):
    how = page_log.Settings(held_back=8)
    arena = page_log.create(tmp_path / "log", UNITS, ARENA, how)
    arena.alloc_many(8)  # with the slab's, 9 entries: written
    arena.alloc_many(3)
    before = arena.state().pages
    arena.log._disk.close()
    back = page_log.recover(tmp_path / "log", UNITS, ARENA)
    assert back.state().pages == before[:8]
    more = back.alloc_many(2)
    back.log.close()
    assert len(page_log.read(tmp_path / "log").pages) == 10 and not set(more) & {
        *range(8)
    }


def test_a_full_disk_is_no_wrong_heap(tmp_path):
    """Part of a write is taken, the rest refused: what was not written never was."""

    class Full(page_log.Disk):
        room = 32 + 5 * 8 + 3

        def append(self, name, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            Full.room = self.room - (taken := min(self.room, len(data)))
            return super().append(name, data[:taken])

    arena = page_log.create(tmp_path / "log", UNITS, ARENA, disk=Full)
    marks = [(0, ())]
    with pytest.raises(OSError, match="No space left"):
        work(
            arena,
            100,
            3,
            lambda: marks.append((arena.log.entries_written, arena.state().pages)),
        )
    arena.log._disk.close()
    back = page_log.recover(tmp_path / "log", UNITS, ARENA)
    assert back.state().pages == max(m for m in marks if m[0] <= 5)[1]
    more = back.alloc_many(20)
    back.log.close()
    assert {p.unit for p in page_log.read(tmp_path / "log").pages} >= {*more}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: page_log.recover(path), "no log of pages is here"),
        (lambda path: page_log.recover(path / "none"), "no log of pages is here"),
        (lambda path: page_log.create(path, 100), "units=100: wanted a multiple"),
        (lambda path: page_log.Settings(chunk_bytes=100), "chunk_bytes=100: wanted a"),
        (lambda path: page_log.Settings(look_every=0), "look_every=0: wanted at least"),
        (lambda path: page_log.Settings(slow_from=1.5), "slow_from=1.5: wanted at"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, make, told):
    with pytest.raises(config.InputError, match=told):
        make(tmp_path)


def test_one_log_one_writer_and_no_other_file_is_touched(tmp_path):
    (tmp_path / "my-notes.log").write_text("mine")
    arena = page_log.create(tmp_path, UNITS, ARENA)
    with pytest.raises(config.InputError, match="a log of pages is here"):
        page_log.create(tmp_path, UNITS, ARENA)
    with pytest.raises(config.InputError, match="open in another process"):
        page_log.recover(tmp_path)
    arena.log.close()
    with pytest.raises(config.InputError, match="a log of 48 units, wanted units=64"):
        page_log.recover(tmp_path, 64)
    page_log.recover(tmp_path).log.close()
    assert (tmp_path / "my-notes.log").read_text() == "mine"
