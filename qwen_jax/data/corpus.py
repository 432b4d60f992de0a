# SPDX-License-Identifier: Apache-2.0
"""Passes over a corpus in a fixed order: held-out batches, a tokenizer of its text.

The order is one shuffle of all records with a fixed seed, so that any beginning of it
is a fair sample; it depends on the corpus alone, so that scores of two runs compare.

Formats: batches as the loader's. num_bytes counts the UTF-8 bytes of the documents'
text, which is what `gzip -9` gets, too; end marks count as predictions and not as
bytes, so bits per byte err on the high side.
Invariants: held-out documents are those that the loader never returns; `texts` never
gives a held-out one.
Raises: InputError where holdout_share is above 0 and no document falls to it, and where
a vocabulary is to be learnt and there is no text.
"""

import dataclasses
import importlib.metadata
import itertools
import math
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from qwen_jax import config
from qwen_jax.data import files, packing, source, stream, tokenizer

_READ = 256
# Text to learn a vocabulary from, for each of its entries: more hardly changes the
# merges and is waited for before the first step.
_TRAINING_BYTES_PER_ID = 1000


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Batches of held-out rows; the last one is filled up with rows of padding."""

    batches: tuple[packing.Rows, ...]
    num_bytes: int
    num_documents: int


def documents(
    data: source.DataConfig, sources: Sequence[source.Source], *, held_out: bool
) -> Iterator[source.Document]:
    """The held-out documents, or all others, in the fixed order; no broken ones."""
    ends = np.cumsum([len(one) for one in sources])
    shuffled = grain.MapDataset.range(int(ends[-1])).shuffle(seed=0)
    for first in range(0, len(shuffled), _READ):
        numbers = range(first, min(first + _READ, len(shuffled)))
        places = np.array([shuffled[number] for number in numbers])
        owners = np.searchsorted(ends, places, side="right")
        firsts = ends[owners] - np.array([len(sources[owner]) for owner in owners])
        pairs = list(zip(owners.tolist(), (places - firsts).tolist(), strict=True))
        for record in source.read_pairs(sources, pairs):
            if isinstance(record, source.Bad):
                continue
            if record.held_out(data.holdout_share) == held_out:
                yield record


def _held_out(
    data: source.DataConfig, sources: Sequence[source.Source]
) -> list[source.Document]:
    """Held-out documents, up to holdout_max_bytes."""
    chosen, size = [], 0
    for document in documents(data, sources, held_out=True):
        chosen.append(document)
        size += document.num_bytes or 4 * len(document.tokens)
        if size >= data.holdout_max_bytes:
            break
    if data.holdout_share and not chosen:
        records = sum(len(one) for one in sources)
        raise config.InputError(
            f"data.holdout_share={data.holdout_share} of {records} records chose no "
            "document; raise it, or set 0 to do without evaluation"
        )
    return chosen


def heldout(
    data: source.DataConfig,
    vocabulary: tokenizer.Tokenizer,
    *,
    batch_rows: int,
    process_index: int = 0,
    process_count: int = 1,
    sources: Sequence[source.Source] | None = None,
) -> Heldout:
    """This process's rows of the held-out batches, the same for any process count.

    Args:
      data, vocabulary: as the loader's.
      batch_rows: rows of a global batch, a multiple of process_count.
      sources: those of source.open_sources(data), where they are open already.
    """
    if batch_rows < 1 or batch_rows % process_count:
        raise config.InputError(
            f"held-out batches of {batch_rows} rows for {process_count} processes: "
            "wanted a positive multiple of the number of processes"
        )
    chosen = _held_out(data, sources or source.open_sources(data))
    ids = stream.encode(vocabulary, chosen)
    rows = stream.pack(vocabulary, chosen, ids, data.seq_tokens)
    missing = -len(rows["tokens_bt"]) % batch_rows
    padding = packing.empty(missing, data.seq_tokens, vocabulary.pad_id)
    rows = packing.join([rows, padding])
    local = batch_rows // process_count
    starts = range(process_index * local, len(rows["tokens_bt"]), batch_rows)
    batches = tuple(packing.take(rows, slice(at, at + local)) for at in starts)
    return Heldout(batches, _num_bytes(chosen, vocabulary), len(chosen))


def _num_bytes(
    chosen: Sequence[source.Document], vocabulary: tokenizer.Tokenizer
) -> int:
    ready = (document.tokens for document in chosen if document.tokens is not None)
    of_ids = sum(int(vocabulary.token_bytes[tokens].sum()) for tokens in ready)
    return sum(document.num_bytes for document in chosen) + of_ids


def heldout_bytes(
    data: source.DataConfig,
    vocabulary: tokenizer.Tokenizer | None = None,
    *,
    sources: Sequence[source.Source] | None = None,
) -> bytes:
    """The text of the held-out documents, one after another: what gzip gets.

    `vocabulary` is needed where a source holds ready ids.
    """
    chosen = _held_out(data, sources or source.open_sources(data))
    return b"".join(
        document.text.encode()
        if document.tokens is None
        else vocabulary.decode_bytes(document.tokens, skip_special=True)
        for document in chosen
    )


def texts(
    data: source.DataConfig,
    max_bytes: float = math.inf,
    *,
    sources: Sequence[source.Source] | None = None,
) -> Iterator[str]:
    """A sample of the texts that training may see, up to about max_bytes."""
    size = 0
    for document in documents(
        data, sources or source.open_sources(data), held_out=False
    ):
        if document.tokens is None:
            yield document.text
            size += document.num_bytes
        if size >= max_bytes:
            return


def _no_text(sources: Sequence[source.Source]) -> config.InputError:
    """Why a corpus gives no text, by a look at its first records."""
    records = [r for one in sources for r in one.read(range(min(len(one), _READ)))]
    bad = Counter(r.reason for r in records if isinstance(r, source.Bad))
    return config.InputError(
        f"no text to learn a vocabulary from in {sum(map(len, sources))} records of "
        f"the corpus ({dict(bad)}); look at text_field, holdout_share and the files, "
        "or set data.tokenizer"
    )


def prepare_tokenizer(
    data: source.DataConfig,
    folder: str | pathlib.Path,
    *,
    sources: Sequence[source.Source] | None = None,
) -> tokenizer.Tokenizer:
    """The run's tokenizer: the one kept in `folder`, else data.tokenizer's, else a BPE
    learnt from the corpus; kept in `folder` for the next time."""
    folder = pathlib.Path(folder)
    if (folder / "tokenizer.json").is_file():
        return tokenizer.load(folder)
    if data.tokenizer:
        vocabulary = tokenizer.load(data.tokenizer)
    else:
        vocabulary = _learnt(data, sources or source.open_sources(data))
    vocabulary.save(folder)
    return vocabulary


def _learnt(
    data: source.DataConfig, sources: Sequence[source.Source]
) -> tokenizer.Tokenizer:
    """A BPE of the corpus, kept in the data cache: learning it takes seconds, which the
    next run of the same text, sizes and library need not wait for."""
    facts = [
        "vocabulary",
        importlib.metadata.version("tokenizers"),
        source.manifest(sources)["hash"],
        [[one.config.format, one.config.document_bytes] for one in sources],
        data.vocab_size,
        data.holdout_share,
        data.max_record_bytes,
        _TRAINING_BYTES_PER_ID,
    ]

    def learn(folder: pathlib.Path) -> None:
        enough = _TRAINING_BYTES_PER_ID * data.vocab_size
        sample = texts(data, enough, sources=sources)
        first = next(sample, None)
        if first is None:
            raise _no_text(sources)
        whole = itertools.chain([first], sample)
        tokenizer.train(whole, data.vocab_size).save(folder)

    return tokenizer.load(files.Cache(data.cache_dir).entry(facts, learn))
