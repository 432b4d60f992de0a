# SPDX-License-Identifier: Apache-2.0
"""Memory estimates against what arrays and residuals of autodiff really take."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from qwen_jax import mesh
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib
from qwen_jax.optim import build
from qwen_jax.plan import memory
from qwen_jax.train import state

SPEC = spec_lib.Spec(
    vocab_size=256,
    width=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_width=16,
    ffn_width=128,
    tie_embedding=False,
    max_positions=128,
)
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
RULES = mesh.Rules()


def bytes_of(tree):
    """Bytes of the first device's part of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def estimate(spec=SPEC, rules=RULES, sizes=ONE, **changes):
    given = {"optimizer": "adamw", "remat": "full", "tokens": 64, "micro_steps": 1}
    return memory.estimate(spec, rules, sizes, **given | changes)


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        ((8, 1, 1), RULES),
        ((1, 8, 1), RULES),
        ((2, 2, 2), RULES),
        ((4, 2, 1), mesh.Rules(embed=("data", "fsdp"))),
        ((1, 2, 4), mesh.Rules(vocab=None)),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_and_moments_are_those_of_the_state(sizes, rules, optimizer):
    on = mesh.make(mesh.MeshConfig(*sizes))
    optim = build.OptimConfig(
        name=optimizer, lr_peak=1e-3, warmup_steps=0, decay_steps=0
    )
    tx = build.build(optim, 10)
    shapes = state.abstract(SPEC, tx, on, rules)
    got = estimate(rules=rules, sizes=dict(on.shape), optimizer=optimizer)
    assert got.weights == bytes_of(shapes.params)
    # Muon's norms have two moments, which is less than a thousandth of a real model.
    assert got.optimizer == pytest.approx(bytes_of(shapes.opt), rel=0.02)


def test_sums_in_float32_take_a_layers_gradient_twice_as_wide():
    half = dataclasses.replace(SPEC, compute_dtype="bfloat16")
    wide = dataclasses.replace(half, reduce_dtype="float32")
    assert 3 * estimate(wide).gathered == 4 * estimate(half).gathered
    same = dataclasses.replace(SPEC, reduce_dtype="float32")
    assert estimate(same) == estimate(SPEC)


def residual_bytes(remat, rows=2, t=32):
    """Bytes that autodiff keeps for the backward pass of all layers."""
    spec = dataclasses.replace(SPEC, compute_dtype="bfloat16")

    @functools.partial(jax.eval_shape)
    def kept():
        weights = {
            name: jnp.zeros(p.shape)
            for name, p in jax.tree_util.tree_leaves_with_path(
                decoder.decoder_params(spec), is_leaf=lambda x: hasattr(x, "init")
            )
        }
        tree = jax.tree.structure(
            decoder.decoder_params(spec), is_leaf=lambda x: hasattr(x, "init")
        ).unflatten(weights.values())
        tokens = jnp.zeros((rows, t), jnp.int32)
        segments = jnp.ones((rows, t), jnp.int32)
        _, pull = jax.vjp(
            lambda w: decoder.hidden(spec, w, tokens, segments=segments, remat=remat)[
                0
            ],
            tree,
        )
        return pull

    # What has a row and a token dim and is stacked by layer.
    return sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(kept)
        if x.ndim > 2
        and x.shape[0] == SPEC.num_layers
        and rows * t <= x.size
        and x.shape[1] == rows
    )


@pytest.mark.parametrize(
    "remat", ["full", "attention,attention_lse", "q,mlp_up", "dots"]
)
def test_kept_activations_are_autodiffs_residuals(remat):
    spec = dataclasses.replace(SPEC, compute_dtype="bfloat16")
    kept, _ = memory.activation_bytes_per_token(spec, RULES, ONE, remat)
    assert kept * 2 * 32 == residual_bytes(remat)


def test_left_alone_autodiff_keeps_about_what_is_said():
    spec = dataclasses.replace(SPEC, compute_dtype="bfloat16")
    kept, _ = memory.activation_bytes_per_token(spec, RULES, ONE, "none")
    assert 0.5 < kept * 2 * 32 / residual_bytes("none") < 1.5


def test_the_tensor_axis_divides_what_has_heads_ffn_or_vocabulary():
    whole, parts = estimate(), estimate(sizes=ONE | {"tensor": 4})
    assert parts.head < whole.head and parts.working < whole.working
    # Layer inputs keep their width, so `full` keeps as much.
    assert parts.kept == whole.kept
    dots = [estimate(sizes=s, remat="dots") for s in (ONE, ONE | {"tensor": 4})]
    width = SPEC.num_layers * SPEC.width * 4 * 64
    assert dots[1].kept - width == (dots[0].kept - width) / 4


def test_fsdp_divides_the_state_and_not_the_activations():
    whole, parts = estimate(), estimate(sizes=ONE | {"fsdp": 4})
    assert parts.gathered == whole.gathered and parts.kept == whole.kept
    norms = 4 * (SPEC.num_layers * 2 * (SPEC.width + SPEC.head_width) + SPEC.width)
    assert parts.weights - norms == (whole.weights - norms) / 4


def test_only_activations_grow_with_the_micro_batch():
    small, large = estimate(tokens=64), estimate(tokens=640)
    assert small.fixed == large.fixed
    assert large.kept == 10 * small.kept and large.working == 10 * small.working
    summed = estimate(micro_steps=3)
    assert summed.fixed - small.fixed == small.gradient == small.weights
    assert small.total == sum(dataclasses.astuple(small))
