# SPDX-License-Identifier: Apache-2.0
"""A weight is declared once; its values depend on seed and name and on nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, params, rng

TREE = {
    "embed_vd": params.Param((16, 8), ("vocab", "embed")),
    "layers": {"up_ldf": params.Param((2, 8, 12), ("layers", "embed", "ffn"))},
    "norm_d": params.Param((8,), (None,), params.ones),
}


def init(tree, seed=0, layout=None, dtype="float32"):
    return params.init(tree, rng.key_for(seed, "params"), dtype, layout)


def equal(one, other):
    same = jax.tree.map(np.array_equal, jax.device_get(one), jax.device_get(other))
    return jax.tree.all(same)


@pytest.mark.parametrize(
    "shape, dims, told",
    [
        ((2, 3), ("embed",), "shape .2, 3. and dims .'embed',. differ in rank"),
        ((2,), ("emebd",), "unknown dims .'emebd'.; dims.ALL lists them"),
    ],
)
def test_a_weight_that_contradicts_itself_is_refused(shape, dims, told):
    with pytest.raises(ValueError, match=told):
        params.Param(shape, dims)


def test_count_and_shapes_of_a_tree():
    assert params.count(TREE) == 16 * 8 + 2 * 8 * 12 + 8
    assert params.count(init(TREE)) == params.count(TREE)
    shapes = params.abstract(TREE, "bfloat16")
    assert shapes["layers"]["up_ldf"].shape == (2, 8, 12)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


def test_values_are_those_of_the_initializer_and_its_scale():
    tree = {"w": params.Param((64, 64), (None, None), params.normal(0.3)), **TREE}
    weights = init(tree)
    assert abs(np.std(weights["w"]) - 0.3) < 0.01
    assert abs(np.mean(weights["w"])) < 0.02
    np.testing.assert_array_equal(weights["norm_d"], np.ones(8))
    halves = init(tree, dtype="bfloat16")["w"]
    np.testing.assert_array_equal(halves, weights["w"].astype("bfloat16"))


def test_values_depend_on_seed_and_name_only():
    whole = init(TREE)
    backwards = {key: TREE[key] for key in reversed(TREE)}
    alone = {"layers": TREE["layers"]}
    more = {"a_new_one": params.Param((4,), (None,)), **TREE}
    assert equal(init(backwards), whole)
    assert equal(init(alone)["layers"], whole["layers"])
    assert equal({key: init(more)[key] for key in TREE}, whole)
    renamed = init({"other_vd": TREE["embed_vd"]})["other_vd"]
    assert not np.array_equal(renamed, whole["embed_vd"])
    assert not np.array_equal(init(TREE, seed=1)["embed_vd"], whole["embed_vd"])
    assert len(np.unique(whole["layers"]["up_ldf"])) > 180  # layers differ, too


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_values_are_the_same_on_every_mesh(sizes):
    devices = mesh.make(mesh.MeshConfig(*sizes))
    layout = params.shardings(TREE, devices, mesh.Rules())
    weights = init(TREE, layout=layout)
    assert equal(weights, init(TREE))
    for x, place in zip(jax.tree.leaves(weights), jax.tree.leaves(layout), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    up = weights["layers"]["up_ldf"].addressable_shards[0].data
    assert up.shape == (2, 8 // sizes[1], 12 // sizes[2])


def test_a_dim_that_its_axes_do_not_divide_is_refused():
    devices = mesh.make(mesh.MeshConfig(1, 1, 8))
    with pytest.raises(config.InputError) as caught:
        params.shardings(TREE, devices, mesh.Rules())
    assert str(caught.value) == (
        "['layers']['up_ldf']: dim 'ffn' of 12 is not divisible by mesh axis tensor of "
        "8; choose --config.mesh.tensor that divides 12"
    )
    both = mesh.Rules(embed=("data", "fsdp"), ffn=None, vocab=None)
    tree = {"w": params.Param((6,), ("embed",))}
    with pytest.raises(config.InputError, match=r"axis data\*fsdp of 8; choose"):
        params.shardings(tree, mesh.make(mesh.MeshConfig(4, 2, 1)), both)


def test_shapes_know_where_they_lie():
    devices = mesh.make(mesh.MeshConfig(2, 2, 2))
    layout = params.shardings(TREE, devices, mesh.Rules())
    shapes = params.abstract(TREE, "float32", layout)
    assert shapes["embed_vd"].sharding.spec == jax.P("tensor", "fsdp")
    assert shapes["norm_d"].sharding.spec == jax.P(None)


# --- keys ---


def test_a_key_is_folded_from_seed_name_and_step():
    name = hashlib.blake2b(b"dropout", digest_size=4).digest()
    key = jax.random.fold_in(jax.random.key(7), int.from_bytes(name, "little"))
    want = jax.random.key_data(jax.random.fold_in(key, 3))
    got = rng.key_for(7, "dropout", 3)
    np.testing.assert_array_equal(jax.random.key_data(got), want)
    traced = jax.jit(lambda step: rng.key_for(7, "dropout", step))(3)
    np.testing.assert_array_equal(jax.random.key_data(traced), want)


def test_no_two_of_seed_name_and_step_share_a_key():
    keys = {
        tuple(jax.random.key_data(rng.key_for(seed, name, step)).tolist())
        for seed in (0, 1, 2)
        for name in ("params", "sample", "")
        for step in (0, 1, 2)
    }
    assert len(keys) == 27


def test_seeds_of_host_libraries_are_fixed_and_fit_31_bits():
    seeds = [rng.seed_for(seed, name) for seed in range(50) for name in ("a", "b")]
    assert len(set(seeds)) == 100 and 0 <= min(seeds) <= max(seeds) < 2**31
    digest = hashlib.blake2b(b"5/shuffle", digest_size=4).digest()
    want = int.from_bytes(digest, "little") % 2**31
    assert rng.seed_for(5, "shuffle") == want
