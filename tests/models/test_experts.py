# SPDX-License-Identifier: Apache-2.0
"""Experts on the tokens that chose them, against loops over tokens and choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.models.kernels import experts

M, A, E, D, F = 37, 3, 6, 8, 5
NAMES = ("x", "weight", "gate", "up", "down")


def draw(seed=0, choices=None):
    rng = np.random.default_rng(seed)
    if choices is None:
        choices = np.stack([rng.permutation(E)[:A] for _ in range(M)])
    x = rng.normal(size=(M, D))
    weight = rng.uniform(size=choices.shape)
    gate, up = rng.normal(size=(2, E, D, F))
    down = rng.normal(size=(E, F, D))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, weight, gate, up, down)]
    return arrays, jnp.asarray(choices, jnp.int32)


def loops(arrays, choices):
    """float64 loops over tokens and choices, from the equation."""
    x, weight, gate, up, down = (np.asarray(a, np.float64) for a in arrays)
    y = np.zeros_like(x)
    for m in range(x.shape[0]):
        for a, e in enumerate(np.asarray(choices)[m]):
            if e < gate.shape[0]:
                z = x[m] @ gate[e]
                hidden = z / (1 + np.exp(-z)) * (x[m] @ up[e])
                y[m] += weight[m, a] * (hidden @ down[e])
    return y


def run(impl, arrays, choices, **more):
    x, weight, *weights = arrays
    return experts.apply(x, choices, weight, *weights, impl=impl, **more)


UNEVEN = {
    "drawn": None,
    "all to one": np.full((M, 1), 4),
    "two experts get none": np.stack([np.arange(3) + 2 * (i % 2) for i in range(M)]),
    "some are nobody's": np.where(np.arange(M * 2).reshape(M, 2) % 3 == 0, E, 1),
    "all are nobody's": np.full((M, 2), E + 3),
}


@pytest.mark.parametrize("impl", ["blocks", "ragged"])
@pytest.mark.parametrize("which", UNEVEN)
def test_values_and_gradients(impl, which):
    arrays, choices = draw(1, UNEVEN[which])
    y, dropped = run(impl, arrays, choices)
    np.testing.assert_allclose(y, loops(arrays, choices), atol=2e-5)
    assert dropped == 0
    slope = jnp.asarray(np.random.default_rng(2).normal(size=y.shape), jnp.float32)

    def total(fn, arrays):
        return jnp.sum(fn(arrays) * slope)

    def plain(arrays):
        x, weight, *weights = arrays
        return experts.reference(x, choices, weight, *weights)

    wanted = jax.grad(lambda a: total(plain, a))(arrays)
    found = jax.grad(lambda a: total(lambda a: run(impl, a, choices)[0], a))(arrays)
    for name, one, other in zip(NAMES, found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5, err_msg=name)


def test_a_block_is_shorter_than_the_rows_of_an_expert_and_longer():
    for m in (3, 300, 3000):
        rng = np.random.default_rng(m)
        choices = jnp.asarray(rng.integers(0, E, size=(m, 2)), jnp.int32)
        x = jnp.asarray(rng.normal(size=(m, D)), jnp.float32)
        weight = jnp.asarray(rng.uniform(size=(m, 2)), jnp.float32)
        (_, _, *weights), _ = draw(3)
        y, _ = experts.apply(x, choices, weight, *weights, impl="blocks")
        wanted = experts.reference(x, choices, weight, *weights)
        np.testing.assert_allclose(y, wanted, atol=1e-4)


def test_capacity_drops_what_does_not_fit_and_counts_it():
    arrays, choices = draw(4)
    y, dropped = run("capacity", arrays, choices, capacity_factor=float(E))
    np.testing.assert_allclose(y, loops(arrays, choices), atol=2e-5)
    assert dropped == 0
    everyone = jnp.full((M, 1), 4, jnp.int32)
    arrays, _ = draw(5, np.asarray(everyone))
    y, dropped = run("capacity", arrays, everyone, capacity_factor=2.0)
    rows = int(np.ceil(M / E * 2))
    assert dropped == M - rows
    wanted = loops(arrays, everyone)
    np.testing.assert_allclose(y[:rows], wanted[:rows], atol=2e-5)
    assert not np.any(y[rows:])


def test_a_package_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokamax", None)
    with pytest.raises(
        config.InputError, match="needs the package: pip install tokamax"
    ):
        run("tokamax", *draw(6))


def test_shapes_that_do_not_fit():
    (x, weight, gate, up, down), choices = draw(7)
    with pytest.raises(ValueError, match="expert shapes do not fit"):
        experts.apply(x, choices, weight, gate, up, down.transpose(0, 2, 1))
