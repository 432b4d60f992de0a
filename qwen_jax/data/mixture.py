# SPDX-License-Identifier: Apache-2.0
"""Which document comes next: shuffled epochs of weighted sources, in stages, per lane.

Source: Grain's MapDataset (shuffle, repeat, slice, mix), used here on record numbers
alone; records are read elsewhere, many at a time.

The order. Every source is an endless list of its epochs, each shuffled anew with a seed
of (run seed, source name). Lane l of n takes the places l, l + n, l + 2n, ... of that
list, so that over an epoch the lanes share every document and none comes twice. Inside
a lane, a stage draws from the sources in proportion to its weights; draw i of a stage
is a pure function of (weights, where each source stood when the stage began).

Stages. `stages` lists (until_step, {name: weight}): a stage holds while step <
until_step, the last one for ever. At a switch each source goes on where it stood, so an
annealing stage meets documents the run has not yet seen. Rows packed but not returned
when a stage ends are dropped and counted (loader: `dropped_tokens`). A resumed run may
change the stages that have not begun; a source for a later stage stands among the
sources from the start, unnamed in the stages before.

Units: a weight is a share of the text, in UTF-8 bytes (weight_by="bytes": draws are
weight / mean document size), or of the documents (weight_by="documents", SeqIO's rule).
Grain rounds shares to about 1 % of the smallest. A source of weight 0, or unnamed in a
stage, is not drawn from.
Raises: InputError for unknown names, weights that are negative or all 0, stages that do
not rise.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from qwen_jax import config, rng

# Sources of so many records, or fewer, are permuted whole (128 KB an epoch).
_SMALL = 1 << 16
Stages = tuple[tuple[int, dict[str, float]], ...]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources by name, size and mean document, and the weights of each stage.

    Attributes: names; num_records (documents of each source); untils (until_step of
    each stage); draws ([stages, sources], the share of documents drawn).
    """

    names: tuple[str, ...]
    num_records: tuple[int, ...]
    untils: tuple[int, ...]
    draws: tuple[tuple[float, ...], ...]
    seed: int

    def stage_at(self, step: int) -> int:
        """The stage that holds at a step."""
        for stage, until in enumerate(self.untils):
            if step < until:
                return stage
        return len(self.untils) - 1

    def lane(
        self, stage: int, lane: int, lanes: int, begun: Sequence[int]
    ) -> grain.MapDataset:
        """Draw number -> (source, record), from where each source stood (`begun`)."""
        parts, shares = [], []
        for source, share in enumerate(self.draws[stage]):
            if share > 0:
                seed = rng.seed_for(self.seed, f"shuffle/{self.names[source]}")
                epochs = _Epochs(source, self.num_records[source], seed)
                endless = epochs.repeat()
                parts.append(endless[lane + begun[source] * lanes :: lanes])
                shares.append(share)
        return grain.MapDataset.mix(parts, shares)


class _Epochs(grain.MapDataset):
    """(source, record) in shuffled epochs, as Grain's shuffle and repeat give them.

    Grain's shuffle walks 2^16 places of a cipher to find one of few records (0.3 ms for
    100, 30 ms for one); small sources are permuted whole instead.
    """

    def __init__(self, source: int, num_records: int, seed: int):
        super().__init__()
        self._source, self._num_records, self._seed = source, num_records, seed
        self._large = None
        if num_records > _SMALL:
            self._large = grain.MapDataset.range(num_records).shuffle(seed=seed)

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        if self._large is not None:
            return self._source, int(self._large[index])
        epoch, place = divmod(index, self._num_records)
        order = _permutation(self._seed, epoch, self._num_records)
        return self._source, int(order[place])

    def __str__(self) -> str:
        return f"_Epochs({self._source}, {self._num_records})"


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
    # The legacy generator's stream is frozen by NumPy, so old states keep their order.
    shuffle = np.random.RandomState(rng.seed_for(seed, f"epoch/{epoch}"))
    return shuffle.permutation(num_records).astype(np.uint16)


def begun(stages: Stages, step: int) -> Stages:
    """The stages of the batches before `step`, the last of them cut off there."""
    parts, first = [], 0
    for number, (until, weights) in enumerate(stages):
        if first >= step:
            break
        ends = step if number == len(stages) - 1 else min(until, step)
        parts.append((ends, {name: w for name, w in weights.items() if w}))
        first = until
    return tuple(parts)


def make(
    names: Sequence[str],
    weights: Sequence[float],
    num_records: Sequence[int],
    num_bytes: Sequence[int],
    *,
    stages: Stages = (),
    weight_by: str = "bytes",
    seed: int = 0,
) -> Mixture:
    """A Mixture from what sources hold and what the config asks for.

    Args:
      names, weights, num_records, num_bytes: of each source; weights hold where there
        are no stages.
      stages: (until_step, {name: weight}) in rising order.
      weight_by: "bytes" or "documents".
    """
    if weight_by not in ("bytes", "documents"):
        raise config.InputError(
            f"data.weight_by={weight_by!r}: wanted 'bytes' or 'documents'"
        )
    plan = list(stages) or [(0, dict(zip(names, weights, strict=True)))]
    untils = [until for until, _ in plan]
    if any(a >= b for a, b in itertools.pairwise(untils)):
        raise config.InputError(
            f"data.stages end at the steps {untils}: wanted rising numbers"
        )
    if weight_by == "bytes":
        means = np.maximum(num_bytes, 1) / np.maximum(num_records, 1)
    else:
        means = np.ones(len(names))
    draws = []
    for until, by_name in plan:
        for name in by_name:
            if name not in names:
                raise config.InputError(
                    f"data.stages: no source is named {name!r}"
                    f"{config.nearest(name, names)}"
                )
        wanted = np.array([by_name.get(name, 0.0) for name in names], np.float64)
        if not np.all(np.isfinite(wanted)) or np.any(wanted < 0) or not wanted.sum():
            raise config.InputError(
                f"data weights {dict(by_name)} (until step {until}): wanted numbers of "
                "0 or more, one of them above 0"
            )
        share = wanted / means
        draws.append(tuple((share / share.sum()).tolist()))
    return Mixture(
        tuple(names), tuple(map(int, num_records)), tuple(untils), tuple(draws), seed
    )
