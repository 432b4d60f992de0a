# SPDX-License-Identifier: Apache-2.0
"""Files -> documents by number, with a manifest of what was found and a list of what
is broken.

A `Source` is a RandomAccessDataSource of Grain over one configured path: len(source)
records, source[i] (or source.read([i, ...]), which opens each file once) gives a
Document or Bad. The format of each file is told by its name (.jsonl, .ndjson, these
with .gz or .zst, .parquet, .arrayrecord; anything else is text, one file one document)
unless the config says it.

Formats: jsonl and ArrayRecord hold JSON objects with the text under `text_field`
(ArrayRecord with text_field="": the record is the text), or ids under `tokens_field`
with an optional "prompt_tokens" (leading ids that are no targets). Text is UTF-8.
Invariants: numbers, order and manifest depend on names and contents alone, not on where
the corpus stands or when it was copied; a document is held out by the hash of its own
content, so equal documents stay together wherever they come from.
Reasons of Bad: bad_utf8, empty, empty_file (nothing is lost: it is listed and counted,
but not held against max_bad_share), too_large, bad_json, missing_field, not_text,
binary (a NUL in a text file), truncated, corrupt, not_tokens.
Raises: InputError for a missing path, an empty corpus, two sources of one name, a file
that changed or is gone.
"""

import copy
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import files, index, shards

FORMATS = ("auto", "text", "jsonl", "parquet", "arrayrecord")
# Formats whose files a folder is searched for when the config names the format.
_SUFFIXES = {
    "jsonl": tuple(
        f".{name}{end}" for name in ("jsonl", "ndjson") for end in ("", ".gz", ".zst")
    ),
    "parquet": (".parquet",),
    "arrayrecord": (".arrayrecord", ".array_record"),
}
Bad = shards.Bad


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where documents come from.

    Attributes:
      path: folder, file, glob or fsspec URL of these.
      name: in mixtures, counters and messages; "" = the last part of the path.
      weight: share of the text in the mixture (see mixture.py).
      format: one of FORMATS; "auto" goes by each file's name.
      text_field: the field or column of the text.
      tokens_field: the field of ready ids; "" = there is text to encode.
      include, exclude: globs over the relative path or the name; the default leaves out
        hidden files and those whose name says they hold no text.
      document_bytes: a text file longer than this is cut at line ends into documents
        of about this size (each is held out or not by itself); 0 = never.
    """

    path: str
    name: str = ""
    weight: float = 1.0
    format: str = "auto"
    text_field: str = "text"
    tokens_field: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = files.DEFAULT_EXCLUDE
    document_bytes: int = 65_536

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            hint = config.nearest(self.format, FORMATS)
            raise config.InputError(f"source format {self.format!r} is unknown{hint}")
        if self.document_bytes and self.document_bytes < 1024:
            raise config.InputError(
                f"document_bytes={self.document_bytes}: wanted 0 (never cut) or at "
                "least 1024"
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read and how to lay it out.

    Attributes:
      sources: where documents come from, with weights.
      stages: (until_step, {source name: weight}) in rising order; the last holds on. A
        resumed run may change those that have not begun.
      weight_by: "bytes" (weights are shares of the text) or "documents".
      seq_tokens: width of a row.
      tokenizer: tokenizer.json, its folder or a .tiktoken file; "" = train a BPE of
        vocab_size ids on the corpus and keep it in the run folder.
      holdout_share: documents (by hash of their content) never trained on; of these
        `heldout` takes up to holdout_max_bytes.
      streams: lanes; the most processes that share the reading without reading twice.
      window_docs, window_bytes: documents packed together (and read again on resume); 0
        bytes = 256 for each token of a row, at least 256 KiB: about 64 rows, so that
        under 1 % of the places stay empty.
      num_workers: reading processes, 0 = threads of this one; read_threads: of each.
      max_bad_share: more broken records than this share stop the run.
      max_record_bytes: a longer record is broken.
      cache_dir: for indices and decompressed copies; "" = ~/.cache/qwen_jax/data.
    """

    sources: tuple[SourceConfig, ...] = ()
    stages: tuple[tuple[int, dict[str, float]], ...] = ()
    weight_by: str = "bytes"
    seq_tokens: int = 512
    tokenizer: str = ""
    vocab_size: int = 8192
    holdout_share: float = 0.01
    holdout_max_bytes: int = 4_000_000
    streams: int = 8
    window_docs: int = 512
    window_bytes: int = 0
    num_workers: int = 0
    read_threads: int = 2
    max_bad_share: float = 0.01
    max_record_bytes: int = 50_000_000
    cache_dir: str = ""

    def __post_init__(self) -> None:
        positive = ("seq_tokens", "streams", "window_docs", "max_record_bytes")
        for name in positive:
            if getattr(self, name) < 1:
                raise config.InputError(
                    f"data.{name}={getattr(self, name)}: wanted at least 1"
                )
        for name in ("num_workers", "read_threads", "window_bytes"):
            if getattr(self, name) < 0:
                raise config.InputError(
                    f"data.{name}={getattr(self, name)}: wanted 0 or more"
                )
        for name in ("holdout_share", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise config.InputError(
                    f"data.{name}={getattr(self, name)}: wanted a share from 0 to 1"
                )


@dataclasses.dataclass(slots=True)
class Document:
    """A document: its text or its ids, size in UTF-8 bytes and hash of its content."""

    text: str
    num_bytes: int
    content: int
    tokens: np.ndarray | None = None
    prompt_tokens: int = 0

    def held_out(self, share: float) -> bool:
        """Whether it is among the share that training never sees."""
        return self.content < share * 2.0**64


class Source:
    """The documents under one path, by number."""

    def __init__(
        self,
        facts: SourceConfig,
        name: str,
        cache: files.Cache,
        max_record_bytes: int,
    ):
        self.config, self.name = facts, name
        self._max_bytes = max_record_bytes
        include = facts.include
        if facts.format in _SUFFIXES and not include:
            include = tuple(f"*{suffix}" for suffix in _SUFFIXES[facts.format])
        found, self.num_excluded = files.find(facts.path, include, facts.exclude)
        if not found:
            raise config.InputError(
                f"no file to read under {facts.path!r} ({self.num_excluded} left out "
                f"by format, include or exclude); wanted at least one document"
            )
        self.groups = _open(found, facts, cache)
        self._ends = np.cumsum([group.num_records for group in self.groups])
        self.num_bytes = sum(group.num_bytes for group in self.groups)
        if not len(self):
            raise config.InputError(
                f"the {len(found)} files under {facts.path!r} hold no record"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Document | Bad:
        return self.read([int(number)])[0]

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {len(self)} records)"

    @property
    def entries(self) -> list[shards.Entry]:
        """(name, size, digest, records) of every file."""
        return [entry for group in self.groups for entry in group.entries]

    def read(self, numbers: Sequence[int]) -> list[Document | Bad]:
        """Documents by number; each file is opened once."""
        out: list[Any] = [None] * len(numbers)
        owners = np.searchsorted(self._ends, np.asarray(numbers), side="right").tolist()
        by_group: dict[int, list[int]] = {}
        for place, owner in enumerate(owners):
            by_group.setdefault(owner, []).append(place)
        for owner, places in by_group.items():
            group = self.groups[owner]
            first = int(self._ends[owner]) - group.num_records
            inner = [int(numbers[place]) - first for place in places]
            read = group.read(inner, self._max_bytes)
            for place, number, record in zip(places, inner, read, strict=True):
                if isinstance(record, bytes):
                    record = self._document(record, group, number)
                out[place] = record
        return out

    def _document(
        self, data: bytes, group: shards.Group, number: int
    ) -> Document | Bad:
        """A record's bytes as a document, or what is wrong with them."""
        file, offset = group.where(number)
        if isinstance(group, shards.Texts) and b"\0" in data:
            return Bad("binary", file, offset + data.index(b"\0"))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            within = 0 if group.lines else error.start
            return Bad("bad_utf8", file, offset + within)
        if not text or text.isspace():
            texts = isinstance(group, shards.Texts)
            return Bad("empty_file" if texts else "empty", file, offset)
        if group.lines:
            found = self._field(text)
            if found == "bad_json" and group.cut_short(number):
                found = "truncated"
            return found if isinstance(found, Document) else Bad(found, file, offset)
        if text[0] == "\ufeff":  # a byte order mark is no text
            text, data = text[1:], data[3:]
        return Document(text, len(data), _content(data))

    def _field(self, line: str) -> Document | str:
        """The document of a JSON record, or the reason why there is none."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return "bad_json"
        field = self.config.tokens_field or self.config.text_field
        if not isinstance(record, dict) or field not in record:
            return "missing_field"
        if self.config.tokens_field:
            return _ready_ids(record[field], record.get("prompt_tokens", 0))
        text = record[field]
        if not isinstance(text, str):
            return "not_text"
        if not text or text.isspace():
            return "empty"
        try:
            data = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, written as an escape
            return "bad_utf8"
        return Document(text, len(data), _content(data))


def _ready_ids(ids: Any, prompt_tokens: Any) -> Document | str:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        return "not_tokens"
    if not ids:
        return "empty"
    if type(prompt_tokens) is not int or not 0 <= prompt_tokens < len(ids):
        return "not_tokens"
    if not -(2**31) <= min(ids) <= max(ids) < 2**31:
        return "not_tokens"
    tokens = np.array(ids, np.int32)
    return Document("", 0, _content(tokens.tobytes()), tokens, prompt_tokens)


def _content(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _format_of(name: str) -> str:
    """The format that a file's name tells: text where it tells none."""
    kinds = (kind for kind, ends in _SUFFIXES.items() if name.lower().endswith(ends))
    return next(kinds, "text")


def _open(
    found: Sequence[files.File], facts: SourceConfig, cache: files.Cache
) -> list[shards.Group]:
    """Files as groups of records: one for all plain texts, then one for each file."""
    groups: list[shards.Group] = []
    texts = []
    for file in found:
        kind = facts.format if facts.format != "auto" else _format_of(file.name)
        if kind == "jsonl":
            groups.append(shards.Spans(file, str(index.lines(file, cache))))
        elif kind == "parquet":
            entry = index.parquet(file, facts.text_field, cache)
            groups.append(shards.Spans(file, str(entry)))
        elif kind == "arrayrecord":
            path = index.local_copy(file, cache) if file.root else file.path
            fields = bool(facts.text_field or facts.tokens_field)
            groups.append(shards.ArrayRecords(file, path, fields))
        elif file.name.endswith((".gz", ".zst")):
            entry = index.packed_text(file, facts.document_bytes, cache)
            groups.append(shards.Spans(file, str(entry)))
        else:
            texts.append(file)
    if texts:
        groups.insert(0, shards.Texts(texts, facts.document_bytes))
    return groups


def open_sources(data: DataConfig) -> tuple[Source, ...]:
    """Every source of a config, found and indexed, under a name of its own."""
    configs, cache = data.sources, files.Cache(data.cache_dir)
    if not configs:
        raise config.InputError(
            "data.sources is empty: give at least one folder, file or URL of documents"
        )
    names: list[str] = []
    for facts in configs:
        name = facts.name or pathlib.PurePosixPath(facts.path).name or "source"
        if facts.name and facts.name in names:
            raise config.InputError(
                f"two data sources are named {facts.name!r}; give each its own name"
            )
        tries = (name, *(f"{name}-{i}" for i in range(2, len(configs) + 2)))
        names.append(next(n for n in tries if n not in names))
    return tuple(
        Source(facts, name, cache, data.max_record_bytes)
        for facts, name in zip(configs, names, strict=True)
    )


def under_names(sources: Sequence[Source], names: Sequence[str]) -> tuple[Source, ...]:
    """The sources of a resumed run under the names it began with.

    A name that the config leaves open comes from the path, and decides the order of the
    documents: a corpus that has moved keeps the one it had.
    """
    own = [one.name for one in sources]
    if len(own) != len(names) or set(own) == set(names):
        return tuple(sources)
    out = []
    for one, name in zip(sources, names, strict=True):
        out.append(copy.copy(one))
        out[-1].name = one.config.name or name
    return tuple(out)


def read_pairs(
    sources: Sequence[Source], pairs: Sequence[tuple[int, int]]
) -> list[Document | Bad]:
    """The records of (number of the source, record) pairs, in their order."""
    out: list[Any] = [None] * len(pairs)
    for number, one in enumerate(sources):
        places = [i for i, (owner, _) in enumerate(pairs) if owner == number]
        if places:
            records = one.read([pairs[i][1] for i in places])
            for i, record in zip(places, records, strict=True):
                out[i] = record
    return out


def manifest(sources: Sequence[Source]) -> dict[str, Any]:
    """{"hash": of all, "sources": {name: {"fields": ..., "files": [[entry], ...]}}}."""
    by_name = {
        source.name: {
            "fields": [source.config.text_field, source.config.tokens_field],
            "files": [list(entry) for entry in source.entries],
        }
        for source in sources
    }
    text = json.dumps(by_name, sort_keys=True)
    return {"hash": hashlib.sha256(text.encode()).hexdigest(), "sources": by_name}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two manifests, a line for each source and file."""
    lines = []
    for name in sorted(old["sources"].keys() | new["sources"].keys()):
        before, after = old["sources"].get(name), new["sources"].get(name)
        if before is None or after is None:
            lines.append(f"source {name!r} {'appeared' if after else 'is gone'}")
            continue
        if before["fields"] != after["fields"]:
            lines.append(f"source {name!r} reads {after['fields']}")
        was = {entry[0]: entry for entry in before["files"]}
        now = {entry[0]: entry for entry in after["files"]}
        for file in sorted(was.keys() | now.keys()):
            if file not in now:
                lines.append(f"{file!r} of source {name!r} is gone")
            elif file not in was:
                lines.append(f"{file!r} of source {name!r} is new")
            elif was[file][2].startswith("etag:") != now[file][2].startswith("etag:"):
                lines.append(
                    f"{file!r} of source {name!r} is known by a store's tag at one "
                    "place and by its content at the other, which do not compare"
                )
            elif was[file] != now[file]:
                lines.append(
                    f"{file!r} of source {name!r} changed ({was[file][1]} bytes, "
                    f"{was[file][3]} records before; {now[file][1]} bytes, "
                    f"{now[file][3]} records now)"
                )
    return lines
