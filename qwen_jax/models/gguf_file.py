# SPDX-License-Identifier: Apache-2.0
"""The container of a GGUF file: its facts and where its tensors lie, nothing believed.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
Deviations, all of them refusals: arrays inside arrays, big-endian files, models split
over several files. The reader of the `gguf` package maps the file and trusts its counts
and sizes, so it is not used here.

Formats: a header of key-value pairs and tensor entries, then tensor data. A key's value
is a number, a text, an array of numbers (NumPy) or `Texts`, which are read when asked
for. Shapes are given in NumPy's order; the file has them the other way round.
Invariants: arithmetic on counts, sizes and offsets is on Python's whole numbers, which
do not wrap; nothing is read or reserved before the bytes it needs are known to be
there; every tensor lies inside the file and no two share a byte. So memory stays under
twice the file plus what `MAX_ENTRIES` entries take.
Raises: config.InputError naming the file, what was wrong, and where.
"""

import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from qwen_jax import config

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 65_536  # pairs, and tensors: the largest published models have 2,000
MAX_TEXTS = 1 << 21  # of an array: the largest published vocabularies have 262,144
MAX_TEXT_BYTES = 1 << 20
MAX_DIMS = 4
TEXT, ARRAY = 8, 9
# Kinds of numbers: the number in the file -> NumPy's name.
NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"},
    **{6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}


@dataclasses.dataclass(frozen=True)
class Type:
    """How weights are stored: `block_bytes` bytes for every `block` weights."""

    name: str
    block: int
    block_bytes: int


# The types that `gguf_blocks` can read; the numbers are ggml's.
TYPES = {
    0: Type("F32", 1, 4),
    1: Type("F16", 1, 2),
    2: Type("Q4_0", 32, 18),
    3: Type("Q4_1", 32, 20),
    6: Type("Q5_0", 32, 22),
    7: Type("Q5_1", 32, 24),
    8: Type("Q8_0", 32, 34),
    12: Type("Q4_K", 256, 144),
    13: Type("Q5_K", 256, 176),
    14: Type("Q6_K", 256, 210),
    30: Type("BF16", 1, 2),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor's entry: its shape, type, first byte in the file, and bytes."""

    shape: tuple[int, ...]
    type: Type
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Texts:
    """An array of texts in the file, checked but not kept: iterating reads them."""

    path: pathlib.Path
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            reader = _Reader(file, self.path)
            file.seek(self.start)
            for _ in range(self.count):
                yield reader.text("an array's text")


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensor data."""

    path: pathlib.Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def fact(self, key: str, kind: type, default: Any = None) -> Any:
        """A fact of a kind (int, float, str, bool), or `default` where there is none.

        Raises:
          config.InputError: it is of another kind, or a float that is not finite.
        """
        if key not in self.facts:
            return default
        value = self.facts[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            shown = repr(value)[:80]
            raise config.InputError(
                f"{self.path}: {key} is {shown}; wanted a {_KINDS[kind]}"
            )
        return value


_KINDS = {int: "whole number", float: "finite number", str: "text", bool: "true/false"}


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path is to be read as a GGUF file: a file, or so named."""
    path = pathlib.Path(path)
    return path.is_file() or (path.suffix == ".gguf" and not path.is_dir())


def read(path: str | os.PathLike) -> Header:
    """The header of a GGUF file, checked against the file's size.

    Raises:
      config.InputError: no such file, no GGUF file, cut off, or not what it says.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise config.InputError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Reads a header in order; every count is compared with what the file can hold."""

    def __init__(self, file: BinaryIO, path: pathlib.Path):
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def wrong(self, what: str) -> config.InputError:
        return config.InputError(
            f"{self.path}: {what} (at byte {self.file.tell():,} of {self.size:,}); the "
            "file is damaged, or no GGUF file: copy it anew"
        )

    def take(self, count: int, what: str) -> bytes:
        """The next bytes of the file."""
        left = self.size - self.file.tell()
        if count > left:
            raise self.wrong(f"{what} needs {count:,} bytes and {left:,} are left")
        found = self.file.read(count)
        if len(found) != count:
            raise self.wrong(f"{what}: the file became shorter while it was read")
        return found

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def count(self, what: str, most: int, each: int) -> int:
        """A count of things of at least `each` bytes."""
        count = self.number("Q", f"the number of {what}")
        if count > most:
            raise self.wrong(f"{count:,} {what}; at most {most:,} are read")
        left = self.size - self.file.tell()
        if count * each > left:
            raise self.wrong(f"{count:,} {what} do not fit in the {left:,} bytes left")
        return count

    def text(self, what: str, most: int = MAX_TEXT_BYTES) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > most:
            raise self.wrong(f"{what} has {length:,} bytes; at most {most:,} are read")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8 text") from error

    def header(self) -> Header:
        magic = self.file.read(4)
        if magic != MAGIC:
            raise config.InputError(
                f"{self.path} begins with {magic!r} and not with {MAGIC!r}: it is no "
                "GGUF file; give one, or a Hugging Face model folder"
            )
        version = self.number("I", "the version")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise self.wrong(f"GGUF version {version}; versions {known} are read")
        # A tensor's entry: name (length), number of dims, a dim, type, offset.
        num_tensors = self.count("tensors", MAX_ENTRIES, 8 + 4 + 8 + 4 + 8)
        num_facts = self.count("key-value pairs", MAX_ENTRIES, 8 + 4 + 1)
        facts = {}
        for _ in range(num_facts):
            key = self.text("a key", most=65_535)
            if key in facts:
                raise self.wrong(f"the key {key[:80]!r} comes twice")
            facts[key] = self.value(f"the value of {key[:80]!r}")
        entries = {}
        for _ in range(num_tensors):
            name = self.text("a tensor's name", most=1024)
            if name in entries:
                raise self.wrong(f"the tensor {name[:80]!r} comes twice")
            entries[name] = self.entry(name)
        return Header(self.path, facts, self.placed(facts, entries))

    def value(self, what: str) -> Any:
        kind = self.number("I", f"the kind of {what}")
        if kind == TEXT:
            return self.text(what)
        if kind in NUMBERS:
            return np.frombuffer(self.take(*_one(kind, what)), NUMBERS[kind])[0].item()
        if kind != ARRAY:
            raise self.wrong(f"{what} is of the unknown kind {kind}")
        kind = self.number("I", f"the kind of {what}")
        if kind in NUMBERS:
            each = np.dtype(NUMBERS[kind]).itemsize
            count = self.count(f"numbers in {what}", self.size, each)
            return np.frombuffer(self.take(count * each, what), NUMBERS[kind])
        if kind != TEXT:
            raise self.wrong(
                f"{what} is an array of the kind {kind}, which is not read"
            )
        count = self.count(f"texts in {what}", MAX_TEXTS, 8)
        start = self.file.tell()
        for _ in range(count):
            self.text(f"a text of {what}")
        return Texts(self.path, start, count)

    def entry(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """(shape in NumPy's order, type, offset into the data) of a tensor."""
        dims = self.number("I", f"the number of dims of {name!r}")
        if not 1 <= dims <= MAX_DIMS:
            raise self.wrong(f"{name!r} has {dims} dims; wanted 1 to {MAX_DIMS}")
        shape = struct.unpack(f"<{dims}Q", self.take(8 * dims, f"dims of {name!r}"))
        if 0 in shape:
            raise self.wrong(f"{name!r} has the dims {shape}; wanted none to be 0")
        kind, offset = struct.unpack("<IQ", self.take(12, f"the place of {name!r}"))
        if kind not in TYPES:
            known = ", ".join(t.name for t in TYPES.values())
            raise config.InputError(
                f"{self.path}: tensor {name!r} is of ggml's type {kind}, which is not "
                f"read; convert the model to one of {known}"
            )
        return tuple(reversed(shape)), kind, offset

    def placed(self, facts: dict[str, Any], entries: dict[str, Any]) -> dict:
        """The tensors with their places in the file, which must be their own."""
        align = facts.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise self.wrong(f"general.alignment is {align!r}; wanted a power of two")
        first = -(-self.file.tell() // align) * align
        tensors = {}
        for name, (shape, kind, offset) in entries.items():
            stored = TYPES[kind]
            if shape[-1] % stored.block:
                raise self.wrong(
                    f"{name!r} has rows of {shape[-1]:,} weights, which is no multiple "
                    f"of the {stored.block} of {stored.name}"
                )
            if offset % align:
                raise self.wrong(f"{name!r} is at {offset:,}, off the grid of {align}")
            nbytes = math.prod(shape) // stored.block * stored.block_bytes
            if first + offset + nbytes > self.size:
                raise self.wrong(
                    f"{name!r} needs the bytes {first + offset:,} to "
                    f"{first + offset + nbytes:,}, beyond the end of the file"
                )
            tensors[name] = Tensor(shape, stored, first + offset, nbytes)
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise self.wrong(f"{name!r} shares bytes with another tensor")
            end = tensor.start + tensor.nbytes
        return tensors


def _one(kind: int, what: str) -> tuple[int, str]:
    return np.dtype(NUMBERS[kind]).itemsize, what
