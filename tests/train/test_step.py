# SPDX-License-Identifier: Apache-2.0
"""One step: accumulation, remat, loops and meshes are the same function; a bad step
changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import mesh, models
from qwen_jax.models import spec as spec_lib
from qwen_jax.optim import build
from qwen_jax.train import state as state_lib
from qwen_jax.train import step as step_lib

SPEC = spec_lib.Spec(
    vocab_size=32,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=4,
    ffn_width=32,
    rope_theta=1e4,
    init_std=0.3,  # gradients of every weight well above rounding
)
RULES = mesh.Rules()
CONFIG = step_lib.StepConfig(z_loss=1e-3)
ROWS, T = 8, 16
# float32 sums in another order; gradients are of unit scale.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def batch(micro=1, seed=0):
    """A packed batch [micro, rows, t]; rows count very different numbers of targets."""
    draw = np.random.default_rng(seed)
    shape = (micro, ROWS // micro, T)
    segments = np.zeros((ROWS, T), np.int32)
    positions = np.zeros((ROWS, T), np.int32)
    for i in range(ROWS):
        cut, end = 3 + i % 4, T - i % 5
        segments[i, :cut], segments[i, cut:end] = 1, 2
        positions[i, :cut] = np.arange(cut)
        positions[i, cut:end] = np.arange(end - cut)
    mask = (segments > 0) * (
        draw.random((ROWS, T)) < np.linspace(0.2, 1, ROWS)[:, None]
    )
    arrays = {
        "tokens_bt": draw.integers(0, 32, (ROWS, T)).astype(np.int32),
        "targets_bt": draw.integers(0, 32, (ROWS, T)).astype(np.int32),
        "positions_bt": positions,
        "segments_bt": segments,
        "mask_bt": mask.astype(np.float32),
    }
    return {key: x.reshape(shape) for key, x in arrays.items()}


@functools.partial(jax.jit, static_argnames="config")
def gradients(weights, arrays, *, config=CONFIG):
    return step_lib.gradients(weights, arrays, spec=SPEC, rules=RULES, config=config)


@functools.cache
def weights():
    return models.init(SPEC, seed=1)


@functools.cache
def plain():
    """What everything below must equal: one batch, scanned, nothing recomputed."""
    return jax.device_get(gradients(weights(), batch()))


def assert_same(got, want=None):
    want = plain() if want is None else want
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(got)),
        jax.tree.leaves(want),
        strict=True,
    ):
        assert np.abs(b).max() > 1e-3, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **CLOSE)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    assert_same(gradients(weights(), batch(micro=4)))


@pytest.mark.parametrize("remat", ["full", "dots", "q,mlp_up"])
def test_remat_changes_no_gradient(remat):
    config = step_lib.StepConfig(z_loss=1e-3, remat=remat)
    assert_same(gradients(weights(), batch(), config=config))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_layers_change_no_gradient(remat):
    config = step_lib.StepConfig(z_loss=1e-3, loop="unroll", remat=remat)
    assert_same(gradients(weights(), batch(), config=config))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1)])
def test_accumulation_on_a_mesh(sizes):
    want = plain()  # of one device: it is kept, so never made under this mesh
    on = mesh.make(mesh.MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    layout = mesh.sharding(on, jax.P(None, *RULES.pspec("batch", None)))
    with jax.set_mesh(on):
        placed = models.init(SPEC, seed=1, device_mesh=on, rules=RULES)
        arrays = jax.device_put(batch(micro=2), layout)
        assert_same(gradients(placed, arrays), want)


def test_without_the_document_mask_a_row_is_one_text():
    config = step_lib.StepConfig(z_loss=1e-3, document_mask=False)
    arrays = batch()
    whole = arrays | {
        "segments_bt": np.ones_like(arrays["segments_bt"]),
        "positions_bt": np.broadcast_to(
            np.arange(T, dtype=np.int32), arrays["positions_bt"].shape
        ),
    }
    got = jax.device_get(gradients(weights(), arrays, config=config))
    assert_same(got, jax.device_get(gradients(weights(), whole)))
    assert abs(got[1]["nll"] - plain()[1]["nll"]) > 1e-2


def fresh(spec=SPEC, **optim):
    """(a state of one device, its step from a batch and the bytes of each id)."""
    one = mesh.make(mesh.MeshConfig(), jax.devices()[:1])
    optim = {"lr_peak": 0.01, "warmup_steps": 0, "decay_steps": 0} | optim
    tx = build.build(build.OptimConfig(schedule="wsd", **optim), 10)
    step = step_lib.compile_step(spec, tx, RULES, step_lib.StepConfig())
    rows = mesh.sharding(one, jax.P(None, *RULES.pspec("batch", None)))
    whole = mesh.sharding(one, jax.P())

    def run(now, arrays, bytes_v=np.ones(32, np.float32)):  # noqa: B008 - a constant
        with jax.set_mesh(one):
            arrays, bytes_v = jax.device_put((arrays, bytes_v), (rows, whole))
            return step(now, arrays, bytes_v)

    return state_lib.create(spec, tx, one, RULES, seed=0), run


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_only_the_counters(name):
    now, step = fresh(name=name)
    now, _ = step(now, batch())
    before = jax.device_get(now)
    bad = batch()
    bad["mask_bt"][0, 2, 3] = np.inf
    now, metrics = step(now, bad)
    after = jax.device_get(now)
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    assert (after.step, after.skipped) == (2, 1)
    for a, b in zip(
        jax.tree.leaves((after.params, after.opt)),
        jax.tree.leaves((before.params, before.opt)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    now, metrics = step(now, batch())
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
    assert (now.step, now.skipped) == (3, 1)
    assert not np.array_equal(now.params["norm_d"], after.params["norm_d"])


def test_metrics_count_what_is_in_the_batch():
    now, step = fresh()
    arrays = batch(seed=3)
    counted = arrays["mask_bt"][0] > 0
    _, metrics = step(now, arrays, np.arange(32, dtype=np.float32))
    assert metrics["targets"] == counted.sum()
    assert metrics["bytes"] == arrays["targets_bt"][0][counted].sum()
    assert metrics["padding"] == (arrays["segments_bt"] == 0).sum()
    np.testing.assert_allclose(
        metrics["bits"], metrics["loss"] * counted.sum() / np.log(2), rtol=1e-5
    )


def test_bfloat16_compute_keeps_float32_weights_and_state():
    now, step = fresh(dataclasses.replace(SPEC, compute_dtype="bfloat16"))
    wanted, exact = fresh()
    now, metrics = step(now, batch())
    _, exact_metrics = exact(wanted, batch())
    floats = [x for x in jax.tree.leaves(now) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=5e-3)
    assert metrics["loss"] != exact_metrics["loss"]  # it did compute in bfloat16


def test_gradients_of_the_layers_are_summed_in_the_dtype_asked_for():
    """Of each matrix, that is: what is summed in bfloat16 holds such numbers only."""
    on = mesh.make(mesh.MeshConfig(2, 4, 1))
    rows = RULES.pspec("batch", None)
    names = ("q_ldnk", "k_ldhk", "v_ldhk", "o_lnkd", "gate_ldf", "up_ldf", "down_lfd")

    def shares(reduce_dtype):
        spec = dataclasses.replace(
            SPEC, compute_dtype="bfloat16", reduce_dtype=reduce_dtype
        )
        placed = models.init(spec, seed=1, device_mesh=on)
        with jax.set_mesh(on):
            layout = mesh.sharding(on, jax.P(None, *rows))
            arrays = {k: jax.device_put(x, layout) for k, x in batch().items()}
            run = functools.partial(
                step_lib.gradients, spec=spec, rules=RULES, config=CONFIG
            )
            grads, _ = jax.device_get(jax.jit(run)(placed, arrays))
        leaves = grads["layers"]["attention"] | grads["layers"]["mlp"]
        return {
            name: np.mean(x == x.astype(jnp.bfloat16).astype(np.float32))
            for name, x in leaves.items()
            if name in names
        }

    assert shares("compute") == dict.fromkeys(names, 1.0)
    wide = shares("float32")
    assert wide.keys() == set(names) and max(wide.values()) < 0.5


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_abstract_state_is_that_of_a_made_one(name, sizes):
    on = mesh.make(mesh.MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    optim = build.OptimConfig(name=name, lr_peak=0.01, warmup_steps=0)
    tx = build.build(optim, 10)
    made = state_lib.create(SPEC, tx, on, RULES, seed=0)
    told = state_lib.abstract(SPEC, tx, on, RULES)
    assert jax.tree.structure(made) == jax.tree.structure(told)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(told), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


def test_the_first_weights_are_the_same_on_every_mesh():
    placed = models.init(SPEC, seed=1, device_mesh=mesh.make(mesh.MeshConfig(2, 2, 2)))
    for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(weights()), strict=True):
        np.testing.assert_array_equal(a, b)
