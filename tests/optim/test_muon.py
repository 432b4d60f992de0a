# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz on its own: against singular values, per layer, dealt over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_jax import mesh
from qwen_jax.optim import muon
from tests.oracles import optim as oracle

orthogonalize = jax.jit(muon.orthogonalize)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 17), (3, 17, 5), (1, 1, 6)])
def test_each_matrix_matches_its_singular_value_map(shape):
    x = np.float32(np.random.default_rng(0).standard_normal(shape))
    got = orthogonalize(jnp.asarray(x))
    want = np.stack([oracle.newton_schulz(np.float64(m), 5) for m in x])
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    s = np.linalg.svd(np.float64(got), compute_uv=False)
    # what the quintic promises: well-conditioned directions end near one
    assert 0.6 < np.median(s) < 1.25 and s.max() < 1.25


def test_layers_do_not_mix():
    """Scaling or replacing one layer leaves the others' updates bit for bit."""
    x = np.float32(np.random.default_rng(1).standard_normal((3, 6, 9)))
    base = np.asarray(orthogonalize(jnp.asarray(x)))
    x[1] *= 1e3
    np.testing.assert_allclose(orthogonalize(jnp.asarray(x)), base, atol=1e-6)
    x[1] = np.roll(x[1], 1, axis=0)
    changed = np.asarray(orthogonalize(jnp.asarray(x)))
    np.testing.assert_array_equal(changed[[0, 2]], base[[0, 2]])
    assert np.abs(changed[1] - base[1]).max() > 0.1


def test_a_zero_gradient_moves_nothing():
    assert not np.asarray(orthogonalize(jnp.zeros((2, 4, 4)))).any()


def test_update_has_the_promised_rms():
    grads = {"w": jax.random.normal(jax.random.key(0), (2, 64, 48))}
    tx = muon.scale_by_muon(rms=0.2)
    updates = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(grads)
    assert float(jnp.sqrt(jnp.mean(updates["w"] ** 2))) == pytest.approx(0.2, rel=0.2)


def test_experts_are_stacked_like_layers():
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 4))
    tx = muon.scale_by_muon()
    once = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    got, flat = once({"w": x}), once({"w": x.reshape(6, 6, 4)})
    # Two compiled programs may round differently; the oracle's tolerance decides.
    np.testing.assert_allclose(
        got["w"].reshape(6, 6, 4), flat["w"], rtol=2e-5, atol=2e-6
    )


def test_layers_are_dealt_to_the_devices_that_divide_them():
    with jax.set_mesh(mesh.make(mesh.MeshConfig(2, 2, 2))):
        assert muon.dealt((8, 4, 4)) == P(("data", "fsdp", "tensor"), None, None)
        assert muon.dealt((6, 4, 4)) == P(("data",), None, None)
        assert muon.dealt((3, 4, 4)) == P(None, None, None)
        assert muon.dealt((4, 4)) == P(None, None)
    assert muon.dealt((8, 4, 4)) == P(None, None, None)


def test_no_traffic_inside_the_iteration():
    """Sharded weights cost an exchange in and one back, however many iterations."""
    shape = (8, 16, 16)
    m = mesh.make(mesh.MeshConfig(1, 4, 2))
    with jax.set_mesh(m):
        layout = mesh.sharding(m, P(None, "fsdp", "tensor"))
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)
        texts = []
        for num_iters in (1, 5):
            tx = muon.scale_by_muon(num_iters=num_iters)
            state = jax.eval_shape(tx.init, {"w": x})
            step = jax.jit(tx.update).lower({"w": x}, state).compile()
            texts.append(step.as_text())
    kinds = ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute(")
    few, many = ([t.count(kind) for kind in kinds] for t in texts)
    assert few == many and sum(few) > 0
    assert few[1] == 0
