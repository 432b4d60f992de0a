# SPDX-License-Identifier: Apache-2.0
"""The log of an arena of pages, from which it comes back after a kill.

A cache on the host outlives the process if what its pages hold lies in a file or shared
memory, and if the next process knows which pages are live and whose. `create` makes a
log for an arena, `pages.Pages(..., log=log)` writes to it, `recover` gives the arena as
it was after the last whole entry. A page's tag (5 bytes) lets its owner know it again.

Source: NVAlloc (ASPLOS'22), log-structured bookkeeping: entries of 8 bytes in chunks,
tombstones, and every 10,000 frees a look at slots / live entries: from 10 on a slow
collection (copy what is live to the other log, then flip), from 2 on a fast one (unlink
chunks with nothing live in them). Deviations: a chunk is a file, so unlinking it gives
its space back and nothing is ever overwritten; the other log is the next generation of
files, the flip a rename; entries in the file are in order, not interleaved. A tombstone
counts as live while the chunk it points into is linked: else its page would rise again.

Formats: page_entries.py. Units: bytes. Invariants: after a kill at any byte, `recover`
gives the state after some entry that was written, and all before it; recovering again
changes nothing. That holds for a kill of the process; `sync=True` flushes to the disk
at each `flush`, for the machine. Write a page's content before its ALLOC: the log does
not see contents. One process at a time has a log open.
Raises: config.InputError for a folder without a log, a second writer, and a log that is
damaged or contradicts itself; OSError of the disk, after which the log is of no more
use: close it and recover.
"""

import dataclasses
import fcntl
import os
import pathlib
import zlib

from qwen_jax import config
from qwen_jax.serve import page_entries as form
from qwen_jax.serve import pages as pages_lib


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a log is kept: bytes of a chunk; entries held back at most before they are
    written (0: none); frees between two looks, and from which slots / live entries on
    chunks are unlinked and the log is copied; whether `flush` reaches the disk."""

    chunk_bytes: int = 65_536
    held_back: int = 0
    look_every: int = 10_000
    fast_from: float = 2.0
    slow_from: float = 10.0
    sync: bool = False

    def __post_init__(self):
        size = self.chunk_bytes
        least, most = form.MIN_CHUNK_BYTES, form.MAX_CHUNK_BYTES
        if size % form.ENTRY_BYTES or not least <= size <= most:
            raise config.InputError(
                f"chunk_bytes={size}: wanted a multiple of 8, {least} to {most}"
            )
        for name, low in (("held_back", 0), ("look_every", 1), ("fast_from", 1)):
            if getattr(self, name) < low:
                raise config.InputError(
                    f"{name}={getattr(self, name)}: wanted at least {low}"
                )
        if self.slow_from < self.fast_from:
            raise config.InputError(
                f"slow_from={self.slow_from}: wanted at least fast_from="
                f"{self.fast_from}"
            )


class Disk:
    """The folder of a log: the four ways in which it changes, each in order."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._open: tuple[str, int] | None = None
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise config.InputError(
                f"{folder}: the log is open in another process; end it first, or use "
                "another folder"
            ) from error

    def append(self, name: str, data: bytes | bytearray) -> int:
        """Write at a file's end; returns how many bytes were taken."""
        if self._open is None or self._open[0] != name:
            self._leave()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._open = (name, os.open(self.folder / name, flags, 0o600))
        return os.write(self._open[1], data)

    def truncate(self, name: str, size: int) -> None:
        """Cut a file's end off."""
        os.truncate(self.folder / name, size)

    def unlink(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink()

    def replace(self, name: str, data: bytes) -> None:
        """Put a file in another's place, whole or not at all."""
        new = self.folder / f"{name}.new"
        new.write_bytes(data)
        os.replace(new, self.folder / name)

    def sync(self) -> None:
        """What was written to the last file, and the folder, reach the disk."""
        if self._open is not None:
            os.fsync(self._open[1])
        os.fsync(self._lock)

    def _leave(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def close(self) -> None:
        """Let go of the folder."""
        self._leave()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@dataclasses.dataclass
class _Chunk:
    """A linked chunk: entries that still count, and for each later chunk's tombstone
    of one of its pages that chunk's serial."""

    live: int = 0
    tombs: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Live:
    """Where the entry of a live page is, and what it says."""

    serial: int
    slot: int
    page: pages_lib.Page

    @property
    def entries(self) -> int:
        return 2 if self.page.tag else 1


class Log:
    """A handle on a log that is written to; `create` and `recover` make it.

    bytes_written, entries_written: since it was opened, copies included. fast, slow:
    collections since then.
    """

    def __init__(self, disk: Disk, settings: Settings, current: form.Current):
        self._disk, self._settings, self.current = disk, settings, current
        self._chunks: dict[int, _Chunk] = {}
        self._pages: dict[int, _Live] = {}
        self._slabs: dict[int, tuple[int, int]] = {}  # -> serial of the entry, class
        self._serial = self._slot = self._crc = 0
        self._buffer = bytearray()
        self._frees = 0
        self.bytes_written = self.entries_written = self.fast = self.slow = 0

    @property
    def num_slots(self) -> int:
        """Entries a chunk has room for."""
        return (self.current.chunk_bytes - form.HEAD_BYTES) // form.ENTRY_BYTES

    @property
    def num_chunks(self) -> int:
        """Chunks that are linked."""
        return len(self._chunks)

    # --- what an arena tells ---

    def alloc(self, unit: int, size: int, tag: int) -> None:
        """A page was given out."""
        self._alloc(pages_lib.Page(unit, size, tag))
        self._settle()

    def free(self, unit: int) -> None:
        """A page was taken back."""
        live = self._pages.pop(unit)
        serial, _ = self._append(form.FREE, live.slot | live.serial << form.SLOT_BITS)
        self._chunks[live.serial].live -= live.entries
        if serial != live.serial:
            self._chunks[serial].live += 1
            self._chunks[live.serial].tombs.append(serial)
        self._frees += 1
        if self._frees >= self._settings.look_every:
            self._frees = 0
            self.collect()
        self._settle()

    def slab(self, index: int, size: int) -> None:
        """A slab serves another class from now on."""
        self._slab(index, size)
        self._settle()

    def flush(self) -> None:
        """Hand everything to the system (with `sync`, to the disk)."""
        name = form.chunk_name(self.current.generation, self._serial)
        while self._buffer:
            taken = self._disk.append(name, self._buffer)
            del self._buffer[:taken]
            self.bytes_written += taken
        if self._settings.sync:
            self._disk.sync()

    def close(self) -> None:
        """Flush and let go of the folder."""
        try:
            self.flush()
        finally:
            self._disk.close()

    # --- entries ---

    def _settle(self) -> None:
        if len(self._buffer) > self._settings.held_back * form.ENTRY_BYTES:
            self.flush()

    def _alloc(self, page: pages_lib.Page) -> None:
        if page.tag:
            if self._slot == self.num_slots - 1:
                self._append(form.PAD, 0)
            serial, _ = self._append(form.TAG, page.tag)
            self._chunks[serial].live += 1
        payload = page.unit | (page.size.bit_length() - 1) << 32
        serial, slot = self._append(form.ALLOC, payload)
        self._chunks[serial].live += 1
        self._pages[page.unit] = _Live(serial, slot, page)

    def _slab(self, index: int, size: int) -> None:
        if index in self._slabs:
            self._chunks[self._slabs[index][0]].live -= 1
        payload = index | (size.bit_length() - 1) << 32
        serial, _ = self._append(form.SLAB, payload)
        self._chunks[serial].live += 1
        self._slabs[index] = (serial, size)

    def _append(self, kind: int, payload: int) -> tuple[int, int]:
        """One entry; returns its chunk and slot."""
        if self._slot == self.num_slots:
            self._roll()
        made, self._crc = form.entry(kind, payload, self._crc)
        self._buffer += made
        self.entries_written += 1
        self._slot += 1
        return self._serial, self._slot - 1

    def _roll(self) -> None:
        """Begin the next chunk; the one before is whole by then."""
        self.flush()
        self._begin(self._serial + 1)

    def _begin(self, serial: int) -> None:
        made = form.head(self.current.generation, serial, self._chunks)
        self._serial, self._slot = serial, 0
        self._crc = zlib.crc32(made)
        self._chunks[serial] = _Chunk()
        self._buffer += made

    # --- collection ---

    def collect(self) -> None:
        """What every `look_every` frees brings: slow, fast or nothing, by the share of
        entries that still count."""
        items = max(1, sum(chunk.live for chunk in self._chunks.values()))
        ratio = len(self._chunks) * self.num_slots / items
        sparse = ratio >= self._settings.slow_from and len(self._chunks) > 1
        if sparse or self._serial >= form.MAX_SERIAL // 2:
            self._copy()
        elif ratio >= self._settings.fast_from:
            self._unlink()

    def _unlink(self) -> None:
        """Fast: unlink chunks in which nothing counts, and those that this frees."""
        self.fast += 1
        for serial in sorted(self._chunks):
            # A tombstone is never before its page, so one pass finds them all.
            if self._chunks[serial].live or serial == self._serial:
                continue
            self._append(form.DROP, serial)
            self.flush()
            self._disk.unlink(form.chunk_name(self.current.generation, serial))
            for later in self._chunks.pop(serial).tombs:
                self._chunks[later].live -= 1

    def _copy(self) -> None:
        """Slow: write what is live as the next generation, then flip."""
        self.slow += 1
        self.flush()
        old, chunks = self.current, self._chunks
        live, slabs = self._pages, self._slabs
        self.current = dataclasses.replace(old, generation=old.generation + 1)
        self._chunks, self._pages, self._slabs = {}, {}, {}
        before = self.entries_written
        self._begin(0)
        # A slab's stragglers come before the entry of its class, as they did.
        late = []
        for unit in sorted(live):
            page = live[unit].page
            if slabs[unit // old.slab_units][1] == page.size:
                late.append(page)
            else:
                self._alloc(page)
        for index in sorted(slabs):
            self._slab(index, slabs[index][1])
        for page in late:
            self._alloc(page)
        self.flush()
        self.current = dataclasses.replace(
            self.current, copied=self.entries_written - before
        )
        self._disk.replace(form.CURRENT, self.current.pack())
        if self._settings.sync:
            self._disk.sync()
        for serial in chunks:
            self._disk.unlink(form.chunk_name(old.generation, serial))


# --- from a folder to a log ---


def create(
    folder: str | os.PathLike,
    units: int,
    pages: pages_lib.Settings | None = None,
    settings: Settings = Settings(),
    *,
    disk: type[Disk] = Disk,
) -> pages_lib.Pages:
    """An empty arena with a new log in `folder`, which must be new or empty."""
    path = pathlib.Path(folder)
    made = pages_lib.Pages(units, pages or pages_lib.Settings())
    path.mkdir(parents=True, exist_ok=True)
    if (path / form.CURRENT).exists():
        raise config.InputError(
            f"{path}: a log of pages is here; take it up with page_log.recover, or "
            "remove the folder"
        )
    current = form.Current(units, made.settings.slab_units, settings.chunk_bytes)
    place = disk(path)
    try:
        _sweep(place, None)
        log = Log(place, settings, current)
        log._begin(0)
        log.flush()
        place.replace(form.CURRENT, current.pack())
    except BaseException:
        place.close()
        raise
    made.log = log
    return made


def recover(
    folder: str | os.PathLike,
    units: int | None = None,
    pages: pages_lib.Settings | None = None,
    settings: Settings = Settings(),
    *,
    disk: type[Disk] = Disk,
) -> pages_lib.Pages:
    """The arena of a log as it was after the last whole entry; the log goes on.

    Args:
      folder: of the log.
      units: that the arena must have; None for what the log says.
      pages: settings of the arena; its slab_units are the log's, whatever is given.
      settings: of the log; its chunk_bytes are the log's.
      disk: for tests.
    """
    path = pathlib.Path(folder)
    current = form.read_current(path)
    place = disk(path)
    try:
        current = form.read_current(path)
        if units not in (None, current.units):
            raise config.InputError(
                f"{path}: a log of {current.units} units, wanted units={units}; give "
                "the cache its old size, or remove the folder (it begins empty)"
            )
        log = Log(place, settings, current)
        state, end = _replay(path, log)
        made = _arena(path, state, pages)
        _sweep(place, current, log._chunks)
        name = form.chunk_name(current.generation, log._serial)
        if end < (path / name).stat().st_size:
            place.truncate(name, end)
        log.flush()  # the head of a first chunk, where that was cut
    except BaseException:
        place.close()
        raise
    made.log = log
    return made


def read(folder: str | os.PathLike) -> pages_lib.State:
    """What `recover` would give; for a log that nobody writes to, and left as it is."""
    path = pathlib.Path(folder)
    log = Log(None, Settings(), form.read_current(path))
    state, _ = _replay(path, log)
    _arena(path, state, None)
    return state


def _arena(
    path: pathlib.Path, state: pages_lib.State, settings: pages_lib.Settings | None
) -> pages_lib.Pages:
    settings = settings or pages_lib.Settings()
    try:
        settings = dataclasses.replace(settings, slab_units=state.slab_units)
        made = pages_lib.Pages(state.units, settings)
        made.restore(state)
    except config.InputError as error:
        raise form.damaged(path, 0, str(error)) from error
    return made


def _sweep(disk: Disk, current: form.Current | None, linked=()) -> None:
    """Remove what a kill left: a generation not in force, chunks that were dropped."""
    keep = {form.chunk_name(current.generation, x) for x in linked} if current else ()
    for path in sorted(disk.folder.iterdir()):
        if form.CHUNK_NAME.fullmatch(path.name) and path.name not in keep:
            disk.unlink(path.name)


def _replay(path: pathlib.Path, log: Log) -> tuple[pages_lib.State, int]:
    """Fill a log's volatile side from its files; the state, and at which byte the last
    chunk's whole entries end."""
    current = log.current
    found = form.serials(path, current.generation)
    chunks = []
    for serial in found:
        chunk = form.read_chunk(path, current, found, serial)
        if chunk is not None:
            chunks.append(chunk)
    reader = _Reader(path, log)
    if not chunks and found == [0] and not current.copied:
        log._begin(0)  # cut inside its head: nothing has happened yet
        return reader.state(), 0
    if not chunks:
        name = path / form.chunk_name(current.generation, 0)
        raise form.damaged(name, 0, "the chunk is missing")
    tail = chunks[-1]
    dropped = {payload for kind, payload in tail.entries if kind == form.DROP}
    before = {chunk.serial for chunk in chunks[:-1]} | dropped
    name = path / form.chunk_name(current.generation, tail.serial)
    if form.digest(before) != tail.linked:
        raise form.damaged(name, 16, "chunks it counts on are missing")
    count = tail.serial * log.num_slots + len(tail.entries)
    if count < current.copied:
        raise form.damaged(name, 0, f"{count} entries, wanted {current.copied} or more")
    for chunk in chunks:
        log._chunks[chunk.serial] = _Chunk()
    for serial in dropped:
        log._chunks.pop(serial, None)
    for chunk in chunks:
        if chunk.serial in log._chunks:
            reader.take(chunk, chunk is tail)
    log._serial, log._slot = tail.serial, reader.whole
    log._crc = tail.checks[reader.whole]
    return reader.state(), form.HEAD_BYTES + reader.whole * form.ENTRY_BYTES


class _Reader:
    """Entries in order -> live pages and classes of slabs; contradictions are told."""

    def __init__(self, path: pathlib.Path, log: Log):
        self.path, self.log = path, log
        self.places: dict[tuple[int, int], int] = {}
        self.slab_at: dict[int, tuple[int, int]] = {}
        self.whole = 0

    def take(self, chunk: form.Chunk, last: bool) -> None:
        """One linked chunk."""
        tag = None
        for slot, (kind, payload) in enumerate(chunk.entries):
            if tag is not None and kind != form.ALLOC:
                raise self.wrong(chunk.serial, slot, "a tag without its page")
            if kind == form.TAG:
                tag = payload
            elif kind == form.ALLOC:
                self.alloc(chunk.serial, slot, payload, tag)
                tag = None
            elif kind == form.FREE:
                self.free(chunk.serial, slot, payload)
            elif kind == form.SLAB:
                self.slab(chunk.serial, slot, payload)
        if tag is not None and not last:
            raise self.wrong(chunk.serial, len(chunk.entries), "a tag without its page")
        self.whole = len(chunk.entries) - (tag is not None)

    def alloc(self, serial: int, slot: int, payload: int, tag: int | None) -> None:
        log, unit, shift = self.log, payload & 0xFFFFFFFF, payload >> 32
        if unit in log._pages:
            raise self.wrong(serial, slot, f"unit {unit} is given out twice")
        if 1 << shift > log.current.slab_units:
            raise self.wrong(serial, slot, f"a page of 2^{shift} units")
        if tag is not None and not 0 < tag < pages_lib.MAX_TAG:
            raise self.wrong(serial, slot - 1, f"a tag of {tag}")
        live = _Live(serial, slot, pages_lib.Page(unit, 1 << shift, tag or 0))
        log._pages[unit] = live
        log._chunks[serial].live += live.entries
        self.places[serial, slot] = unit

    def free(self, serial: int, slot: int, payload: int) -> None:
        log = self.log
        other, at = payload >> form.SLOT_BITS, payload & (1 << form.SLOT_BITS) - 1
        if (other, at) >= (serial, slot):
            raise self.wrong(serial, slot, "a tombstone of what comes after it")
        if other not in log._chunks:
            return  # unlinked, and its pages with it
        unit = self.places.pop((other, at), None)
        if unit is None:
            raise self.wrong(serial, slot, f"no live page in slot {at} of {other:07x}")
        log._chunks[other].live -= log._pages.pop(unit).entries
        if other != serial:
            log._chunks[serial].live += 1
            log._chunks[other].tombs.append(serial)

    def slab(self, serial: int, slot: int, payload: int) -> None:
        log, index, shift = self.log, payload & 0xFFFFFFFF, payload >> 32
        slabs = log.current.units // log.current.slab_units
        if index >= slabs or 1 << shift > log.current.slab_units:
            raise self.wrong(serial, slot, f"slab {index} of class 2^{shift}")
        if index in log._slabs:
            log._chunks[log._slabs[index][0]].live -= 1
        log._chunks[serial].live += 1
        log._slabs[index] = (serial, 1 << shift)
        self.slab_at[index] = (serial, slot)

    def state(self) -> pages_lib.State:
        """What is left at the end."""
        current, log = self.log.current, self.log
        classes = [0] * (current.units // current.slab_units)
        for index, (_, size) in log._slabs.items():
            classes[index] = size
        for unit, live in log._pages.items():
            index = unit // current.slab_units
            at = (live.serial, live.slot)
            if unit >= current.units or index not in self.slab_at:
                raise self.wrong(*at, f"a page at unit {unit}, in a slab without class")
            if live.page.size != classes[index] and at > self.slab_at[index]:
                raise self.wrong(
                    *at, f"a page of {live.page.size} units in a slab of another class"
                )
        found = sorted(live.page for live in log._pages.values())
        return pages_lib.State(
            current.units, current.slab_units, tuple(classes), tuple(found)
        )

    def wrong(self, serial: int, slot: int, what: str) -> config.InputError:
        """The error at an entry."""
        path = self.path / form.chunk_name(self.log.current.generation, serial)
        byte = form.HEAD_BYTES + slot * form.ENTRY_BYTES
        return form.damaged(path, byte, what)
