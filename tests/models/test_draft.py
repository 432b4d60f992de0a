# SPDX-License-Identifier: Apache-2.0
"""Drafting changes how many passes a text takes, and nothing of the text.

Greedy ids are those of plain decoding, samples have the model's own distribution, and
what refused drafts left in a cache is gone, in every family with an MTP head.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from qwen_jax import config, mesh, models
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decode, decoder, draft
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import step as step_lib

# A small vocabulary: drafts of random weights are right now and then.
COMMON = {
    "vocab_size": 8,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 8,
    "ffn_width": 48,
    "max_positions": 160,
    "init_std": 0.25,
    "mtp_layers": 1,
}
HYBRID = {
    "mixers": ("delta", "attention"),
    "delta": spec_lib.Delta(2, 4, 8, 8),
    "output_gate": True,
    "norm_offset": True,
    "rotary_share": 0.5,
    "tie_embedding": False,
}
EXPERTS = spec_lib.MoE(4, 2, 24, shared_width=16)
SPECS = {
    "attention alone": spec_lib.Spec(**COMMON),
    "qwen3_next": spec_lib.Spec(**COMMON | HYBRID, family="qwen3_next", moe=EXPERTS),
    "qwen3_5": spec_lib.Spec(**COMMON | HYBRID | {"mtp_layers": 2}, family="qwen3_5"),
    "qwen3_5_moe": spec_lib.Spec(**COMMON | HYBRID, family="qwen3_5_moe", moe=EXPERTS),
    "dual chunks": spec_lib.Spec(**COMMON, dual_chunk=spec_lib.DualChunk(24, 8)),
}
PROMPTS = [[5, 6, 7, 1, 2, 3, 4], [3], [2, 0, 1, 2]]


@functools.cache
def weights(name):
    return models.init(SPECS[name], 3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.slow if name in ("qwen3_next", "qwen3_5_moe") else (),
        )
        for name in SPECS
    ],
)
def test_greedy_ids_are_those_of_plain_decoding(name):
    spec, params = SPECS[name], weights(name)
    want = decode.generate(spec, params, PROMPTS, max_tokens=24)
    got = draft.generate(spec, params, PROMPTS, max_tokens=24, draft_tokens=3)
    assert got.ids == want
    assert len({tuple(ids) for ids in want}) == 3
    # Both happened: drafts were kept and drafts were refused.
    assert 1.05 < got.acceptance < 3.9
    assert got.passes < 23


@pytest.mark.slow
def test_other_prompts_and_another_form_of_the_weights_change_nothing():
    spec, params = SPECS["qwen3_5"], weights("qwen3_5")
    together = draft.generate(spec, params, PROMPTS, max_tokens=12)
    apart = decoder.unstacked(spec, params)
    for prompt, want in zip(PROMPTS, together.ids, strict=True):
        got = draft.generate(spec, apart, [prompt], max_tokens=12)
        assert got.ids == [want]


@pytest.mark.slow
def test_it_ends_at_the_first_end_id():
    spec, params = SPECS["qwen3_5"], weights("qwen3_5")
    whole = decode.generate(spec, params, PROMPTS, max_tokens=16)
    ending = dataclasses.replace(spec, eos_ids=(whole[0][5],))
    got = draft.generate(ending, params, PROMPTS, max_tokens=16)
    assert got.ids == decode.generate(ending, params, PROMPTS, max_tokens=16)
    assert len(got.ids[0]) <= 5


def test_what_refused_tokens_left_is_taken_back():
    """After a pass of which each row keeps another number of tokens, the cache goes on
    as one that has seen only these."""
    spec, params = SPECS["qwen3_5_moe"], weights("qwen3_5_moe")
    rules = mesh.Rules()
    ids = np.random.default_rng(0).integers(0, 8, (4, 16)).astype(np.int32)
    kept = np.array([0, 1, 3, 4])
    real = (np.arange(4)[None] < kept[:, None]).astype(np.int32)
    begin = jax.jit(
        lambda ids: decoder.hidden_cached(
            spec, params, ids, cache_lib.init(spec, 4, 24), rules=rules
        )[1]
    )

    @jax.jit
    def through(cache, ids, real):
        _, after = decoder.hidden_cached(
            spec, params, ids, cache, rules=rules, keep=True
        )
        return draft.keep(spec, params, cache, after, real, jnp.int32(4), rules)

    @jax.jit
    def only(cache, ids, real):
        return decoder.hidden_cached(
            spec, params, ids, cache, segments=real, rules=rules
        )[1]

    before = begin(ids[:, :8])
    got = through(before, ids[:, 8:12], real)
    want = only(before, ids[:, 8:12], real)
    np.testing.assert_array_equal(got.segments_bs, want.segments_bs)
    np.testing.assert_array_equal(got.tail_segments_bj, want.tail_segments_bj)
    for key in want.delta:
        np.testing.assert_allclose(got.delta[key], want.delta[key], atol=1e-5)
    moved = np.abs(got.delta["s_bnku"] - before.delta["s_bnku"]).max((0, 2, 3, 4))
    assert moved[0] == 0 and min(moved[1:]) > 1e-3
    ahead = jax.jit(
        lambda cache: models.forward(spec, params, ids[:, 12:], cache=cache)[0]
    )
    np.testing.assert_allclose(ahead(got), ahead(want), atol=2e-5)


def chances_of_texts(spec, params, prompt, count, temperature, top_p):
    """The chance of every text of `count` ids after the prompt, by whole passes in
    float64 arithmetic on float32 logits."""
    v = spec.vocab_size
    texts = np.array(list(itertools.product(range(v), repeat=count)), np.int32)
    rows = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    logits = np.asarray(models.forward(spec, params, rows), np.float64)
    total = np.ones(len(texts))
    for i in range(count):
        scores = logits[:, len(prompt) - 1 + i] / temperature
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        order = np.argsort(-p, axis=-1)
        sorted_p = np.take_along_axis(p, order, -1)
        before = np.cumsum(sorted_p, -1) - sorted_p
        sorted_p[before >= top_p] = 0
        np.put_along_axis(p, order, sorted_p, -1)
        p /= p.sum(-1, keepdims=True)
        total *= p[np.arange(len(texts)), texts[:, i]]
    return total


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(0.8, 0.9), pytest.param(1.0, 1.0, marks=pytest.mark.slow)],
)
def test_samples_have_the_distribution_of_the_model(temperature, top_p, monkeypatch):
    """Chi-square of 2,048 texts of three ids against their exact chances."""
    monkeypatch.setattr(decode, "BUCKET", 4)  # so many rows of padding take long
    spec = dataclasses.replace(SPECS["qwen3_5"], vocab_size=4, init_std=0.15)
    params, prompt, count, rows = models.init(spec, 1), [1, 3, 2], 3, 2048
    exact = chances_of_texts(spec, params, prompt, count, temperature, top_p)
    np.testing.assert_allclose(exact.sum(), 1, atol=1e-9)
    got = draft.generate(
        spec,
        params,
        [prompt] * rows,
        max_tokens=count,
        draft_tokens=2,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(7),
    )
    # Some drafts are refused: the heads' own distribution is another one.
    assert 1.2 < got.acceptance < 2.8
    place = np.array(got.ids) @ 4 ** np.arange(count)[::-1]
    seen = np.bincount(place, minlength=4**count)
    assert not seen[exact == 0].any()
    often = exact * rows >= 5
    seen = np.append(seen[often], seen[~often].sum())
    expected = np.append(exact[often], exact[~often].sum()) * rows
    seen, expected = seen[expected > 0], expected[expected > 0]
    assert len(seen) > 15
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 0.01


@pytest.mark.slow
def test_a_trained_head_makes_four_tokens_of_a_pass():
    """Rows that count: a few steps of training teach both heads."""
    spec = dataclasses.replace(SPECS["qwen3_5"], vocab_size=12, init_std=0.1)
    tx, rules = optax.adam(1e-2), mesh.Rules()
    how = step_lib.StepConfig(mtp_coef=0.3)

    @jax.jit
    def step(params, state, arrays):
        grads, _ = step_lib.gradients(
            params, arrays, spec=spec, rules=rules, config=how
        )
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params = models.init(spec, 0)
    state, draws = tx.init(params), np.random.default_rng(0)
    for _ in range(80):
        ids = (draws.integers(0, 12, (1, 8, 1)) + np.arange(17)) % 12
        ids, ones = ids.astype(np.int32), np.ones((1, 8, 16), np.int32)
        arrays = {
            "tokens_bt": ids[..., :-1],
            "targets_bt": ids[..., 1:],
            "positions_bt": ones.cumsum(-1, dtype=np.int32) - 1,
            "segments_bt": ones,
            "mask_bt": ones.astype(np.float32),
        }
        params, state = step(params, state, arrays)
    got = draft.generate(spec, params, [[3, 4], [9]], max_tokens=12, draft_tokens=3)
    for last, ids in zip([4, 9], got.ids, strict=True):
        assert ids == [(last + 1 + i) % 12 for i in range(12)]
    assert got.acceptance > 3


def test_the_rule_of_acceptance_alone():
    """The first token after any draft is of p, whatever q is."""
    rows, p, q = 40_000, np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.2, 0.3, 0.4])
    key = jax.random.key(0)
    drafts = draft.draw(jnp.broadcast_to(jnp.float32(q), (rows, 4)), key)[:, None]
    kept, new = draft.accept(
        jnp.broadcast_to(jnp.float32(p), (rows, 2, 4)),
        jnp.broadcast_to(jnp.float32(q), (rows, 1, 4)),
        drafts,
        jax.random.key(1),
    )
    first = np.where(kept > 0, drafts[:, 0], new)
    seen = np.bincount(first, minlength=4)
    assert seen[3] == 0
    assert stats.chisquare(seen[:3], p[:3] * rows).pvalue > 0.01
    share = np.minimum(p, q).sum()  # of drafts that are kept
    assert abs(float(kept.mean()) - share) < 4 * (share / rows) ** 0.5


@pytest.mark.slow
def test_a_mesh_drafts_alike():
    spec = SPECS["qwen3_5"]
    want = draft.generate(spec, weights("qwen3_5"), PROMPTS[:2], max_tokens=12)
    sizes, rules = mesh.MeshConfig(fsdp=2, tensor=2), mesh.Rules()
    on = mesh.make(sizes, jax.devices()[:4])
    with jax.set_mesh(on):
        placed = models.init(spec, 3, device_mesh=on, rules=rules)
        got = draft.generate(spec, placed, PROMPTS[:2], max_tokens=12, rules=rules)
    assert got.ids == want.ids


def test_what_cannot_be_drafted():
    spec, params = SPECS["qwen3_5"], weights("qwen3_5")
    plain = dataclasses.replace(spec, mtp_layers=0)
    with pytest.raises(config.InputError, match="no MTP head"):
        draft.generate(plain, params, PROMPTS, max_tokens=4)
    with pytest.raises(config.InputError, match="draft_tokens=0"):
        draft.generate(spec, params, PROMPTS, max_tokens=4, draft_tokens=0)
    with pytest.raises(config.InputError, match="a prompt is empty"):
        draft.generate(spec, params, [[]], max_tokens=4)
