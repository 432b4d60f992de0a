# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of arXiv 2412.06464: float64 loops from its equations."""

import numpy as np


def one_row(q, k, v, g, beta, state=None):
    """Tokens [t, h, ...] of one document -> (outputs [t, h, u], state [h, k, u])."""
    t, h, width = k.shape
    s = np.zeros((h, width, v.shape[-1])) if state is None else state.copy()
    out = np.zeros(v.shape)
    for i in range(t):
        for head in range(h):
            s[head] = np.exp(g[i, head]) * s[head]
            error = v[i, head] - s[head].T @ k[i, head]
            s[head] = s[head] + beta[i, head] * np.outer(k[i, head], error)
            out[i, head] = s[head].T @ q[i, head]
    return out, s
