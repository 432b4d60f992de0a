# SPDX-License-Identifier: Apache-2.0
"""Held-out text of a run: laid on its mesh once, and scored as the run goes.

It goes through the model as training does, and needs no more memory: in whole rows, in
chunks, or in either through the stages of a pipeline, whose layers stay where they lie.

Shapes: as of `prepare.Placer` and `prepare.ChunkPlacer`; in chunks all of it is laid
out at once, so that few are not full; through stages many rows or chunks go at a time.
Raises: config.InputError as `corpus.heldout`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen_jax import prepare
from qwen_jax.data import corpus, packing, source, tokenizer
from qwen_jax.eval import perplexity
from qwen_jax.train import chunkflow, pipeline
from qwen_jax.train.chunkflow import step as chunk_step


def opened(
    setup: prepare.Setup,
    vocabulary: tokenizer.Tokenizer,
    sources: Sequence[source.Source],
) -> tuple[list[Any], Callable[..., dict[str, Any]]]:
    """(batches, `sums` of one as of `eval.perplexity.make`)."""
    exp, micro = setup.exp, setup.batch.micro_rows
    rows = setup.device_mesh, exp.rules
    place = prepare.placer(*rows, micro, 1)
    found = corpus.heldout(
        exp.data,
        vocabulary,
        batch_rows=micro,
        process_index=place.index,
        process_count=place.count,
        sources=sources,
    )
    most = math.ceil(exp.eval.max_tokens / (micro * exp.data.seq_tokens))
    batches = found.batches[: most or None]
    stages = setup.device_mesh.shape["stage"]
    of, config = (exp.model, exp.rules), setup.step_config
    if stages == 1 and setup.chunks is None:
        return [place(one) for one in batches], perplexity.make(*of, config)
    if setup.chunks is None:
        blocks = (
            batches[first : first + pipeline.FORWARD_CHUNKS]
            for first in range(0, len(batches), pipeline.FORWARD_CHUNKS)
        )
        laid = [
            prepare.placer(*rows, micro * len(some), len(some))(_joined(some))
            for some in blocks
        ]
        return laid, pipeline.scorer(*of, config)
    parts_of, sums = chunkflow.parts_of, chunk_step.scorer(*of)
    if stages > 1:
        parts_of = functools.partial(pipeline.forward_parts, stages=stages)
        sums = pipeline.chunk_scorer(*of, setup.chunks)
    how = vocabulary.token_bytes, "heldout", parts_of
    return [prepare.chunk_placer(setup, *how)(_joined(batches))], sums


def _joined(batches: Sequence[packing.Rows]) -> packing.Rows:
    return {k: np.concatenate([one[k] for one in batches]) for k in batches[0]}
