# SPDX-License-Identifier: Apache-2.0
"""A look at packed rows: ids, text, loss mask, borders of documents, shares, fill.

Pure functions from a batch to text, for `qwen-jax data preview`. With color (ANSI
escapes) neighbouring segments differ in color, and ids without loss are dim; without
color the same is told by marks, so that a log keeps all of it.

Formats: for each row a head (fill, targets, segments), a line for each segment (places,
first and last ids) and its text. In the text "▏" begins a segment, "⏎" is a line end,
other control letters are escaped, and what is no target (a prompt, the first id of a
segment) is dim, or stands in ⟦⟧ where there is no color.
Invariants: every input id of a shown segment is counted; nothing else than `batch` and
the arguments is read.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qwen_jax.data import packing, tokenizer

_COLORS = ("\033[36m", "\033[33m", "\033[32m", "\033[35m")
_DIM, _BOLD, _OFF = "\033[2m", "\033[1m", "\033[0m"


def render(
    batch: packing.Rows,
    vocabulary: tokenizer.Tokenizer,
    counters: Mapping[str, int] | None = None,
    *,
    num_rows: int = 2,
    color: bool = False,
    max_letters: int = 1200,
    ids: int = 8,
) -> str:
    """A batch as text.

    Args:
      batch: a batch of the loader.
      vocabulary: its tokenizer.
      counters: Loader.counters(), for the shares of the sources.
      num_rows: how many rows to show; the rest is only counted.
      color: whether to use ANSI colors.
      max_letters: of each row's text, shared among its segments; 0 = all of it.
      ids: ids shown at each end of a segment.
    """
    shown = min(num_rows, len(batch["tokens_bt"]))
    parts = [_summary(batch, vocabulary, color)]
    if counters:
        parts.append(_shares(counters))
    for row in range(shown):
        parts.append(_row(batch, row, vocabulary, color, max_letters, ids))
    left = len(batch["tokens_bt"]) - shown
    if left:
        parts.append(f"({left} more rows)")
    return "\n\n".join(parts) + "\n"


def _summary(batch: packing.Rows, vocabulary: tokenizer.Tokenizer, color: bool) -> str:
    height, width = batch["tokens_bt"].shape
    targets = int(np.count_nonzero(batch["mask_bt"]))
    placed = int(np.count_nonzero(batch["segments_bt"]))
    num_bytes = int(vocabulary.token_bytes[batch["targets_bt"]].sum(where=_in(batch)))
    head = f"{height} rows of {width} tokens"
    fill, padding = packing.fill(batch), height * width - placed
    segments = int(batch["segments_bt"].max(axis=1, initial=0).sum())
    lines = [
        f"{_BOLD}{head}{_OFF}" if color else head,
        f"  fill {fill:.1%}: {placed} places hold a token, {padding} are padding",
        f"  {targets} targets count in the loss, {placed - targets} do not (prompts)",
        f"  {segments} segments; {num_bytes / max(1, placed):.2f} bytes a token",
    ]
    return "\n".join(lines)


def _in(batch: packing.Rows) -> np.ndarray:
    return batch["segments_bt"] > 0


def _shares(counters: Mapping[str, int]) -> str:
    """A line for each source, and what was left out."""
    tokens = {
        key.partition("/")[2]: value
        for key, value in counters.items()
        if key.startswith("tokens/")
    }
    total = max(1, sum(tokens.values()))
    width = max((len(name) for name in tokens), default=0)
    lines = ["mixture (tokens read so far)"]
    for name, value in sorted(tokens.items()):
        share = value / total
        bar = "█" * math.ceil(share * 30)
        documents = counters.get(f"documents/{name}", 0)
        lines.append(f"  {name:<{width}} {share:6.1%} {bar} {documents} documents")
    left_out = ("held_out", "bad_records", "split_documents", "excluded_files")
    told = ", ".join(f"{name} {counters.get(name, 0)}" for name in left_out)
    return "\n".join([*lines, f"  {told}"])


def _row(
    batch: packing.Rows,
    row: int,
    vocabulary: tokenizer.Tokenizer,
    color: bool,
    max_letters: int,
    num_ids: int,
) -> str:
    segments = batch["segments_bt"][row]
    placed, last = int(np.count_nonzero(segments)), int(segments.max(initial=0))
    targets = int(np.count_nonzero(batch["mask_bt"][row]))
    head = (
        f"row {row}: {last} segments, {placed}/{len(segments)} places filled, "
        f"{targets} targets"
    )
    table, texts = [], []
    for segment in range(1, last + 1):
        places = np.flatnonzero(segments == segment)
        inputs = batch["tokens_bt"][row, places]
        final = batch["targets_bt"][row, places[-1:]]
        mask = batch["mask_bt"][row, places]
        allowed = max_letters // last if max_letters else 0
        texts.append(_text(inputs, final, mask, vocabulary, segment, color, allowed))
        table.append(_ids_line(segment, places, inputs, final, vocabulary, num_ids))
    if placed < len(segments):
        table.append(f"  padding {placed}..{len(segments) - 1}")
    head = f"{_BOLD}{head}{_OFF}" if color else head
    return "\n".join([head, *table, "", *texts])


def _ids_line(
    segment: int,
    places: np.ndarray,
    inputs: np.ndarray,
    final: np.ndarray,
    vocabulary: tokenizer.Tokenizer,
    num_ids: int,
) -> str:
    """Where a segment stands, whether its document begins and ends here, its ids."""
    ids = [*inputs.tolist(), *final.tolist()]
    listed = list(map(str, ids))
    if len(ids) > 2 * num_ids:
        listed = [*listed[:num_ids], "...", *listed[-num_ids:]]
    begins = "begins" if ids[0] == vocabulary.eos_id else "goes on"
    ends = "ends" if ids[-1] == vocabulary.eos_id else "is cut"
    return (
        f"  segment {segment} at {places[0]}..{places[-1]} (a document that {begins} "
        f"and {ends}): {' '.join(listed)}"
    )


def _text(
    inputs: np.ndarray,
    final: np.ndarray,
    mask: np.ndarray,
    vocabulary: tokenizer.Tokenizer,
    segment: int,
    color: bool,
    max_letters: int,
) -> str:
    """A segment's ids as text; stretches without loss are marked.

    The mask of place i is of the target, the id at i + 1; the first id is no target.
    """
    ids = np.concatenate([inputs, final])
    counted = np.concatenate([[False], mask > 0])
    borders = np.flatnonzero(np.diff(counted)) + 1
    pieces = []
    for stretch in np.split(np.arange(len(ids)), borders):
        text = _visible(vocabulary.decode(ids[stretch]))
        pieces.append((bool(counted[stretch[0]]), text))
    pieces = _shortened(pieces, max_letters)
    if not color:
        told = [text if loss else f"⟦{text}⟧" for loss, text in pieces]
        return "▏" + "".join(told)
    tint = _COLORS[(segment - 1) % len(_COLORS)]
    told = [f"{tint}{'' if loss else _DIM}{text}{_OFF}" for loss, text in pieces]
    return f"{_BOLD}▏{_OFF}" + "".join(told)


def _shortened(
    pieces: Sequence[tuple[bool, str]], max_letters: int
) -> list[tuple[bool, str]]:
    """The beginning and the end of a long text."""
    total = sum(len(text) for _, text in pieces)
    half = max(1, max_letters // 2)
    hidden = total - 2 * half
    if not max_letters or total <= max_letters or hidden <= 0:
        return list(pieces)
    at, kept = 0, []
    for loss, text in pieces:
        told = text[: max(0, half - at)]
        if at <= half < at + len(text):
            told += f" ...[{hidden} letters]... "
        told += text[max(0, half + hidden - at) :]
        if told:
            kept.append((loss, told))
        at += len(text)
    return kept


def _visible(text: str) -> str:
    """Line ends and control letters as signs on one line."""
    shown = text.replace("\n", "⏎")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
