# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention as loops over rows, heads and queries, in float64.

Written from softmax(q k^T / sqrt(width)) v and its derivative: one query at a time,
with the list of the keys it may see, so that no mask is shared with the code.
"""

import numpy as np


def visible(t, segments, window, causal=True):
    """Keys that query t may see: not later, near enough, of its own segment."""
    if segments[t] == 0:
        return []
    stop = t + 1 if causal else len(segments)
    near = range(max(0, t - window + 1) if window else 0, stop)
    return [s for s in near if segments[s] == segments[t]]


def attention(q, k, v, segments, window=0, causal=True):
    """[b, t, n, k] from queries and [b, s, h, k] keys and values."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n, keys, weights in _rows(q, k, segments, window, causal):
        out[b, t, n] = weights @ v[b, keys, n // (q.shape[2] // k.shape[2])]
    return out


def gradients(q, k, v, segments, d_out, window=0, causal=True):
    """(dq, dk, dv) for the cotangent d_out of the result."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = q.shape[3] ** -0.5
    for b, t, n, keys, weights in _rows(q, k, segments, window, causal):
        h = n // (q.shape[2] // k.shape[2])
        d_weights = v[b, keys, h] @ d_out[b, t, n]
        d_scores = weights * (d_weights - weights @ d_weights)
        dq[b, t, n] = scale * d_scores @ k[b, keys, h]
        for s, w, d in zip(keys, weights, d_scores, strict=True):
            dk[b, s, h] += scale * d * q[b, t, n]
            dv[b, s, h] += w * d_out[b, t, n]
    return dq, dk, dv


def _rows(q, k, segments, window, causal):
    """(row, query, head, keys it sees, their weights) wherever any is seen."""
    rows, tokens, heads, width = q.shape
    for b in range(rows):
        for t in range(tokens):
            keys = visible(t, segments[b], window, causal)
            for n in range(heads if keys else 0):
                scores = k[b, keys, n // (heads // k.shape[2])] @ q[b, t, n]
                scores = np.exp((scores - scores.max()) * width**-0.5)
                yield b, t, n, keys, scores / scores.sum()
