# SPDX-License-Identifier: Apache-2.0
"""Layers with a window keep the window alone, and decode as whole forward passes do.

The oracle is the forward pass without a cache over rows whose padding is taken out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax import params as params_lib
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decode, decoder, draft, flops, ring
from qwen_jax.models import spec as spec_lib

B, T, WINDOW = 4, 40, 6
SPEC = spec_lib.Spec(
    vocab_size=64,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    max_positions=600,
    init_std=0.3,  # so that the likeliest token is likely
    window=WINDOW,
    full_layers=1,
    param_dtype="float64",
    compute_dtype="float64",
)
SPECS = {
    "some": SPEC,
    "all": dataclasses.replace(SPEC, full_layers=0),
    "wide": dataclasses.replace(SPEC, window=T),
}
PARTS = {
    "long": (20,),
    "around": (5, 6, 12, 19, 32),  # of 5, 1, 6, 7 and 13 tokens
}


@pytest.fixture(autouse=True)
def wide():
    """In float32 how far both are off is another on each kind of machine."""
    with jax.enable_x64(True):
        yield


@functools.cache
def weights(name):
    return models.init(SPECS[name], 0)


def rows():
    """(tokens, segments): padding in front, inside, here and there; documents."""
    draw = np.random.default_rng(0)
    tokens_bt = draw.integers(0, SPEC.vocab_size, (B, T)).astype(np.int32)
    segments_bt = np.ones((B, T), np.int32)
    segments_bt[0, :9] = 0
    segments_bt[1, 14:26] = 0
    segments_bt[2] = draw.random(T) < 0.6
    segments_bt[3, 17:] = 2
    return tokens_bt, segments_bt


@functools.cache
def wanted(name):
    """Logits of each row's real tokens: [count, v], without a cache."""
    tokens_bt, segments_bt = rows()
    order_bt = np.argsort(segments_bt == 0, axis=1, kind="stable")
    tokens_bt, segments_bt = (
        np.take_along_axis(x, order_bt, axis=1) for x in (tokens_bt, segments_bt)
    )
    logits = jax.jit(functools.partial(models.forward, SPECS[name]))(
        weights(name), tokens_bt, segments=segments_bt
    )
    return [np.asarray(logits)[b, segments_bt[b] > 0] for b in range(B)]


def check(name, stops, run, cache, put=lambda x: x):
    """Parts up to each of `stops`, then one token at a time."""
    tokens_bt, segments_bt = rows()
    parts, start = [], 0
    for stop in (*stops, *range(stops[-1] + 1, T + 1)):
        part = slice(start, stop)
        logits, cache = run(put(tokens_bt[:, part]), cache, put(segments_bt[:, part]))
        parts.append(np.asarray(logits))
        start = stop
    found = np.concatenate(parts, axis=1)
    for b, want in enumerate(wanted(name)):
        np.testing.assert_allclose(found[b, segments_bt[b] > 0], want, atol=1e-11)
    return cache


def cached(name, rules=None):
    def run(params, tokens_bt, cache, segments_bt):
        how = {"cache": cache, "segments": segments_bt, "rules": rules}
        return models.forward(SPECS[name], params, tokens_bt, **how)

    return jax.jit(run)


@pytest.mark.parametrize(
    ("name", "parts", "listed"),
    [
        ("some", "long", False),
        ("some", "around", False),
        ("some", "around", True),
        ("all", "around", False),
        ("all", "long", True),
        ("wide", "around", True),
    ],
)
def test_cached_decoding_is_the_full_forward(name, parts, listed):
    params, cache = weights(name), cache_lib.init(SPECS[name], B, T)
    if listed:
        params, cache = decoder.unstacked(SPECS[name], params), cache_lib.apart(cache)
    run = functools.partial(cached(name), params)
    cache = check(name, PARTS[parts], run, cache)
    assert cache_lib.is_apart(cache) == listed
    slots = {x.shape[-1] for x in (cache.ring_segments_bw, cache.segments_bs)}
    assert slots == ({T} if name == "wide" else {WINDOW, T})


@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "a list of layers"])
def test_a_mesh_decodes_alike(listed):
    wanted("some")  # without a mesh
    device_mesh = mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
    rules = mesh.Rules()
    with jax.set_mesh(device_mesh):
        tree = decoder.decoder_params(SPEC)
        layout = params_lib.shardings(tree, device_mesh, rules)
        params = jax.device_put(weights("some"), layout)
        cache = cache_lib.init(SPEC, B, T, rules)
        if listed:
            params, cache = decoder.unstacked(SPEC, params), cache_lib.apart(cache)
        place = mesh.sharding(device_mesh, rules.pspec("batch", None))
        run = functools.partial(cached("some", rules), params)
        put = functools.partial(jax.device_put, device=place)
        cache = check("some", (5, 18), run, cache, put)
    held = jax.tree.leaves(cache.ring)[0]
    whole, mine = held.shape, held.sharding.shard_shape(held.shape)
    # A row of the four and one of the two heads on each device.
    assert np.prod(whole) == 8 * np.prod(mine)


def test_a_ring_holds_the_last_real_tokens_of_each_row():
    """Against lists: tokens are numbers here, written as their keys and values."""
    draw, w, h, k = np.random.default_rng(1), 5, 2, 3
    held = {"k_bhks": jnp.zeros((B, h, k, w)), "v_bhsk": jnp.zeros((B, h, w, k))}
    held_bw, before_bs = jnp.zeros((B, w), jnp.int32), np.zeros((B, 60), np.int32)
    lists, start = [[] for _ in range(B)], 0
    for t in (1, 1, 3, 9, 1, 5, 4, 1, 1, 1, 11, 1, 2):
        new_bt = draw.integers(0, 3, (B, t)).astype(np.int32)  # two of three are real
        value_bt = start + np.arange(t) + 100.0 * np.arange(B)[:, None]
        for b in range(B):
            lists[b] += [
                (s, x) for s, x in zip(new_bt[b], value_bt[b], strict=True) if s
            ]
        at = ring.places(held_bw, jnp.asarray(before_bs), new_bt, mesh.Rules())
        value = np.broadcast_to(value_bt[..., None, None], (B, t, h, k))
        held = ring.put(held, dict.fromkeys(held, value), at.slot_bt)
        held_bw = at.segments_bw
        before_bs[:, start : start + t] = new_bt
        start += t
        for b, tokens in enumerate(lists):
            # Padding by itself may empty the slot that the next real token takes.
            last = w if t > 1 or new_bt[b, 0] else w - 1
            want = dict(list(enumerate(tokens))[-last:])
            assert np.count_nonzero(held_bw[b]) == len(want)
            for rank, (segment, x) in want.items():
                slot = rank % w
                assert (held_bw[b, slot], at.rank_bw[b, slot]) == (segment, rank)
                assert np.all(held["k_bhks"][b, :, :, slot] == x)
                assert np.all(held["v_bhsk"][b, :, slot] == x)
    assert min(map(len, lists)) > 3 * w


@pytest.mark.parametrize(
    ("slots", "kept"), [(4, 4), (6, 6), (7, 6), (40, 6), (1000, 6)]
)
def test_a_ring_does_not_grow_with_the_slots(slots, kept):
    cache = cache_lib.init(SPEC, 3, slots)
    a_token = 2 * 2 * 8 * 8  # keys and values, two heads of 8 numbers of 8 bytes
    held = sum(x.nbytes for x in jax.tree.leaves(cache.ring))
    assert held == 2 * 3 * kept * a_token  # two layers, three rows
    whole = sum(x.nbytes for x in jax.tree.leaves(cache.attention))
    assert whole == 3 * slots * a_token
    assert flops.kv_bytes_per_token(SPEC, 8) == a_token
    assert flops.state_bytes(SPEC, 8) == 2 * WINDOW * a_token


def test_a_model_without_windows_has_no_ring():
    cache = cache_lib.init(dataclasses.replace(SPEC, window=0, full_layers=0), 1, 8)
    assert cache.ring is None and cache.ring_segments_bw is None
    assert cache.attention["v_bhsk"].shape == (3, 1, 2, 8, 8)
    assert cache_lib.init(SPECS["all"], 1, 8).attention is None


# --- text ---


@functools.cache
def whole_passes(window, full):
    """Greedy ids, each by a whole forward pass of one row."""
    spec = dataclasses.replace(SPEC, window=window, full_layers=full)
    params = models.init(spec, 0)
    pass_ = jax.jit(lambda x: models.forward(spec, params, x))

    def greedy(prompt, count):
        ids = list(prompt)
        for _ in range(count):
            row = np.zeros((1, 128), np.int32)  # causal: what follows changes nothing
            row[0, : len(ids)] = ids
            ids.append(int(pass_(row)[0, len(ids) - 1].argmax()))
        return ids[len(prompt) :]

    return spec, params, greedy


def test_generate_is_the_argmax_of_whole_forward_passes():
    spec, params, greedy = whole_passes(WINDOW, 0)
    prompts = [list(range(5, 25)), [3], [60, 0, 1, 2]]
    got = decode.generate(spec, params, prompts, max_tokens=20)
    assert got == [greedy(prompt, 20) for prompt in prompts]


@pytest.mark.parametrize(
    "listed",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["stacked", "a list of layers"],
)
def test_a_kept_cache_grows_and_goes_back_while_the_ring_is_not_full(
    monkeypatch, listed
):
    """16 slots at first, then 32 and 64; the ring has 16, then its 24."""
    monkeypatch.setattr(decode, "FIRST_SLOTS", 16)
    spec, params, greedy = whole_passes(24, 1)
    params = decode.laid_out(spec, params) if listed else params
    kept = decode.Kept()

    def turn(prompt, count, *, reused, wide):
        got = list(decode.stream(spec, params, prompt, max_tokens=count, kept=kept))
        assert got == greedy(prompt, count)
        assert kept.reused == reused
        assert kept.cache.ring_segments_bw.shape == (1, wide)
        return [*prompt, *got]

    first = turn(list(range(5, 15)), 1, reused=0, wide=16)
    # Back to where both agree, which the ring, not yet full, can; then past 16 slots.
    second = turn([*first[:4], 1, 2], 9, reused=4, wide=24)
    third = turn([*second, 11, 12], 20, reused=len(second) - 1, wide=24)
    assert len(third) == 37
    # Round it went: on it goes, and back it does not.
    fourth = turn([*third, 40], 6, reused=len(third) - 1, wide=24)
    turn([*fourth[:-9], 50], 6, reused=0, wide=24)


def test_drafts_are_refused():
    spec = dataclasses.replace(SPEC, mtp_layers=1)
    with pytest.raises(config.InputError, match="window=6 with drafts"):
        draft.generate(spec, models.init(spec, 0), [[1, 2]], max_tokens=4)
