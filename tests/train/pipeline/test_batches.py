# SPDX-License-Identifier: Apache-2.0
"""Gradients through stages are those of `train.step` on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax import params as params_lib
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import pipeline, step
from qwen_jax.train.pipeline import batches, share

DENSE = spec_lib.Spec(
    vocab_size=48,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=24,
    max_positions=64,
    init_std=0.3,
    param_dtype="float64",
    compute_dtype="float64",
)
MOE = spec_lib.MoE(
    num_experts=4, experts_per_token=2, ffn_width=12, balance_coef=0.1, z_coef=0.01
)
DELTA = spec_lib.Delta(
    key_heads=2, value_heads=4, key_width=8, value_width=8, conv_taps=4
)
SPECS = {
    "dense": DENSE,
    "untied": dataclasses.replace(DENSE, tie_embedding=False, qkv_bias=True),
    "moe": dataclasses.replace(DENSE, moe=MOE),
    "hybrid": dataclasses.replace(
        DENSE, mixers=("delta", "delta", "attention"), delta=DELTA
    ),
    "streams": dataclasses.replace(DENSE, streams=spec_lib.Streams(count=2, rank=4)),
}
CONFIG = step.StepConfig(z_loss=0.03, remat="full")


def deep(name, layers):
    return dataclasses.replace(SPECS[name], num_layers=layers)


def drawn(micro, rows=2, t=12, seed=0):
    """Rows of two documents each and some padding; not every target counts."""
    rng, shape = np.random.default_rng(seed), (micro, rows, t)
    ids = rng.integers(0, 48, (2, *shape)).astype(np.int32)
    first = rng.integers(3, t - 3, (micro, rows, 1))
    at = np.broadcast_to(np.arange(t), shape)
    segments = np.where(at < first, 1, 2) * (at < t - rng.integers(0, 3, first.shape))
    return {
        "tokens_bt": ids[0],
        "targets_bt": ids[1],
        "mask_bt": ((rng.random(shape) < 0.8) & (segments > 0)).astype(np.float32),
        "segments_bt": segments.astype(np.int32),
        "positions_bt": np.where(at < first, at, at - first).astype(np.int32),
    }


def one_device(spec, params, batch):
    how = {"spec": spec, "rules": mesh.Rules(), "config": CONFIG}
    return jax.jit(functools.partial(step.gradients, **how))(params, batch)


def assert_same(got, want, tolerance=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        off, scale = np.max(np.abs(x - y)), np.max(np.abs(y))
        assert off <= tolerance * scale, (jax.tree_util.keystr(path), off, scale)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "layers", "stages", "parts", "micro"),
    [
        pytest.param("dense", 2, 2, 1, 3, marks=SLOW),
        ("dense", 4, 2, 2, 4),
        ("moe", 2, 2, 1, 3),
        pytest.param("untied", 4, 4, 1, 5, marks=SLOW),
        pytest.param("dense", 4, 4, 1, 2, marks=SLOW),
        pytest.param("dense", 2, 1, 1, 2, marks=SLOW),
        pytest.param("dense", 8, 4, 2, 8, marks=SLOW),
        pytest.param("moe", 8, 4, 2, 4, marks=SLOW),
        pytest.param("hybrid", 6, 2, 1, 3, marks=SLOW),
        pytest.param("hybrid", 12, 2, 2, 2, marks=SLOW),
        pytest.param("streams", 2, 2, 1, 3, marks=SLOW),
    ],
)
def test_as_on_one_device(name, layers, stages, parts, micro):
    """Loss, gradient, and everything that a step reports of its routers."""
    with jax.enable_x64(True):
        spec, batch = deep(name, layers), drawn(micro)
        params = models.init(spec, 1)
        want, sums = one_device(spec, params, batch)
        order = "1f1b" if parts == 1 else "interleaved"
        how = {"parts": parts, "order": order, "spec": spec, "config": CONFIG}
        with pipeline.on_stages(stages):
            run = functools.partial(pipeline.gradients, rules=mesh.Rules(), **how)
            got, parts = jax.jit(run)(params, batch)
        assert_same(got, want)
        assert_same(parts, sums, 1e-6)  # counts are float32 on one device
        assert_same(parts["nll"], sums["nll"])


def test_the_front_door_gives_loss_and_gradient():
    with jax.enable_x64(True):
        spec, batch = deep("dense", 2), drawn(3)
        params = models.init(spec, 1)
        want, sums = one_device(spec, params, batch)
        how = {"order": "eager", "config": CONFIG}
        got = pipeline.value_and_grad(spec, params, batch, stages=2, **how)
        assert_same(got, (sums["nll"] / sums["targets"], want))
        assert 3 < float(got[0]) < 8


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("name", "parts", "sizes"),
    [
        ("dense", 1, {"data": 2, "tensor": 2}),
        pytest.param("dense", 2, {"fsdp": 2, "tensor": 2}, marks=SLOW),
        pytest.param("moe", 1, {"tensor": 2, "expert": 2}, marks=SLOW),
        pytest.param("moe", 1, {"data": 2, "expert": 2}, marks=SLOW),
        pytest.param("dense", 1, {"data": 2, "fsdp": 2}, marks=SLOW),
        pytest.param("moe", 1, {"data": 2, "tensor": 2}, marks=SLOW),
        pytest.param("hybrid", 1, {"data": 2, "tensor": 2}, marks=SLOW),
    ],
)
def test_beside_other_axes(name, parts, sizes):
    """Stages whose rows, weights, heads and experts lie over more devices; gradients
    lie as the weights do."""
    with jax.enable_x64(True):
        spec = deep(name, 6 if name == "hybrid" else 2 * parts)
        params, batch = models.init(spec, 1), drawn(2, rows=4)
        want, sums = one_device(spec, params, batch)
        on = mesh.make(mesh.MeshConfig(**{"data": 1, "stage": 2} | sizes))
        rules = mesh.Rules(layers="stage")
        laid = params_lib.shardings(decoder.decoder_params(spec), on, rules)
        laid = jax.tree.map(jax.device_put, params, laid)
        rows = mesh.sharding(on, jax.P(None, *rules.pspec("batch", None)))
        batch = jax.tree.map(lambda x: jax.device_put(x, rows), batch)
        order = "1f1b" if parts == 1 else "interleaved"
        how = {"parts": parts, "order": order, "rules": rules, "config": CONFIG}
        with jax.set_mesh(on):
            run = batches._jitted.lower(laid, batch, spec=spec, **how).compile()
            got, parts = run(laid, batch)
        assert_same(got, want)
        assert_same(parts["nll"], sums["nll"])
        # Two hand on round the ring; one in what only some stages do would hang.
        assert len(re.findall(" collective-permute(-start)?[(]", run.as_text())) == 2
        same = jax.tree.map(lambda x, y: x.sharding == y.sharding, got, laid)
        assert all(jax.tree.leaves(same))


def temporary(spec, params, micro, stages, parts, order):
    how = {"spec": spec, "rules": mesh.Rules(), "config": CONFIG}
    with pipeline.on_stages(stages):
        lowered = batches._jitted.lower(
            params, drawn(micro, 4, 32), parts=parts, order=order, **how
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("parts", "order"),
    [(1, "1f1b"), pytest.param(2, "interleaved", marks=SLOW)],
)
def test_memory_is_that_of_what_is_under_way(parts, order):
    """Twice the micro-batches take no more, beyond the batch and the table."""
    spec = dataclasses.replace(DENSE, num_layers=8, width=64, compute_dtype="float32")
    spec = dataclasses.replace(spec, param_dtype="float32")
    params = jax.eval_shape(lambda: models.init(spec, 1))
    few, many = (temporary(spec, params, n, 4, parts, order) for n in (8, 16))
    residual = 4 * 32 * spec.width * 4  # bytes of one micro-batch between stages
    assert few > 4 * residual
    assert abs(many - few) < residual / 4 and many < 1.01 * few


def test_layers_are_dealt_round_the_devices_and_gathered_again():
    with pipeline.on_stages(2):
        tree = {"w_ld": jnp.arange(16.0).reshape(8, 2)}

        def there_and_back(tree):
            cut = share.cut(tree, 2, 2)
            return cut, share.joined(cut)

        cut, back = jax.jit(there_and_back)(tree)
        # Device 0 has layers 0, 1 and 4, 5.
        mine = cut["w_ld"].addressable_shards[0].data
        assert np.asarray(mine)[:, 0, :, 0].tolist() == [[0, 2], [8, 10]]
        assert_same(back, tree)


def test_what_does_not_fit_is_refused():
    params, batch = {}, drawn(4)

    def refused(words, spec=DENSE, batch=batch, **how):
        with pytest.raises(config.InputError, match=words):
            pipeline.value_and_grad(spec, params, batch, **{"stages": 2} | how)

    refused("stages=0: wanted at least 1", stages=0)
    refused("stages=99: 8 devices are here", stages=99)
    refused("3 layers on 2 stages x 1 parts: wanted a multiple of 2", deep("dense", 3))
    interleaved = {"order": "interleaved"}
    refused("on 2 stages x 3 parts: wanted a multiple of 6", parts=3, **interleaved)
    refused("parts=0: wanted at least 1", parts=0)
    refused('parts=2 with order="1f1b"', deep("dense", 4), parts=2)
    refused("order='1F1B': wanted one of 1f1b, interleaved, eager", order="1F1B")
    refused(
        "3 micro-batches on 2 devices: interleaved stages want a multiple",
        deep("dense", 4),
        drawn(3),
        parts=2,
        **interleaved,
    )
    refused("0 micro-batches", DENSE, jax.tree.map(lambda x: x[:0], batch))
    refused(
        "layer 2 is attention/mlp, and layer 0, which has its place .* delta/mlp; "
        "choose stages x parts so that each stretch is whole repeats",
        deep("hybrid", 4),
    )
    refused(
        "layer 1 is attention/experts",
        dataclasses.replace(SPECS["moe"], dense_layers=(0,)),
    )
    far = dataclasses.replace(DENSE, num_layers=4, window=5, full_layers=1)
    refused("layer 2 is attention/mlp/window 5", far)
    refused("the batch has images", batch=batch | {"images": {}})
    ahead = dataclasses.replace(DENSE, mtp_layers=1)
    refused("1 layers for further tokens", ahead, config=step.StepConfig(mtp_coef=0.3))
    both = mesh.make(mesh.MeshConfig(1, 2, expert=2, stage=2))
    with jax.set_mesh(both), pytest.raises(config.InputError, match="fsdp=2 and mesh"):
        pipeline.value_and_grad(DENSE, params, batch, stages=2)
    rows = mesh.make(mesh.MeshConfig(4, stage=2))
    with jax.set_mesh(rows), pytest.raises(config.InputError, match="reduce_dtype=f"):
        wide = dataclasses.replace(DENSE, reduce_dtype="float32")
        pipeline.value_and_grad(wide, params, batch, stages=2)
    on = mesh.make(mesh.MeshConfig(stage=4))
    with jax.set_mesh(on):
        refused("stages=2, and the mesh that is set has 4 along `stage`")
