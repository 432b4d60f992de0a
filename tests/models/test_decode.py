# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache gives what whole forward passes give, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decode, decoder
from qwen_jax.models import spec as spec_lib

SPEC = spec_lib.Spec(
    vocab_size=64,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    max_positions=160,
    init_std=0.3,  # so that the likeliest token is likely
    window=6,
    full_layers=1,
)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3], [60, 0, 1, 2]]


@pytest.fixture(scope="module")
def params():
    return models.init(SPEC, 0)


@pytest.fixture(scope="module")
def forward(params):
    """Logits after the last of `ids`, by a whole forward pass of one row."""
    full = jax.jit(lambda x: models.forward(SPEC, params, x))

    def last(ids):
        row = np.zeros((1, 32), np.int32)  # causal: what follows changes nothing
        row[0, : len(ids)] = ids
        return np.asarray(full(row)[0, len(ids) - 1])

    return last


def greedy(forward, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(forward(ids).argmax()))
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_of_whole_forward_passes(params, forward):
    got = decode.generate(SPEC, params, PROMPTS, max_tokens=12)
    assert got == [greedy(forward, p, 12) for p in PROMPTS]
    assert len({tuple(ids) for ids in got}) == 3


def test_other_prompts_change_nothing(params):
    together = decode.generate(SPEC, params, PROMPTS, max_tokens=8)
    alone = [decode.generate(SPEC, params, [p], max_tokens=8)[0] for p in PROMPTS]
    assert together == alone


def test_layers_apart_and_stacked_decode_alike(params):
    apart = decoder.unstacked(SPEC, params)
    assert len(apart["layers"]) == 3
    stacked = decode.generate(SPEC, params, PROMPTS, max_tokens=8)
    assert decode.generate(SPEC, apart, PROMPTS, max_tokens=8) == stacked


@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "a list of layers"])
def test_a_cache_keeps_the_form_that_it_came_in(params, listed):
    """Whichever form the weights have."""
    weights = decoder.unstacked(SPEC, params) if listed else params
    run = jax.jit(lambda x, cache: models.forward(SPEC, weights, x, cache=cache))
    tokens, empty = jnp.arange(12).reshape(2, 6), cache_lib.init(SPEC, 2, 8)
    want, stacked = run(tokens, empty)
    got, apart = run(tokens, cache_lib.apart(empty))
    assert cache_lib.is_apart(apart) and not cache_lib.is_apart(stacked)
    np.testing.assert_allclose(got, want, atol=1e-6)
    for a, b in zip(
        jax.tree.leaves(cache_lib.together(apart)),
        jax.tree.leaves(stacked),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_it_ends_at_the_first_end_id(params):
    whole = decode.generate(SPEC, params, PROMPTS, max_tokens=12)
    end = whole[0][5]
    ending = dataclasses.replace(SPEC, eos_ids=(end,))
    cut = decode.generate(ending, params, PROMPTS, max_tokens=12)
    for got, full in zip(cut, whole, strict=True):
        assert got == (full[: full.index(end)] if end in full else full)
    assert len(cut[0]) <= 5


def test_a_mesh_decodes_alike(params):
    plain = decode.generate(SPEC, params, PROMPTS[:2], max_tokens=6)
    on = mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
    rules = mesh.Rules()
    with jax.set_mesh(on):
        placed = models.init(SPEC, 0, device_mesh=on, rules=rules)
        got = decode.generate(SPEC, placed, PROMPTS[:2] * 2, max_tokens=6, rules=rules)
    assert got == plain * 2


def test_prefill_in_two_parts_is_prefill_in_one(params):
    ids = jnp.asarray([[7, 8, 9, 1, 2, 3, 4, 5]], jnp.int32)
    whole, _ = models.forward(SPEC, params, ids, cache=cache_lib.init(SPEC, 1, 10))
    first, cache = models.forward(
        SPEC, params, ids[:, :5], cache=cache_lib.init(SPEC, 1, 10)
    )
    assert cache_lib.room(cache) == 5
    second, cache = models.forward(SPEC, params, ids[:, 5:], cache=cache)
    assert cache_lib.room(cache) == 2
    both = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(both, whole, atol=2e-5)
    np.testing.assert_allclose(whole, models.forward(SPEC, params, ids), atol=2e-5)


@pytest.mark.parametrize(
    ("prompts", "more", "told"),
    [
        ([], {}, "a prompt is empty"),
        ([[1], []], {}, "a prompt is empty"),
        ([[64]], {}, "id 64, the model's ids are 0 to 63"),
        ([[5], [-1, 3]], {}, "id -1"),
        ([[1] * 150], {"max_tokens": 20}, "160"),
        ([[1]], {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_prompts_that_cannot_be(params, prompts, more, told):
    with pytest.raises(config.InputError, match=told):
        decode.generate(SPEC, params, prompts, **{"max_tokens": 4} | more)
