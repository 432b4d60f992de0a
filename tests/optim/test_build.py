# SPDX-License-Identifier: Apache-2.0
"""The built optimizer against float64 oracles, labels, masks, and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax import config, mesh
from qwen_jax.optim import build, muon
from tests.oracles import optim as oracle

SHAPES = {
    "embed_vd": (13, 8),
    "head_dv": (8, 13),
    "norm_d": (8,),
    "layers": {
        "q_ldn": (4, 8, 16),
        "down_lfd": (4, 24, 8),
        "q_ln": (4, 16),
        "norm_ld": (4, 8),
    },
}
SPECS = {
    "embed_vd": ("vocab", "embed"),
    "head_dv": ("embed", "vocab"),
    "norm_d": (None,),
    "layers": {
        "q_ldn": ("layers", "embed", "heads"),
        "down_lfd": ("layers", "ffn", "embed"),
        "q_ln": ("layers", "heads"),
        "norm_ld": ("layers", None),
    },
}
NUM_STEPS = 20


def tree(seed: int, scale: float = 1.0):
    """A tree like a model's, drawn in float32 and returned in float64."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return np.float64(np.float32(scale * rng.standard_normal(shape)))

    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def f32(values):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def matrices(values):
    return {k: values["layers"][k] for k in ("q_ldn", "down_lfd")}


def record(**fields) -> build.OptimConfig:
    defaults = {
        "lr_peak": 0.02,
        "warmup_steps": 3,
        "clip_norm": 20.0,
        "weight_decay": 0.1,
    }
    return build.OptimConfig(**(defaults | fields))


def once(tx, grads, params):
    """First update and state, compiled in one piece."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)


def run(optim: build.OptimConfig, labels=None, num_steps: int = NUM_STEPS):
    """The weights after each of `num_steps` updates by the product."""
    tx = build.build(optim, num_steps, labels)
    params = f32(tree(0))
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(num_steps):
        params, state = step(params, state, f32(tree(100 + i, scale=1 + i % 3)))
        yield params


def run_oracle(optim: build.OptimConfig, num_steps: int = NUM_STEPS):
    """The same by NumPy: one rule object per array, or per layer for Muon."""
    flat, treedef = jax.tree.flatten(tree(0))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(tree(0))]
    rules = []
    for path, p in zip(paths, flat, strict=True):
        is_matrix = "_ldn" in path or "_lfd" in path
        decays = is_matrix or (optim.decay_embedding and "v" in path.split("_")[-1])
        decay = optim.weight_decay if decays else 0.0
        if optim.name == "muon" and is_matrix:
            args = optim.muon_beta, optim.muon_iters, optim.muon_rms, decay
            rules.append([oracle.Muon(p[0].shape, *args) for _ in p])
        else:
            rules.append(oracle.AdamW(p.shape, optim.b1, optim.b2, optim.eps, decay))
    for i in range(num_steps):
        grads = jax.tree.leaves(tree(100 + i, scale=1 + i % 3))
        if optim.clip_norm:
            grads = oracle.clip(grads, optim.clip_norm)
        lr = oracle.lr("cosine", i, num_steps, optim.lr_peak, 3, num_steps - 3, 0.1)
        for j, (rule, g) in enumerate(zip(rules, grads, strict=True)):
            if isinstance(rule, list):
                layers = zip(rule, flat[j], g, strict=True)
                flat[j] = np.stack([r.step(p, gl, lr) for r, p, gl in layers])
            else:
                flat[j] = rule.step(flat[j], g, lr)
        yield treedef.unflatten(flat)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "adamw"},
        {
            "name": "adamw",
            "clip_norm": 0.0,
            "decay_embedding": True,
            "b1": 0.8,
            "b2": 0.99,
        },
        {"name": "muon"},
        {"name": "muon", "clip_norm": 0.0, "weight_decay": 0.0, "muon_beta": 0.9},
    ],
)
def test_twenty_steps_match_the_oracle(fields):
    optim = record(**fields)
    # Newton-Schulz is five cubic maps whose slope at zero is 3.4: float32 rounding of
    # a small singular value is amplified, so Muon's bound is wider than AdamW's.
    atol = 2e-6 if optim.name == "adamw" else 2e-5
    for got, want in zip(run(optim), run_oracle(optim), strict=True):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 0, atol), got, want)


def test_clip_leaves_small_gradients_alone_and_bounds_large_ones():
    """The norm is over the whole tree; seen through one step of plain momentum."""
    params, grads = f32(tree(0)), f32(tree(1))
    norm = float(optax.tree.norm(grads))
    clipped = oracle.clip(jax.tree.leaves(tree(1)), norm / 3)
    assert np.sqrt(sum(np.sum(g**2) for g in clipped)) == pytest.approx(norm / 3)
    first = {}
    for clip_norm in (0.0, norm * 1.01, norm / 3):
        # eps dominates, so Adam's first update is g / eps: linear in the gradient
        tx = build.build(
            record(clip_norm=clip_norm, eps=1e6, weight_decay=0.0, warmup_steps=0), 5
        )
        updates, _ = once(tx, grads, params)
        first[clip_norm] = jax.tree.leaves(updates)
    for none, loose, tight in zip(*first.values(), strict=True):
        np.testing.assert_array_equal(none, loose)
        np.testing.assert_allclose(tight, none / 3, rtol=1e-5)


def test_labels_of_a_model_tree():
    labels = build.label_tree(f32(tree(0)))
    assert labels == {
        "embed_vd": "embedding",
        "head_dv": "embedding",
        "norm_d": "vector",
        "layers": {
            "q_ldn": "matrix",
            "down_lfd": "matrix",
            "q_ln": "vector",
            "norm_ld": "vector",
        },
    }
    experts = {"up_ledf": jnp.zeros((2, 3, 4, 5)), "router_lde": jnp.zeros((2, 4, 3))}
    heads = {"q_ldnk": jnp.zeros((2, 4, 3, 5)), "o_lnkd": jnp.zeros((2, 3, 5, 4))}
    assert set(build.label_tree(heads).values()) == {"matrix"}
    assert build.label_tree({"bias_lnk": jnp.zeros((2, 3, 5))})["bias_lnk"] == "vector"
    assert set(build.label_tree(experts).values()) == {"matrix"}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"q_ldn": jnp.zeros((4, 8))}, "q_ldn.*does not tell"),
        ({"weight": jnp.zeros((4, 8))}, "weight.*does not tell"),
        ({"conv_ldct": jnp.zeros((2, 4, 2, 4))}, "'d', 'c', 't'.*fold"),
    ],
)
def test_names_that_do_not_tell_are_refused(params, words):
    with pytest.raises(config.InputError, match=words):
        build.label_tree(params)


def test_labels_can_be_given():
    """With every leaf a vector nothing decays and Muon has nothing to do."""
    vectors = jax.tree.map(lambda x: "vector", tree(0))
    *_, muon_run = run(record(name="muon"), vectors)
    *_, adam_run = run(record(weight_decay=0.0))
    jax.tree.map(np.testing.assert_array_equal, muon_run, adam_run)
    with pytest.raises(config.InputError, match=r"'scalar'.*matrix"):
        next(run(record(), jax.tree.map(lambda x: "scalar", tree(0))))
    with pytest.raises(config.InputError, match=r"norm_d.*label it 'vector'"):
        next(run(record(name="muon"), jax.tree.map(lambda x: "matrix", tree(0))))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("adamw", (2, 2, 2)),
        ("muon", (2, 2, 2)),
        ("muon", (4, 1, 1)),
        ("muon", (1, 1, 8)),
    ],
)
def test_same_update_on_every_mesh(name, sizes):
    optim = record(name=name)
    tx = build.build(optim, NUM_STEPS)
    params, grads = f32(tree(0)), f32(tree(100))
    rules = mesh.Rules(vocab=None)  # 13 does not divide
    devices = jax.devices()[: np.prod(sizes)]
    updates, state = once(tx, grads, params)
    m = mesh.make(mesh.MeshConfig(*sizes), devices)
    with jax.set_mesh(m):
        layout = jax.tree.map(
            lambda dims: mesh.sharding(m, rules.pspec(*dims)),
            SPECS,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        params, grads = jax.device_put((params, grads), (layout, layout))
        got, got_state = once(tx, grads, params)
        for array, want in zip(*map(jax.tree.leaves, (got, layout)), strict=True):
            assert array.sharding.is_equivalent_to(want, array.ndim)
    both = zip(*map(jax.tree.leaves, ((updates, state), (got, got_state))), strict=True)
    for want, have in both:
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=2e-7)


def test_state_is_float32_for_half_width_weights():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), f32(tree(0)))
    tx = build.build(record(), NUM_STEPS)
    updates, state = once(tx, params, params)
    floats = [x for x in jax.tree.leaves((updates, state)) if x.ndim]
    assert floats and all(x.dtype == jnp.float32 for x in floats)


@pytest.mark.parametrize("name", build.NAMES)
def test_state_has_no_array_that_is_not_needed(name):
    """AdamW keeps two numbers a weight, Muon one for its matrices."""
    params = f32(tree(0))
    state = jax.eval_shape(build.build(record(name=name), NUM_STEPS).init, params)

    def size(values):
        return sum(x.size for x in jax.tree.leaves(values) if x.ndim)

    saved = size(matrices(params)) if name == "muon" else 0
    assert size(state) == 2 * size(params) - saved


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adamv"}, "did you mean 'adamw'"),
        ({"schedule": "wsb"}, "did you mean 'wsd'"),
        ({"lr_peak": float("nan")}, "lr_peak=nan"),
        ({"lr_peak": -1.0}, "lr_peak=-1"),
        ({"clip_norm": float("inf")}, "clip_norm=inf"),
        ({"b2": 1.0}, "b2=1"),
        ({"lr_end_ratio": 1.5}, "lr_end_ratio=1.5"),
        ({"decay_steps": -2}, "decay_steps=-2"),
    ],
)
def test_impossible_records_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        build.OptimConfig(**fields)
    with pytest.raises(config.InputError, match=f"optim: .*{words}"):
        config.freeze(build.OptimConfig, fields, at="optim")


def test_muon_equals_optax():
    """Same numbers as optax's Muon where that one can run: no mesh."""
    dims = {
        "layers": dict.fromkeys(SHAPES["layers"])
        | dict.fromkeys(("q_ldn", "down_lfd"), optax.contrib.MuonDimensionNumbers(1, 2))
    }
    dims = dict.fromkeys(SHAPES) | dims
    reference = optax.contrib.muon(
        1.0, muon_weight_dimension_numbers=dims, consistent_rms=0.2
    )
    params, ours = f32(tree(0)), muon.scale_by_muon()
    want_state, state = reference.init(params), ours.init(matrices(params))
    reference_update, update = jax.jit(reference.update), jax.jit(ours.update)
    for i in range(4):
        grads = f32(tree(i))
        want, want_state = reference_update(grads, want_state, params)
        got, state = update(matrices(grads), state)
        for name, x in got.items():
            np.testing.assert_allclose(-x, want["layers"][name], 0, 1e-5)


@pytest.mark.parametrize("sizes", [None, (1, 2, 4)])
def test_heads_and_their_width_are_one_side_of_a_matrix(sizes):
    """q_ldnk moves as the matrix [d, n * k] does, o_lnkd as [n * k, d]."""
    rng = np.random.default_rng(3)
    values = {
        "q_ldnk": rng.standard_normal((2, 8, 4, 6)),
        "o_lnkd": rng.standard_normal((2, 4, 6, 8)),
    }
    optim = record(name="muon", warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
    tx = build.build(optim, NUM_STEPS)
    grads = f32(values)
    if sizes is None:
        updates, _ = once(tx, grads, grads)
    else:
        m = mesh.make(mesh.MeshConfig(*sizes))
        specs = {
            "q_ldnk": jax.P(None, "fsdp", "tensor", None),
            "o_lnkd": jax.P(None, "tensor", None, "fsdp"),
        }
        with jax.set_mesh(m):
            grads = {
                k: jax.device_put(g, mesh.sharding(m, specs[k]))
                for k, g in grads.items()
            }
            updates, _ = once(tx, grads, grads)
    for name, shape in (("q_ldnk", (8, 24)), ("o_lnkd", (24, 8))):
        for layer in range(2):
            rule = oracle.Muon(shape, 0.95, 5, 0.2, 0.0)
            zero, g = np.zeros(shape), np.float32(values[name][layer]).reshape(shape)
            want = rule.step(zero, np.float64(g), optim.lr_peak)
            got = np.asarray(updates[name][layer]).reshape(shape)
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
