# SPDX-License-Identifier: Apache-2.0
"""Real tokens to the front of their rows, and what experts' choices are sorted by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.models import front
from qwen_jax.models.kernels import experts


def test_order_is_a_stable_sort_by_padding():
    rng = np.random.default_rng(0)
    segments_bt = rng.integers(0, 3, (6, 17)).astype(np.int32)
    segments_bt[0], segments_bt[1] = 0, 2  # nothing real, nothing else
    order_bt, back_bt = jax.jit(front.order)(segments_bt)
    wanted = np.argsort(segments_bt == 0, axis=1, kind="stable")
    np.testing.assert_array_equal(order_bt, wanted)
    np.testing.assert_array_equal(back_bt, np.argsort(wanted, axis=1))
    x = rng.normal(size=(6, 17, 2, 3))
    there = front.take(jnp.asarray(x), order_bt)
    np.testing.assert_array_equal(front.take(there, back_bt), x.astype(there.dtype))


@pytest.mark.parametrize(("tokens", "experts_here"), [(20, 3), (1 << 14, 1 << 16)])
def test_choices_are_sorted_stably(tokens, experts_here):
    """Also where an expert and a place do not fit into one int32."""
    rng = np.random.default_rng(1)
    choice_ma = rng.integers(0, 5, (tokens, 2)).astype(np.int32)
    order, sizes = experts._sorted(choice_ma, experts_here)
    nobody = np.minimum(choice_ma.reshape(-1), experts_here)
    np.testing.assert_array_equal(order, np.argsort(nobody, kind="stable"))
    counts = np.bincount(nobody, minlength=5)[: min(5, experts_here)]
    np.testing.assert_array_equal(sizes[:5], counts)
