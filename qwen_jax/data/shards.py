# SPDX-License-Identifier: Apache-2.0
"""Groups of numbered records, read many at a time: texts, spans of a file, ArrayRecord.

  Texts         files of text; one longer than `document_bytes` is several records
  Spans         a file with an index (index.py): jsonl read in place (pread, or byte
                ranges of a store), compressed jsonl and text, a column of parquet
  ArrayRecords  ArrayRecord files; write them with group_size:1, as random access to
                groups of 1000 is about 30 times slower
Every group has num_records, num_bytes, `lines` (records are JSON), entries (what the
manifest lists), where(number) and read(numbers, max_bytes).

Formats: a record is bytes, or Bad(reason, file, offset); the offset is in the
decompressed file, the record's number in ArrayRecord.
Invariants: every read of a local file checks that it is the one that was found; reads
are stateless, so threads share a group and a worker process gets it by pickle.
Raises: InputError naming a file that changed or is gone.
"""

import itertools
import json
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.data import files, index

# Many small reads of a store at a time; its latency is what they wait for.
_REMOTE_READS = 16
Entry = tuple[str, int, str, int]


class Bad(NamedTuple):
    """A record that cannot be used, and where it stands."""

    reason: str
    file: str
    offset: int


class Spans:
    """Records of one file that lie between the offsets of its index entry."""

    def __init__(self, file: files.File, folder: str):
        path = pathlib.Path(folder)
        facts = json.loads((path / "index.json").read_text())
        self.file, self.lines = file, facts["lines"]
        self._folder, self._gap, self._digest = folder, facts["gap"], facts["digest"]
        self._bad = {int(number): reason for number, reason in facts["bad"].items()}
        self._open_tail = facts["open_tail"]
        self._offsets = np.load(path / "offsets.npy", mmap_mode="r")
        self.num_records = len(self._offsets) - 1
        self.num_bytes = int(self._offsets[-1])
        copy = path / "copy"
        self._data = files.local_file(str(copy), "copy") if copy.exists() else file

    def __reduce__(self):
        # A worker process maps the index anew instead of being sent gigabytes.
        return Spans, (self.file, self._folder)

    @property
    def entries(self) -> list[Entry]:
        """(name, size, digest, records) of the file."""
        return [(self.file.name, self.file.size, self._digest, self.num_records)]

    def where(self, number: int) -> tuple[str, int]:
        """File and offset of a record."""
        return self.file.path, int(self._offsets[number])

    def cut_short(self, number: int) -> bool:
        """Whether a record is a last line without its line end."""
        return self._open_tail and number == self.num_records - 1

    def read(self, numbers: Sequence[int], max_bytes: int) -> list[bytes | Bad]:
        """Records by number."""
        out: list[bytes | Bad] = [b""] * len(numbers)
        places, spans = [], []
        for place, number in enumerate(numbers):
            start = int(self._offsets[number])
            stop = max(start, int(self._offsets[number + 1]) - self._gap)
            reason = self._bad.get(number, "")
            if reason or stop - start > max_bytes:
                out[place] = Bad(reason or "too_large", *self.where(number))
            elif stop > start:
                places.append(place)
                spans.append((start, stop))
        if self._data is not self.file and not self.file.root:
            files.check(self.file)
        if spans:
            parts = files.read_spans(self._data, spans)
            for place, part in zip(places, parts, strict=True):
                out[place] = part
        return out


class Texts:
    """Files of plain text."""

    lines = False

    def __init__(self, found: Sequence[files.File], document_bytes: int):
        self.files = list(found)
        self._remote = any(file.root for file in self.files)
        spans = []
        for number, file in enumerate(self.files):
            cuts = index.text_cuts(file, document_bytes)
            spans += [(number, *span) for span in itertools.pairwise(cuts)]
        self._spans = np.array(spans, np.uint64).reshape(-1, 3)
        self._digests = _each(files.digest, self.files, self._remote)
        self.num_records = len(spans)
        self.num_bytes = sum(file.size for file in self.files)

    @property
    def entries(self) -> list[Entry]:
        """(name, size, digest, records) of the files."""
        numbers = self._spans[:, 0].astype(np.int64)
        counts = np.bincount(numbers, minlength=len(self.files)).tolist()
        rows = zip(self.files, self._digests, counts, strict=True)
        return [(f.name, f.size, digest, count) for f, digest, count in rows]

    def where(self, number: int) -> tuple[str, int]:
        """File and offset of a record."""
        file, start, _ = self._spans[number].tolist()
        return self.files[file].path, start

    def cut_short(self, number: int) -> bool:
        """A text has no last line that it needs."""
        return False

    def read(self, numbers: Sequence[int], max_bytes: int) -> list[bytes | Bad]:
        """Records by number."""

        def one(number: int) -> bytes | Bad:
            file, start, stop = self._spans[number].tolist()
            if stop - start > max_bytes:
                return Bad("too_large", *self.where(number))
            return files.read_spans(self.files[file], [(start, stop)])[0]

        return _each(one, numbers, self._remote)


class ArrayRecords:
    """Records of one ArrayRecord file; `path` is a local copy of a remote one."""

    def __init__(self, file: files.File, path: str, lines: bool):
        self.file, self.lines, self._path = file, lines, path
        self._lock = threading.Lock()  # the reader is not safe for threads
        self._digest = files.digest(file)
        self._reader = self._open()
        self._whole = self._reader.ok()
        # A file without its footer is one bad record: how many it had is not known.
        self.num_records = self._reader.num_records() if self._whole else 1
        self.num_bytes = file.size

    def __reduce__(self):
        return ArrayRecords, (self.file, self._path, self.lines)

    def _open(self) -> Any:
        from array_record.python import array_record_module

        return array_record_module.ArrayRecordReader(self._path)

    @property
    def entries(self) -> list[Entry]:
        """(name, size, digest, records) of the file."""
        return [(self.file.name, self.file.size, self._digest, self.num_records)]

    def where(self, number: int) -> tuple[str, int]:
        """File and number of a record."""
        return self.file.path, number

    def cut_short(self, number: int) -> bool:
        """A record is whole or corrupt."""
        return False

    def read(self, numbers: Sequence[int], max_bytes: int) -> list[bytes | Bad]:
        """Records by number."""
        if not self.file.root:
            files.check(self.file)
        if not self._whole:
            return [Bad("truncated", *self.where(number)) for number in numbers]
        with self._lock:
            try:
                found = self._reader.read(list(numbers))
            except RuntimeError:  # one of them is corrupt, and the reader stops at it
                self._reader = self._open()
                found = [self._read_alone(number) for number in numbers]
        return [
            Bad("too_large", *self.where(number))
            if isinstance(record, bytes) and len(record) > max_bytes
            else record
            for number, record in zip(numbers, found, strict=True)
        ]

    def _read_alone(self, number: int) -> bytes | Bad:
        try:
            return self._reader.read([number])[0]
        except RuntimeError:
            return Bad("corrupt", *self.where(number))


Group = Spans | Texts | ArrayRecords


def _each(
    function: Callable[[Any], Any], items: Iterable[Any], remote: bool
) -> list[Any]:
    if not remote:
        return [function(item) for item in items]
    with futures.ThreadPoolExecutor(_REMOTE_READS) as pool:
        return list(pool.map(function, items))
