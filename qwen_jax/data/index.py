# SPDX-License-Identifier: Apache-2.0
"""Where the records of a file lie: cuts of texts, line starts, decompressed copies.

An index entry is a folder of the cache, made once for (path, size, version):
  offsets.npy  uint64 [records + 1]; record i is [offsets[i], offsets[i + 1] - gap)
  index.json   digest of the file; gap; lines (records are JSON lines); bad ({record:
               reason}); open_tail (the last line has no line end)
  copy         the records of a compressed or parquet file, to read them in any order
Deviation: parquet and compressed files need disk for that copy, because a global
shuffle reads them in any order (a row group is read thousands of times otherwise).

Invariants: a stream that breaks off adds one bad record at its end ("truncated" or
"corrupt"), so that the loss is counted, and nothing of a corrupt part is used; the cuts
of a text fall on line ends, or between two letters where a line is longer than
`document_bytes`.
Raises: InputError for a missing extra or column, or a file that changed while read.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from qwen_jax import config
from qwen_jax.data import files

# Part of every cache key: raise it when the entries change their form.
_FORM = 1


def text_cuts(file: files.File, document_bytes: int) -> list[int]:
    """Where the records of a text begin, and its end; 0 bytes = never cut."""
    cuts = [0]
    while document_bytes and file.size - cuts[-1] > document_bytes:
        start = cuts[-1] + document_bytes // 2
        part = files.read_spans(file, [(start, cuts[-1] + document_bytes)])[0]
        paragraph = part.rfind(b"\n\n")
        line = part.rfind(b"\n")
        if paragraph >= 0:
            at = paragraph + 2
        elif line >= 0:
            at = line + 1
        else:  # before the last letter: it may go on beyond this part
            at = len(part) - 1
            while at > 1 and part[at] & 0xC0 == 0x80:
                at -= 1
        cuts.append(start + at)
    return [*cuts, file.size]


def lines(file: files.File, cache: files.Cache) -> pathlib.Path:
    """The entry of a .jsonl, .jsonl.gz or .jsonl.zst file."""

    def build(folder: pathlib.Path) -> None:
        stream = files.unpacked(file.name, files.blocks(file))
        if file.name.endswith((".gz", ".zst")):
            with open(folder / "copy", "wb") as copy:
                offsets, reason, tail = scan_lines(stream, copy)
        else:
            offsets, reason, tail = scan_lines(stream)
        bad = {str(len(offsets) - 2): reason} if reason else {}
        _write(folder, offsets, file, gap=1, lines=True, bad=bad, open_tail=tail)

    return cache.entry(_facts("lines", file), build)


def scan_lines(
    stream: Iterator[bytes], copy: BinaryIO | None = None
) -> tuple[np.ndarray, str, bool]:
    """(offsets, what broke the stream or "", whether the last line has no end)."""
    ends, size, reason = [np.zeros(1, np.uint64)], 0, ""
    try:
        for block in stream:
            marks = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
            ends.append((marks + (size + 1)).astype(np.uint64))
            size += len(block)
            if copy:
                copy.write(block)
    except files.Broken as error:
        reason, size = error.reason, error.sound
        if copy:
            copy.truncate(size)
    offsets = np.concatenate(ends)
    offsets = offsets[offsets <= size]
    open_tail = size > int(offsets[-1])
    if open_tail or reason:
        offsets = np.append(offsets, np.uint64(size + 1))
    return offsets, reason, open_tail


def packed_text(
    file: files.File, document_bytes: int, cache: files.Cache
) -> pathlib.Path:
    """The entry of a .gz or .zst file of plain text."""

    def build(folder: pathlib.Path) -> None:
        reason, path = "", folder / "copy"
        with open(path, "wb") as copy:
            try:
                copy.writelines(files.unpacked(file.name, files.blocks(file)))
            except files.Broken as error:
                reason = error.reason
                copy.truncate(error.sound)
        cuts = text_cuts(files.local_file(str(path), "copy"), document_bytes)
        bad = {str(len(cuts) - 1): reason} if reason else {}
        offsets = np.array([*cuts, cuts[-1]] if reason else cuts, np.uint64)
        _write(folder, offsets, file, gap=0, bad=bad)

    return cache.entry([*_facts("text", file), document_bytes], build)


def parquet(file: files.File, field: str, cache: files.Cache) -> pathlib.Path:
    """The entry of one text column of a parquet file."""
    try:
        import pyarrow
    except ImportError:
        raise config.InputError(
            f"{file.path!r} is parquet, which needs pyarrow: "
            "pip install 'qwen_jax[parquet]'"
        ) from None

    def build(folder: pathlib.Path) -> None:
        ends, bad, reason = [0], {}, ""
        with open(folder / "copy", "wb") as copy:
            try:
                for text in _column(file, field):
                    if text is None:
                        bad[str(len(ends) - 1)] = "missing_field"
                    ends.append(ends[-1] + copy.write(text or b""))
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise  # the disk's trouble, not the file's
                reason = "corrupt" if len(ends) > 1 else "truncated"
        if reason:
            bad[str(len(ends) - 1)] = reason
            ends.append(ends[-1])
        _write(folder, np.array(ends, np.uint64), file, gap=0, bad=bad)

    return cache.entry([*_facts("parquet", file), field], build)


def _column(file: files.File, field: str) -> Iterator[bytes | None]:
    """The values of a text column as UTF-8."""
    import pyarrow
    from pyarrow import parquet as reader

    with files.open_binary(file) as handle, reader.ParquetFile(handle) as table:
        schema = table.schema_arrow
        if field not in schema.names:
            raise config.InputError(
                f"{file.path!r} has no column {field!r}"
                f"{config.nearest(field, schema.names)}; set the source's text_field"
            )
        kind = schema.field(field).type
        inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if str(inner) not in ("string", "large_string", "binary", "large_binary"):
            raise config.InputError(
                f"{file.path!r}: column {field!r} holds {kind}; wanted text (string)"
            )
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            yield from batch.column(0).cast(inner).cast("large_binary").to_pylist()


def local_copy(file: files.File, cache: files.Cache) -> str:
    """Path of a copy of a remote file."""

    def build(folder: pathlib.Path) -> None:
        with open(folder / "copy", "wb") as copy:
            copy.writelines(files.blocks(file))

    return str(cache.entry(_facts("copy", file), build) / "copy")


def _facts(kind: str, file: files.File) -> list[Any]:
    where = file.root or str(pathlib.Path(file.path).resolve())
    return [_FORM, kind, where, file.name, file.size, file.version]


def _write(
    folder: pathlib.Path, offsets: np.ndarray, file: files.File, **facts: Any
) -> None:
    defaults = {"bad": {}, "lines": False, "open_tail": False}
    index = {**defaults, "digest": files.digest(file), **facts}
    np.save(folder / "offsets.npy", offsets)
    (folder / "index.json").write_text(json.dumps(index))
