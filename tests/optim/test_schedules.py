# SPDX-License-Identifier: Apache-2.0
"""Schedules against the oracle at every step, at the joints, and traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.optim import build, schedules
from tests.oracles import optim as oracle


def optim(**fields) -> build.OptimConfig:
    defaults = {"lr_peak": 3e-3, "warmup_steps": 7, "lr_end_ratio": 0.1}
    return build.OptimConfig(**(defaults | fields))


@pytest.mark.parametrize("schedule", schedules.NAMES)
@pytest.mark.parametrize(
    ("warmup", "decay", "end"), [(7, -1, 0.1), (0, 30, 0.0), (1, 50, 1.0)]
)
def test_every_step_matches_the_oracle(schedule, warmup, decay, end):
    num_steps = 100
    record = optim(
        schedule=schedule, warmup_steps=warmup, decay_steps=decay, lr_end_ratio=end
    )
    lengths = {"wsd": 20}.get(schedule, num_steps - warmup) if decay < 0 else decay
    steps = np.arange(num_steps + 5)
    got = jax.jit(jax.vmap(schedules.make(record, num_steps)))(steps)
    want = [
        oracle.lr(schedule, s, num_steps, 3e-3, warmup, lengths, end) for s in steps
    ]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", schedules.NAMES)
def test_joints(schedule):
    """No update is wasted on a rate of zero; peak and end are where they should be."""
    lr = schedules.make(optim(schedule=schedule), 100)
    assert lr(0) == pytest.approx(3e-3 / 7)
    assert lr(6) == pytest.approx(3e-3) == lr(7)
    assert lr(100) == pytest.approx(3e-4) == lr(10**6)
    assert all(lr(s + 1) <= lr(s) for s in range(7, 100))
    assert lr(79) == pytest.approx(3e-3) if schedule == "wsd" else lr(79) < 2e-3
    assert lr(3).dtype == jnp.float32


def test_exact_at_large_steps():
    """Steps above 2^24 still differ in progress from their neighbours."""
    n = 2**27
    lr = schedules.make(optim(schedule="wsd", warmup_steps=0, decay_steps=100), n)
    got = [float(lr(n - 100 + i)) for i in range(101)]
    want = [oracle.lr("wsd", n - 100 + i, n, 3e-3, 0, 100, 0.1) for i in range(101)]
    np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize(
    ("fields", "num_steps", "words"),
    [
        ({"lr_peak": 0.0}, 100, "lr_peak"),
        ({"warmup_steps": -1}, 100, "warmup_steps"),
        ({"warmup_steps": 100}, 100, "num_steps=100"),
        ({"warmup_steps": 10, "decay_steps": -1}, 3, "warmup_steps=10"),
        ({"warmup_steps": 7, "decay_steps": 94}, 100, "decay_steps=94"),
        ({}, 0, "num_steps=0"),
    ],
)
def test_what_does_not_fit_is_refused(fields, num_steps, words):
    with pytest.raises(config.InputError, match=words):
        schedules.make(optim(**fields), num_steps)


def test_one_step_run_has_a_rate():
    for warmup in (0, 1):
        lr = schedules.make(optim(warmup_steps=warmup), 1)
        assert lr(0) == pytest.approx(3e-3)
