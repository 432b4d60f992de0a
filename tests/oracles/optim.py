# SPDX-License-Identifier: Apache-2.0
"""AdamW, Muon, clipping and schedules as NumPy float64 loops, written from the papers.

Nothing here is shared with qwen_jax: weights are lists of matrices, one per layer, and
every rule is spelled out per element or per matrix.
"""

import math

import numpy as np


def clip(grads: list[np.ndarray], max_norm: float) -> list[np.ndarray]:
    """Scale all gradients alike so that their joint norm is at most max_norm."""
    total = 0.0
    for grad in grads:
        for value in grad.ravel():
            total += float(value) ** 2
    norm = math.sqrt(total)
    return [g * (max_norm / norm) if norm > max_norm else g for g in grads]


class AdamW:
    """Algorithm 2 of arXiv 1711.05101 for one array, decay multiplied by the rate."""

    def __init__(self, shape, b1, b2, eps, weight_decay):
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0
        self.b1, self.b2, self.eps, self.weight_decay = b1, b2, eps, weight_decay

    def step(self, p, g, lr):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m_hat = self.m / (1 - self.b1**self.t)
        v_hat = self.v / (1 - self.b2**self.t)
        return p - lr * (m_hat / (np.sqrt(v_hat) + self.eps) + self.weight_decay * p)


def newton_schulz(x: np.ndarray, num_iters: int) -> np.ndarray:
    """The quintic of Jordan et al. through the singular values: U f(f(...f(s))) V."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / (np.sqrt(np.sum(s**2)) + 1e-8)
    for _ in range(num_iters):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ v


class Muon:
    """Muon with Nesterov momentum for one matrix, RMS-matched (arXiv 2502.16982)."""

    def __init__(self, shape, beta, num_iters, rms, weight_decay):
        self.m, self.t = np.zeros(shape), 0
        self.beta, self.num_iters, self.rms = beta, num_iters, rms
        self.weight_decay = weight_decay

    def step(self, p, g, lr):
        self.t += 1
        self.m = self.beta * self.m + (1 - self.beta) * g
        ahead = self.m / (1 - self.beta ** (self.t + 1))
        now = g / (1 - self.beta**self.t)
        u = newton_schulz(self.beta * ahead + (1 - self.beta) * now, self.num_iters)
        u = self.rms * math.sqrt(max(p.shape)) * u
        return p - lr * (u + self.weight_decay * p)


def lr(schedule, step, num_steps, peak, warmup, decay, end):
    """Rate of the update that has `step` updates before it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = num_steps - decay if schedule == "wsd" else warmup
    if step <= start:
        return peak
    done = min((step - start) / decay, 1.0)
    if schedule == "cosine":
        left = math.cos(done * math.pi / 2) ** 2
    elif schedule == "linear":
        left = 1.0 - done
    else:
        left = 1.0 - done**0.5
    return peak * end + peak * (1.0 - end) * left
