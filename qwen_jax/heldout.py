# SPDX-License-Identifier: Apache-2.0
"""Held-out text of a run: laid on its mesh once, and scored as the run goes.

It goes through the model as training does, and needs no more memory: in whole rows, in
chunks, or in either through the stages of a pipeline, whose layers stay where they lie.

Shapes: as of `prepare.Placer` and `prepare.ChunkPlacer`; where text goes through stages
or in chunks, all of it is one batch, so that few chunks are not full and stages wait
once.
Raises: config.InputError as `corpus.heldout`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen_jax import prepare
from qwen_jax.data import corpus, source, tokenizer
from qwen_jax.eval import perplexity
from qwen_jax.train import chunkflow, pipeline
from qwen_jax.train.chunkflow import chunks as chunks_lib
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
    every = {k: np.concatenate([one[k] for one in batches]) for k in batches[0]}
    if setup.chunks is None:
        laid = prepare.placer(*rows, micro * len(batches), len(batches))(every)
        return [laid], pipeline.scorer(*of, config)
    parts_of, sums = chunkflow.parts_of, chunk_step.scorer(*of)
    if stages > 1:

        def parts_of(dealt: chunks_lib.Dealt) -> list:
            return pipeline.ahead(dealt, stages)

        sums = pipeline.chunk_scorer(*of, setup.chunks)
    how = vocabulary.token_bytes, "heldout", parts_of
    return [prepare.chunk_placer(setup, *how)(every)], sums
