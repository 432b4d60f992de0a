# SPDX-License-Identifier: Apache-2.0
"""Sparse and hybrid models: the same logits and gradients on every mesh, cached or not.

In float64: linear layers make keys of length 1 of what may be nearly 0, which blows the
rounding of float32 up to 5e-4 of a gradient.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import mesh, models, params
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decode, decoder
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import step

COMMON = {
    "vocab_size": 64,
    "width": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_width": 8,
    "ffn_width": 48,
    "max_positions": 128,
    "init_std": 0.2,
    "param_dtype": "float64",
    "compute_dtype": "float64",
}
EXPERTS = spec_lib.MoE(
    num_experts=8, experts_per_token=2, ffn_width=24, shared_width=16, z_coef=1e-3
)
HYBRID = {
    "mixers": ("delta", "delta", "delta", "attention"),
    "delta": spec_lib.Delta(4, 8, 8, 8),
    "output_gate": True,
    "norm_offset": True,
    "rotary_share": 0.5,
}
STREAMS = {
    "num_layers": 2,
    "mixers": ("delta", "attention"),
    "streams": spec_lib.Streams(3, 8),
    "indexed": spec_lib.Indexed(heads=6, width=8, budget=8, ratio=2),
    "ngram": spec_lib.Ngram((0,), heads=4, width=64, base=50, multiple=8, eos_id=5),
}
SPECS = {
    "moe": spec_lib.Spec(**COMMON, moe=EXPERTS, dense_layers=(1,)),
    "hybrid": spec_lib.Spec(**COMMON, **HYBRID),
    "hybrid moe": spec_lib.Spec(**COMMON | HYBRID, moe=EXPERTS),
    "streams": spec_lib.Spec(**COMMON | HYBRID | STREAMS, moe=EXPERTS),
}
MESHES = {
    "fsdp 2, tensor 2, expert 2": (1, 2, 2, 2),
    "data 2, expert 4": (2, 1, 1, 4),
    "tensor 4": (1, 1, 4, 1),
    "fsdp 8": (1, 8, 1, 1),
}
B, T = 8, 24


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@functools.cache
def weights(name):
    return jax.tree.map(np.asarray, models.init(SPECS[name], 1))


def rows(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (B, T)).astype(np.int32)
    segments = np.ones((B, T), np.int32)
    segments[1, :5], segments[1, 14:] = 0, 2
    segments[2, 9:], segments[2, 20:] = 4, 0
    return tokens, segments


def batch(seed=0):
    tokens, segments = rows(seed)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    arrays = {
        "tokens_bt": tokens,
        "targets_bt": np.roll(tokens, -1, axis=1),
        "positions_bt": positions,
        "segments_bt": segments,
        "mask_bt": (segments > 0).astype(np.float32),
    }
    return {k: np.ascontiguousarray(v)[None] for k, v in arrays.items()}


def laid(spec, name, sizes):
    """(mesh, weights on it)."""
    device_mesh = mesh.make(mesh.MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    tree = decoder.decoder_params(spec)
    layout = params.shardings(tree, device_mesh, mesh.Rules())
    return device_mesh, jax.tree.map(jax.device_put, weights(name), layout)


def gradients(spec, name, sizes, micro=1, **how):
    """(gradients, sums) of a step's batch on a mesh."""
    rules = mesh.Rules()
    device_mesh, tree = laid(spec, name, sizes)
    arrays = {k: x.reshape(micro, B // micro, T) for k, x in batch().items()}
    place = mesh.sharding(device_mesh, jax.P(None, *rules.pspec("batch", None)))
    with jax.set_mesh(device_mesh):
        arrays = jax.device_put(arrays, place)
        run = functools.partial(
            step.gradients, spec=spec, rules=rules, config=step.StepConfig(**how)
        )
        return jax.tree.map(np.asarray, jax.jit(run)(tree, arrays))


@functools.cache
def alone(name):
    return gradients(SPECS[name], name, (1, 1, 1, 1))


def close(found, wanted, **more):
    flat, _ = jax.tree_util.tree_flatten_with_path(wanted)
    for (path, one), other in zip(flat, jax.tree.leaves(found), strict=True):
        size = np.abs(one).max()
        np.testing.assert_allclose(
            other, one, atol=1e-6 * size + 1e-12, err_msg=str(path), **more
        )


def every_day(cases, *daily):
    """Cases; all but some are for slow runs: they add little and are long in sum."""
    slow = pytest.mark.slow
    return [
        pytest.param(
            *case, id=", ".join(map(str, case)), marks=() if case in daily else slow
        )
        for case in cases
    ]


ON_MESHES = every_day(
    list(itertools.product(SPECS, MESHES)),
    ("hybrid moe", "fsdp 2, tensor 2, expert 2"),
)


@pytest.mark.parametrize(("name", "layout"), ON_MESHES)
def test_gradients_on_meshes(name, layout):
    grads, sums = gradients(SPECS[name], name, MESHES[layout])
    wanted, told = alone(name)
    close(sums, told)
    close(grads, wanted)


@pytest.mark.parametrize(
    "sizes", [(2, 1, 1, 4), pytest.param((1, 2, 2, 2), marks=pytest.mark.slow)]
)
def test_tokens_sent_to_experts_are_those_gathered(sizes):
    spec = SPECS["moe"]
    moe = dataclasses.replace(spec.moe, exchange="all_to_all", capacity_factor=8.0)
    grads, sums = gradients(dataclasses.replace(spec, moe=moe), "moe", sizes)
    wanted, told = alone("moe")
    assert sums["dropped"] == 0
    close(sums, told)
    close(grads, wanted)


@pytest.mark.parametrize(
    ("exchange", "pieces", "sizes"),
    [
        pytest.param("gather", 4, (1, 2, 2, 2), marks=pytest.mark.slow),
        pytest.param("gather", 3, (2, 1, 1, 4), marks=pytest.mark.slow),
        pytest.param("all_to_all", 2, (1, 2, 2, 2), marks=pytest.mark.slow),
        ("gather", 8, (1, 1, 1, 1)),
    ],
)
def test_tokens_in_pieces_are_those_of_one_piece(exchange, pieces, sizes):
    spec = SPECS["moe"]
    moe = dataclasses.replace(
        spec.moe, exchange=exchange, capacity_factor=8.0, pieces=pieces
    )
    grads, sums = gradients(dataclasses.replace(spec, moe=moe), "moe", sizes)
    wanted, told = alone("moe")
    assert sums["dropped"] == 0
    close(sums, told)
    close(grads, wanted)


def test_pieces_keep_the_rows_of_one(monkeypatch):
    """The most rows that any product of experts sees, without and with pieces."""
    from qwen_jax.models import moe as moe_lib

    seen = []
    here = moe_lib._here

    def look(x_md, choice_ma, *rest):
        seen.append(choice_ma.shape[0])
        return here(x_md, choice_ma, *rest)

    monkeypatch.setattr(moe_lib, "_here", look)
    x_md, weights = jnp.ones((12, 4)), [jnp.ones((2, 4, 3))] * 2 + [jnp.ones((2, 3, 4))]
    for pieces, rows in ((1, 12), (4, 3), (5, 3), (100, 1)):
        spec = dataclasses.replace(EXPERTS, num_experts=2, pieces=pieces)
        seen.clear()
        choice_ma, weight_ma = jnp.zeros((12, 2), jnp.int32), jnp.ones((12, 2))
        moe_lib._in_pieces(moe_lib._here)(x_md, choice_ma, weight_ma, weights, spec)
        assert set(seen) == {rows}


def test_what_does_not_fit_on_the_way_is_counted():
    spec = SPECS["moe"]
    moe = dataclasses.replace(spec.moe, exchange="all_to_all", capacity_factor=0.5)
    _, sums = gradients(dataclasses.replace(spec, moe=moe), "moe", (2, 1, 1, 4))
    assert 0 < sums["dropped"] < np.sum(sums["counts_le"]) * 0.8
    np.testing.assert_array_equal(sums["routed"], alone("moe")[1]["routed"])


LOOPS = every_day(
    list(itertools.product(SPECS, ["scan", "unroll"], ["none", "dots", "full"])),
    ("hybrid moe", "scan", "full"),
)


@pytest.mark.parametrize(("name", "loop", "remat"), LOOPS)
def test_loops_and_remat_change_nothing(name, loop, remat):
    grads, sums = gradients(SPECS[name], name, (1, 1, 1, 1), loop=loop, remat=remat)
    close(grads, alone(name)[0])
    close(sums, alone(name)[1])


def test_the_balance_loss_is_of_the_global_batch():
    """From counts and mean probabilities over all real tokens, by hand."""
    spec = SPECS["moe"]
    tokens, segments = rows()
    _, routed = decoder.hidden(spec, weights("moe"), tokens, segments=segments)
    real = float((segments > 0).sum())
    np.testing.assert_array_equal(routed["tokens"], [real] * 3)
    counts, probs = np.asarray(routed["counts_e"]), np.asarray(routed["probs_e"])
    np.testing.assert_allclose(counts.sum(1), 2 * real)
    np.testing.assert_allclose(probs.sum(1), real, rtol=1e-5)
    wanted = np.mean(np.sum(8 * counts / real * probs / real, axis=1))
    np.testing.assert_allclose(alone("moe")[1]["balance"], wanted, rtol=1e-5)


def test_micro_batches_count_what_was_seen_so_far():
    grads, sums = gradients(SPECS["moe"], "moe", (1, 1, 1, 1), micro=2)
    _, told = alone("moe")
    np.testing.assert_array_equal(sums["counts_le"], told["counts_le"])
    assert sums["routed"] == told["routed"]
    np.testing.assert_allclose(sums["nll"], told["nll"], rtol=1e-5)
    # The second half meets the counts of both, the first those of itself.
    assert sums["balance"] == pytest.approx(told["balance"], rel=0.1)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


CACHED = every_day(
    list(itertools.product(SPECS, ["stacked", "a list of layers"])),
    ("moe", "stacked"),
)


@pytest.mark.parametrize(("name", "form"), CACHED)
def test_cached_decoding_is_the_full_forward(name, form):
    """Left and right padding, a prefill in two parts, then one token at a time."""
    spec, tree = SPECS[name], weights(name)
    tokens, _ = rows(3)
    real = np.ones((B, T), np.int32)
    real[0, :7], real[1, :2], real[2, 8:16], real[3, 12:16] = 0, 0, 0, 0
    wanted = [
        models.forward(spec, tree, tokens[b : b + 1, real[b] > 0])[0] for b in range(B)
    ]
    listed = form != "stacked"
    held = decode.laid_out(spec, tree) if listed else tree
    cache = cache_lib.init(spec, B, T)
    cache = cache_lib.apart(cache) if listed else cache
    run = jax.jit(lambda p, x, c, s: models.forward(spec, p, x, cache=c, segments=s))
    parts, start = [], 0
    for stop in (10, 16, *range(17, T + 1)):
        part = slice(start, stop)
        logits, cache = run(held, tokens[:, part], cache, real[:, part])
        parts.append(logits)
        start = stop
    found = np.concatenate(parts, axis=1)
    for b in range(B):
        np.testing.assert_allclose(found[b, real[b] > 0], wanted[b], atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "moe",
        pytest.param("hybrid moe", marks=pytest.mark.slow),
        pytest.param("streams", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_decodes_alike(name):
    spec = SPECS[name]
    tokens, _ = rows(4)
    device_mesh, tree = laid(spec, name, (1, 2, 2, 2))
    rules = mesh.Rules()

    def run(tree, tokens):
        cache = cache_lib.init(spec, B, T, rules)
        if name == "hybrid moe":
            tree, cache = decoder.unstacked(spec, tree), cache_lib.apart(cache)
        forward = functools.partial(models.forward, spec, tree, rules=rules)
        first, cache = forward(tokens[:, :9], cache=cache)
        second, _ = forward(tokens[:, 9:10], cache=cache)
        return jnp.concatenate([first, second], axis=1)

    wanted = models.forward(spec, weights(name), tokens[:, :10])
    with jax.set_mesh(device_mesh):
        place = mesh.sharding(device_mesh, rules.pspec("batch", None))
        found = jax.jit(run)(tree, jax.device_put(tokens, place))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
