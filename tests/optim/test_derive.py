# SPDX-License-Identifier: Apache-2.0
"""Derived numbers against the published rules worked by hand, and what is printed."""

import math

import jax
import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.optim import build, derive, schedules


def test_everything_open_follows_the_published_rules():
    got = derive.derive(build.OptimConfig(), num_weights=400_000_000, round_to=4096)
    assert got.tokens == 8_000_000_000
    # Step Law worked with logarithms: ln B = ln 0.58 + 0.571 ln D
    batch = math.exp(math.log(0.58) + 0.571 * math.log(8e9))
    assert got.batch_tokens % 4096 == 0
    assert abs(got.batch_tokens - batch) <= 2048
    assert got.num_steps == 8_000_000_000 // got.batch_tokens
    rate = math.exp(math.log(1.79) - 0.713 * math.log(4e8) + 0.307 * math.log(8e9))
    assert got.optim.lr_peak == pytest.approx(rate, rel=0.02)  # batch is rounded
    assert got.optim.warmup_steps == 40  # 2 / (1 - 0.95)
    assert got.optim.decay_steps == got.num_steps - 40
    assert "extrapolated" not in "\n".join(got.lines)
    schedules.make(got.optim, got.num_steps)  # nothing is left open


def test_rate_follows_the_square_root_of_the_batch():
    def lr(batch_tokens):
        return derive.derive(
            build.OptimConfig(),
            num_weights=10**9,
            tokens=20 * 10**9,
            batch_tokens=batch_tokens,
        ).optim.lr_peak

    assert lr(1 << 20) / lr(1 << 18) == pytest.approx(2, rel=0.01)


def test_given_numbers_are_never_changed():
    given = build.OptimConfig(
        name="muon", lr_peak=0.02, schedule="wsd", warmup_steps=5, decay_steps=11
    )
    got = derive.derive(given, num_weights=1000, tokens=64_100, batch_tokens=640)
    assert (got.optim, got.tokens, got.batch_tokens) == (given, 64_100, 640)
    assert got.num_steps == 100
    assert [line.split(".")[0] for line in got.lines] == list("12345678")
    assert sum("given" in line for line in got.lines) == 6


def test_small_models_stay_inside_the_searched_rates():
    got = derive.derive(build.OptimConfig(), num_weights=100_000)
    assert got.optim.lr_peak == pytest.approx(2**-7, rel=0.01)
    assert any("extrapolated" in line for line in got.lines)


@pytest.mark.parametrize("num_steps", [1, 2, 9, 10, 35, 1000])
@pytest.mark.parametrize("schedule", schedules.NAMES)
def test_short_runs_get_a_schedule_that_fits(num_steps, schedule):
    got = derive.derive(
        build.OptimConfig(schedule=schedule),
        num_weights=5000,
        tokens=num_steps * 64,
        batch_tokens=64,
    )
    assert got.num_steps == num_steps
    assert got.optim.warmup_steps <= num_steps / 10
    lr = schedules.make(got.optim, num_steps)
    steps = np.arange(1000) % num_steps  # one shape, compiled once
    assert jax.vmap(lr)(steps).max() == pytest.approx(got.optim.lr_peak)


def test_a_given_decay_leaves_less_room_for_the_warm_up():
    open_warmup = build.OptimConfig(schedule="wsd", decay_steps=95)
    got = derive.derive(open_warmup, num_weights=9, tokens=6400, batch_tokens=64)
    assert got.optim.warmup_steps == 5


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_weights": 0}, "num_weights=0"),
        ({"num_weights": 10, "tokens": -5}, "tokens=-5"),
        (
            {"num_weights": 10, "tokens": 100, "batch_tokens": 128},
            "less than one batch",
        ),
        ({"num_weights": 10, "tokens": 100, "round_to": 4096}, "less than one batch"),
    ],
)
def test_impossible_sizes_are_refused(sizes, words):
    with pytest.raises(config.InputError, match=words):
        derive.derive(build.OptimConfig(), **sizes)
