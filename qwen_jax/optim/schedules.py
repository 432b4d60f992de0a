# SPDX-License-Identifier: Apache-2.0
"""Learning rate as a function of the step: cosine, linear, warm-up-stable-decay.

With n steps, w of warm-up, a decay that lasts c steps and starts at s, progress
q = clip((step - s) / c, 0, 1), end ratio r:

    warm-up   lr = lr_peak * (step + 1) / w                       for step < w
    cosine    lr = lr_peak * (r + (1 - r) * (1 + cos(pi q)) / 2)   s = w, c = n - w
    linear    lr = lr_peak * (r + (1 - r) * (1 - q))               s = w, c = n - w
    wsd       lr = lr_peak * (r + (1 - r) * (1 - sqrt(q)))         s = n - c, c = n / 5

Source: cosine, Loshchilov and Hutter (arXiv 1608.03983); warm-up-stable-decay, MiniCPM
(arXiv 2404.06395), with the 1 - sqrt decay over the last fifth of Hägele et al. (arXiv
2405.18392). Differs: the warm-up counts from 1, so that no update has a rate of zero.

Units: `step` is the number of updates already made: the first update has step 0. So the
end ratio is reached at step n, one after the last update (n - 1).
Invariants: works on Python ints and on traced int32; the result is a float32 scalar;
steps past the end keep the last rate.
Raises: config.InputError for a schedule that is not known or does not fit in num_steps.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_jax import config

if typing.TYPE_CHECKING:
    from qwen_jax.optim import build

NAMES = ("cosine", "linear", "wsd")
WSD_SHARE = 0.2  # of all steps, where decay_steps is left open

Schedule = Callable[[int | jax.Array], jax.Array]


def phases(optim: build.OptimConfig, num_steps: int) -> tuple[int, int, int]:
    """(warm-up steps, step at which the decay starts, steps it lasts)."""
    if optim.schedule not in NAMES:
        hint = config.nearest(optim.schedule, NAMES)
        raise config.InputError(f"optim.schedule={optim.schedule!r} is not known{hint}")
    warmup, decay = optim.warmup_steps, optim.decay_steps
    if warmup < 0:
        raise config.InputError(
            f"optim.warmup_steps={warmup} is left open: give a number of steps, or let "
            "derive.derive fill it in"
        )
    if decay < 0:
        share = WSD_SHARE if optim.schedule == "wsd" else 1.0
        decay = max(0, min(round(share * num_steps), num_steps - warmup))
    if num_steps < 1 or warmup + decay > num_steps or warmup == num_steps > 1:
        raise config.InputError(
            f"optim.warmup_steps={warmup} and decay_steps={decay} do not fit in "
            f"num_steps={num_steps}; lower optim.warmup_steps or optim.decay_steps"
        )
    start = num_steps - decay if optim.schedule == "wsd" else warmup
    return warmup, start, decay


def make(optim: build.OptimConfig, num_steps: int) -> Schedule:
    """step -> learning rate, float32; see the table at the top of this file."""
    if optim.lr_peak <= 0:
        raise config.InputError(
            f"optim.lr_peak={optim.lr_peak} is left open: give a positive number, or "
            "let derive.derive fill it in"
        )
    warmup, start, decay = phases(optim, num_steps)
    falls = {
        "cosine": lambda q: (1 + jnp.cos(jnp.pi * q)) / 2,
        "linear": lambda q: 1 - q,
        "wsd": lambda q: 1 - jnp.sqrt(q),
    }
    fall, end = falls[optim.schedule], optim.lr_end_ratio

    def lr(step: int | jax.Array) -> jax.Array:
        step = jnp.asarray(step)  # subtract as integers: exact at any length
        rise = (step + 1).astype(jnp.float32) / max(warmup, 1)
        q = jnp.clip((step - start).astype(jnp.float32) / max(decay, 1), 0.0, 1.0)
        ratio = jnp.where(step < warmup, rise, end + (1 - end) * fall(q))
        return jnp.float32(optim.lr_peak) * ratio

    return lr
