# SPDX-License-Identifier: Apache-2.0
"""Pages: rows of any length, in any pages, compute what the full forward computes.

The oracle is the forward pass without a cache over each row by itself, in float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, models, params
from qwen_jax.models import decoder, page_ways, paged, sizes
from qwen_jax.models import spec as spec_lib

DENSE = spec_lib.Spec(
    vocab_size=96,
    width=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    max_positions=256,
    init_std=0.2,
    param_dtype="float64",
    compute_dtype="float64",
)
SPECS = {
    "dense": DENSE,
    "window": dataclasses.replace(DENSE, window=7, full_layers=2),
    "hybrid": dataclasses.replace(
        DENSE,
        mixers=("delta", "delta", "delta", "attention"),
        delta=spec_lib.Delta(2, 4, 8, 8),
        output_gate=True,
        norm_offset=True,
        rotary_share=0.5,
    ),
    "moe": dataclasses.replace(
        DENSE, moe=spec_lib.MoE(num_experts=4, experts_per_token=2, ffn_width=24)
    ),
}
C = 4  # tokens of a page
LENGTHS = (21, 9, 1, 13)  # of the rows
TABLE = np.array([[3, 17, 5, 8, 2, 11], [9, 1, 4, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
TABLE = np.vstack([TABLE, [[7, 10, 12, 14, 0, 0]]]).astype(np.int32)
SLOTS = np.array([2, 0, 3, 1], np.int32)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@functools.cache
def weights(name):
    return jax.tree.map(np.asarray, models.init(SPECS[name], 1))


@functools.cache
def rows():
    draw = np.random.default_rng(0)
    return [draw.integers(0, DENSE.vocab_size, n).astype(np.int32) for n in LENGTHS]


@functools.cache
def wanted(name):
    """Final hidden states of each row by itself: [length, d]."""
    return [
        np.asarray(decoder.hidden(SPECS[name], weights(name), row[None])[0][0])
        for row in rows()
    ]


def stepper(name, way="", rules=None):
    spec = SPECS[name]
    run = functools.partial(paged.hidden, spec, way=way, rules=rules)
    return jax.jit(run)


def played(name, tree, prompt, step, rules=None):
    """Hidden states of all rows: `prompt` tokens of each in pieces, a row at a time,
    then one token of every row at a time; rows that are over go along as padding."""
    pages = paged.init(SPECS[name], 18, C, len(LENGTHS), rules)
    # What was in a page or a state before must not matter.
    pages = jax.tree.map(lambda x: x + jnp.ones((), x.dtype) * 3, pages)
    found = [np.zeros((n, DENSE.width)) for n in LENGTHS]
    for i, row in enumerate(rows()):
        head = row[: min(prompt, len(row) - 1)]
        for start in range(0, len(head), 2 * C):
            now = head[start : start + 2 * C]
            tokens, real = np.zeros((2, 1, 2 * C), np.int32)
            tokens[0, : len(now)], real[0, : len(now)] = now, 1
            where = paged.Places(
                TABLE[i : i + 1], np.array([start], np.int32), SLOTS[i : i + 1]
            )
            x, pages = step(tree, tokens, real, pages, where)
            found[i][start : start + len(now)] = x[0, : len(now)]
    for k in range(max(LENGTHS)):
        at = [min(prompt, n - 1) + k for n in LENGTHS]
        going = [a < n for a, n in zip(at, LENGTHS, strict=True)]
        tokens = np.array(
            [[r[a] if g else 5] for r, a, g in zip(rows(), at, going, strict=True)]
        )
        real = np.array(going, np.int32)[:, None]
        at = np.minimum(at, np.array(LENGTHS) - 1).astype(np.int32)
        slots = np.where(going, SLOTS, len(LENGTHS)).astype(np.int32)
        where = paged.Places(TABLE, at, slots)
        x, pages = step(tree, tokens.astype(np.int32), real, pages, where)
        for i in np.flatnonzero(going):
            found[i][at[i]] = x[i, 0]
    return found


CASES = [(name, "loop", prompt) for name in SPECS for prompt in (0, 11)]
CASES += [(name, "gather", 11) for name in ("dense", "window", "hybrid")]
CASES += [(name, "blocks", 11) for name in ("dense", "window")]


@pytest.mark.parametrize(("name", "way", "prompt"), CASES)
def test_pages_are_the_full_forward(name, way, prompt, monkeypatch):
    monkeypatch.setattr(page_ways, "BLOCK_TOKENS", 2 * C)  # several blocks a row
    tree = decoder.unstacked(SPECS[name], weights(name))
    found = played(name, tree, prompt, stepper(name, way))
    for one, other in zip(found, wanted(name), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


CASES = [
    ("dense", "gather"),
    ("dense", "blocks"),
    ("window", "loop"),
    ("hybrid", "loop"),
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_of_a_trial_only_what_is_settled_stays(name, way):
    """Three tokens of each row at a time, of which some are not the row's: the others
    are as in the full forward, and what comes later is as if the wrong had not been."""
    spec, tree = SPECS[name], decoder.unstacked(SPECS[name], weights(name))

    @jax.jit
    def step(tree, tokens, real, right, pages, where):
        x, pages, inputs = paged.hidden(
            spec, tree, tokens, real, pages, where, way=way, trial=True
        )
        rules = mesh.Rules()
        return x, paged.settled(spec, tree, pages, inputs, right, where, rules)

    pages = paged.init(spec, 18, C, len(LENGTHS))
    pages = jax.tree.map(lambda x: x + jnp.ones((), x.dtype) * 3, pages)
    found = [np.zeros((n, DENSE.width)) for n in LENGTHS]
    draw, done = np.random.default_rng(4), np.zeros(len(LENGTHS), np.int32)
    while (left := np.array(LENGTHS) - done).any():
        # At least one of each row is right; where a row is over, all is padding.
        right = np.minimum(draw.integers(1, 4, len(LENGTHS)), left)
        tried = np.where(left > 0, draw.integers(right, 4), 0)
        tokens = draw.integers(0, DENSE.vocab_size, (len(LENGTHS), 3)).astype(np.int32)
        for i, row in enumerate(rows()):
            tokens[i, : right[i]] = row[done[i] : done[i] + right[i]]
        real, kept = (
            (np.arange(3) < n[:, None]).astype(np.int32) for n in (tried, right)
        )
        slots = np.where(left > 0, SLOTS, len(LENGTHS)).astype(np.int32)
        where = paged.Places(TABLE, done.copy(), slots)
        x, pages = step(tree, tokens, real, kept, pages, where)
        for i, n in enumerate(right):
            found[i][done[i] : done[i] + n] = x[i, :n]
        done += right.astype(np.int32)
    for one, other in zip(found, wanted(name), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


def test_pages_are_shared_and_copied():
    """Two rows with one prompt share its whole pages; the last is copied."""
    name, spec = "dense", SPECS["dense"]
    tree, step = decoder.unstacked(spec, weights(name)), stepper(name)
    row = rows()[0][:10]  # two pages and a half
    pages = paged.init(spec, 12, C, 2)
    table = np.array([[1, 2, 3, 0]], np.int32)
    one = np.zeros(1, np.int32)
    tokens, real = np.zeros((2, 1, 12), np.int32)
    tokens[0, :10], real[0, :10] = row, 1
    _, pages = step(tree, tokens, real, pages, paged.Places(table, one, one))
    copied = jax.tree.map(lambda x: x.at[7].set(x[3]), pages.attention)
    pages = pages.replace(attention=copied)
    table = np.array([[1, 2, 3, 4], [1, 2, 7, 8]], np.int32)
    ends = np.array([[3, 9, 4, 1], [8, 2, 2, 6]], np.int32)
    for i in range(4):
        where = paged.Places(table, np.full(2, 10 + i, np.int32), np.arange(2))
        x, pages = step(
            tree, ends[:, i : i + 1], np.ones((2, 1), np.int32), pages, where
        )
        whole = [np.concatenate([row, end[: i + 1]])[None] for end in ends]
        for k in range(2):
            other, _ = decoder.hidden(spec, weights(name), whole[k])
            np.testing.assert_allclose(x[k, 0], other[0, -1], atol=1e-10)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("ways", [1, 2])
def test_states_lie_in_pages_as_they_are(dtype, ways):
    spec = dataclasses.replace(
        SPECS["hybrid"], compute_dtype=dtype, param_dtype="float32"
    )
    units, rules = paged.state_units(spec, C), mesh.Rules(batch=None)
    device_mesh = mesh.make(mesh.MeshConfig(1, 1, ways, 1), jax.devices()[:ways])
    with jax.set_mesh(device_mesh):
        pages = paged.init(spec, 3 + units, C, 3, rules)
        item = jnp.dtype(dtype).itemsize  # three parts of a float32 in bfloat16
        held = sum(
            x[0].size * item * (3 if x.dtype.itemsize > item else 1)
            for x in jax.tree.leaves(pages.delta)
        )
        room = paged.page_bytes(spec, C)
        assert (units - 1) * room < held <= units * room
        draw = np.random.default_rng(0)

        def random(x):
            return jax.device_put(draw.normal(size=x.shape).astype(x.dtype), x.sharding)

        pages = jax.tree.map(random, pages)
        before = jax.tree.map(np.asarray, pages)
        save, restore = (
            jax.jit(run, static_argnames="units")
            for run in (paged.saved, paged.restored)
        )
        pages = save(pages, np.int32(1), np.int32(2), units=units)
        after = jax.tree.map(np.asarray, pages)
        pages = restore(pages, np.int32(3), np.int32(2), units=units)
        found = jax.tree.map(np.asarray, pages)
    for one, other in zip(
        jax.tree.leaves(before.attention), jax.tree.leaves(after.attention), strict=True
    ):
        np.testing.assert_array_equal(one[:2], other[:2])  # those of others are left
        np.testing.assert_array_equal(one[2 + units :], other[2 + units :])
    for one, other in zip(
        jax.tree.leaves(before.delta), jax.tree.leaves(found.delta), strict=True
    ):
        np.testing.assert_array_equal(other[3], one[1])
        np.testing.assert_array_equal(other[:3], one[:3])
    assert (found.tail_rj[3] == 1).all()


@pytest.mark.parametrize(("name", "way"), [("dense", "blocks"), ("hybrid", "loop")])
def test_on_a_mesh(name, way):
    spec, rules = SPECS[name], mesh.Rules(batch=None)
    device_mesh = mesh.make(mesh.MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    layout = params.shardings(decoder.decoder_params(spec), device_mesh, rules)
    with jax.set_mesh(device_mesh):
        tree = jax.tree.map(jax.device_put, weights(name), layout)
        tree = decoder.unstacked(spec, tree)
        found = played(name, tree, 11, stepper(name, way, rules), rules)
    for one, other in zip(found, wanted(name), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


def test_bytes_of_a_page():
    pages = paged.init(SPECS["hybrid"], 18, C, 4)
    held = sum(x.nbytes for x in jax.tree.leaves(pages.attention))
    assert held == 18 * paged.page_bytes(SPECS["hybrid"], C)


def test_what_pages_do_not_hold_is_refused():
    with pytest.raises(config.InputError, match="streams"):
        paged.check(dataclasses.replace(DENSE, streams=spec_lib.Streams(3, 8)))
    paged.check(sizes.get("qwen3-next-80b-a3b"))
