# SPDX-License-Identifier: Apache-2.0
"""Dual chunk attention of one head by a loop over (query, key) pairs in float64.

From the matrix of relative positions of arXiv 2402.17463, with chunk_size for its c - 1
as the largest position, as the published code of Qwen2.5-1M has it.
"""

import math

import numpy as np


def distance(i: int, j: int, chunk_size: int, local_size: int) -> int:
    """The relative position of query i and key j <= i of one document."""
    c = chunk_size - local_size
    if i // c == j // c:
        return i - j
    if i // c == j // c + 1:
        return min(i % c + c, chunk_size) - j % c
    return min(2 * c - 1, chunk_size) - j % c


def heat(i: int, original: int) -> float:
    """What the scores of query i are multiplied by."""
    if not original:
        return 1.0
    return max(1.0, 0.1 * math.log((i + 1) / original) + 1.0) ** 2


def rotated(x_k: np.ndarray, position: int, theta: float) -> np.ndarray:
    """A head turned by a position: halves against each other."""
    half = len(x_k) // 2
    angle = position * theta ** -(np.arange(half) / half)
    a, b = x_k[:half], x_k[half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin])


def attention(q_tk, k_tk, v_tk, segments_t, *, chunk_size, local_size, original, theta):
    """[t, k] from queries and keys that are not turned yet; 0 where segments are 0."""
    t, width = q_tk.shape
    at = np.zeros(t, int)
    for i in range(1, t):
        at[i] = at[i - 1] + 1 if segments_t[i] == segments_t[i - 1] else 0
    out = np.zeros((t, width))
    for i in range(t):
        if segments_t[i] == 0:
            continue
        keys = [j for j in range(i + 1) if segments_t[j] == segments_t[i]]
        scores = []
        for j in keys:
            far = distance(at[i], at[j], chunk_size, local_size)
            score = rotated(q_tk[i], far, theta) @ k_tk[j] / math.sqrt(width)
            scores.append(score * heat(at[i], original))
        weight = np.exp(np.array(scores) - max(scores))
        out[i] = (weight / weight.sum()) @ v_tk[keys]
    return out
