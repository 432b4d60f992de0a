# SPDX-License-Identifier: Apache-2.0
"""The counts of a benchmark shape against the model itself and against loops."""

import dataclasses

import pytest

from qwen_jax import config
from qwen_jax.bench import shape as shape_lib
from qwen_jax.models import flops, spec

SMALL = shape_lib.Shape(
    layers=3,
    width=24,
    heads=6,
    kv_heads=2,
    head_width=8,
    ffn=40,
    vocab=100,
    rows=2,
    tokens=7,
)


def spec_of(shape):
    return spec.Spec(
        vocab_size=shape.vocab,
        width=shape.width,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        ffn_width=shape.ffn,
        tie_embedding=shape.tied,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [SMALL, shape_lib.Shape()])
def test_parameters_equal_the_models(shape, tied):
    shape = dataclasses.replace(shape, tied=tied)
    assert shape_lib.num_params(shape) == flops.num_params(spec_of(shape))


def test_flops_equal_a_walk_over_every_product():
    def product(m, k, n):
        return 2 * m * k * n

    s, total, causal = SMALL, 0, 0
    m, nk, hk = s.rows * s.tokens, s.heads * s.head_width, s.kv_heads * s.head_width
    for _ in range(s.layers):
        for k, n in [(s.width, nk), (s.width, hk), (s.width, hk), (nk, s.width)]:
            total += product(m, k, n)
        total += 2 * product(m, s.width, s.ffn) + product(m, s.ffn, s.width)
        for _ in range(s.rows * s.heads):
            for query in range(s.tokens):
                # scores, then weighted values
                total += product(1, s.head_width, s.tokens) * 2
                causal += product(1, s.head_width, query + 1) * 2
    total += product(m, s.width, s.vocab)
    attention = s.layers * s.rows * s.heads * s.tokens**2 * s.head_width * 4
    assert shape_lib.step_flops(s, causal=False) == 3 * total
    assert shape_lib.step_flops(s, causal=True) == 3 * (total - attention + causal)


def test_default_shape_is_the_published_one():
    # 137 GFLOP forward, 412 a step: the count of the earlier measurements.
    shape = shape_lib.Shape()
    assert round(shape_lib.step_flops(shape, causal=False) / 1e9) == 412
    assert round(shape_lib.step_flops(shape, causal=False) / 3e9) == 137


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 7}, "--heads 7 is not a multiple of --kv_heads 2"),
        ({"rows": 0}, "--rows is 0, wanted a positive number"),
        ({"head_width": 7}, "--head_width 7 is odd"),
    ],
)
def test_a_shape_that_cannot_be_built_names_the_flag(change, words):
    with pytest.raises(config.InputError, match=words):
        shape_lib.check(dataclasses.replace(SMALL, **change))
