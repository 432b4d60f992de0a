# SPDX-License-Identifier: Apache-2.0
"""The bytes of a log of pages: entries, chunks, the record that names the log in force.

Source: NVAlloc (ASPLOS'22), log-structured bookkeeping: 8-byte entries in chunks, a
tombstone that points at the entry it ends. Deviations are told in `page_log.py`.

Formats, little-endian. An entry is 6 bytes, kind | payload << 3, and 2 bytes of check:
the low half of a CRC-32 that runs from the chunk's head through all entries, so that a
damaged entry spoils the checks of those after it, too. Kinds and their payloads:
    ALLOC  unit | log2(size) << 32     a page was given out
    FREE   slot | serial << 17         the ALLOC in that slot of that chunk is over
    TAG    the owner's tag             of the page whose ALLOC comes next
    SLAB   index | log2(size) << 32    a slab serves this class from now on
    DROP   serial                      that chunk is unlinked
    PAD    0                           nothing (a TAG and its ALLOC share a chunk)
A chunk is a file `GENERATION-SERIAL.log`: a head of 32 bytes, then entries; all but the
last are full. The head tells how many chunks were linked when it was made and a CRC-32
of their serials, so that one that is gone without a DROP is noticed. `current` (28
bytes) names the generation in force and how many entries it began with.
Raises: config.InputError naming file and byte for what no writer has written. What a
kill leaves behind is none of that: a last chunk may end anywhere, or in zeros.
"""

import dataclasses
import pathlib
import re
import struct
import zlib
from collections.abc import Iterable

from qwen_jax import config

ALLOC, FREE, TAG, SLAB, DROP, PAD = range(1, 7)
ENTRY_BYTES = 8
SLOT_BITS = 17
MAX_SERIAL = 2**28
CURRENT = "current"
CHUNK_NAME = re.compile(r"([0-9a-f]{8})-([0-9a-f]{7})\.log")
VERSION = 1

_HEAD = struct.Struct("<4sHHIIIIII")
_CURRENT = struct.Struct("<4sHHIIIII")
HEAD_BYTES = _HEAD.size
MIN_CHUNK_BYTES = HEAD_BYTES + 4 * ENTRY_BYTES
MAX_CHUNK_BYTES = ENTRY_BYTES << SLOT_BITS


@dataclasses.dataclass(frozen=True)
class Current:
    """The log in force: the arena's shape, its generation, entries it began with."""

    units: int
    slab_units: int
    chunk_bytes: int
    generation: int = 0
    copied: int = 0

    def pack(self) -> bytes:
        """The bytes of the file `current`."""
        body = _CURRENT.pack(
            b"QPGS",
            VERSION,
            self.slab_units.bit_length(),
            self.units - 1,  # up to 2**32
            self.chunk_bytes,
            self.generation,
            self.copied,
            0,
        )[:-4]
        return body + zlib.crc32(body).to_bytes(4, "little")


def read_current(folder: pathlib.Path) -> Current:
    """The file `current` of a log's folder."""
    path = folder / CURRENT
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise config.InputError(
            f"{folder}: no log of pages is here (no file {CURRENT!r}); make one with "
            "page_log.create"
        ) from error
    what = None
    if len(data) != _CURRENT.size:
        what = f"{len(data)} bytes, wanted {_CURRENT.size}"
    elif zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        what = "its check does not fit"
    elif data[:4] != b"QPGS":
        what = "it does not begin with QPGS"
    elif int.from_bytes(data[4:6], "little") != VERSION:
        what = f"version {int.from_bytes(data[4:6], 'little')}, wanted {VERSION}"
    if what:
        raise damaged(path, 0, what)
    _, _, slab, units, chunk, generation, copied, _ = _CURRENT.unpack(data)
    if not 0 < slab <= 16 or not MIN_CHUNK_BYTES <= chunk <= MAX_CHUNK_BYTES:
        raise damaged(path, 0, f"slabs of 2^{slab - 1} units, chunks of {chunk} bytes")
    return Current(units + 1, 1 << (slab - 1), chunk, generation, copied)


def damaged(path: pathlib.Path, byte: int, what: str) -> config.InputError:
    """The error for a log that cannot be believed."""
    return config.InputError(
        f"{path}, byte {byte}: {what}; the log is damaged and tells no heap: remove "
        "its folder (the cache begins empty)"
    )


def chunk_name(generation: int, serial: int) -> str:
    """The file name of a chunk."""
    return f"{generation:08x}-{serial:07x}.log"


def serials(folder: pathlib.Path, generation: int) -> list[int]:
    """The chunks of a generation that are there, in order."""
    names = (CHUNK_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(m[2], 16) for m in names if m and int(m[1], 16) == generation)


def digest(linked: Iterable[int]) -> tuple[int, int]:
    """How many chunks, and a CRC-32 of their serials."""
    numbers = sorted(linked)
    return len(numbers), zlib.crc32(struct.pack(f"<{len(numbers)}I", *numbers))


def head(generation: int, serial: int, linked: Iterable[int]) -> bytes:
    """The head of a chunk that is made while these others are linked."""
    count, crc = digest(linked)
    body = _HEAD.pack(b"QPGC", VERSION, 0, generation, serial, count, crc, 0, 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def entry(kind: int, payload: int, crc: int) -> tuple[bytes, int]:
    """The 8 bytes of an entry and the check's state after it."""
    six = (kind | payload << 3).to_bytes(6, "little")
    crc = zlib.crc32(six, crc)
    return six + (crc & 0xFFFF).to_bytes(2, "little"), crc


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk as it was read: (kind, payload) of each whole entry; `checks[i]` is the
    check's state before entry i, so its last one goes on where the entries end."""

    serial: int
    linked: tuple[int, int]
    entries: tuple[tuple[int, int], ...]
    checks: tuple[int, ...]


def read_chunk(
    folder: pathlib.Path, current: Current, found: list[int], serial: int
) -> Chunk | None:
    """A chunk of those found; None for a last one whose head was never finished."""
    last = serial == found[-1]
    path = folder / chunk_name(current.generation, serial)
    data = path.read_bytes()
    if len(data) < HEAD_BYTES or (last and not any(data)):
        if not last:
            raise damaged(path, len(data), "it ends in its head, and others follow")
        wanted = head(current.generation, serial, found[:-1])
        if not wanted.startswith(data.rstrip(b"\0")):
            raise damaged(path, 0, "the head is another chunk's")
        return None
    if len(data) > current.chunk_bytes or (
        not last and len(data) != current.chunk_bytes
    ):
        raise damaged(path, len(data), f"wanted {current.chunk_bytes} bytes")
    count_crc = struct.unpack_from("<II", data, 16)
    if data[:16] != head(current.generation, serial, ())[:16]:
        raise damaged(path, 0, "the head is another chunk's")
    if zlib.crc32(data[: HEAD_BYTES - 4]) != struct.unpack_from("<I", data, 28)[0]:
        raise damaged(path, 0, "the head's check does not fit")
    crc = zlib.crc32(data[:HEAD_BYTES])
    found, checks = [], [crc]
    for at in range(HEAD_BYTES, len(data) - ENTRY_BYTES + 1, ENTRY_BYTES):
        six = data[at : at + 6]
        crc = zlib.crc32(six, crc)
        if (crc & 0xFFFF).to_bytes(2, "little") != data[at + 6 : at + 8]:
            if last and not any(data[at:]):
                break  # room that was made and never written to
            raise damaged(path, at, "the entry's check does not fit")
        value = int.from_bytes(six, "little")
        if not ALLOC <= value & 7 <= PAD:
            raise damaged(path, at, f"an entry of kind {value & 7}")
        found.append((value & 7, value >> 3))
        checks.append(crc)
    return Chunk(serial, count_crc, tuple(found), tuple(checks))
