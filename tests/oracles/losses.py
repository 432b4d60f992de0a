# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy and z-loss from their definitions, one token at a time, in float64."""

import numpy as np


def cross_entropy(hidden_btd, w_vd, targets_bt, mask_bt, z_coef):
    """(total, nll, z, d total / d hidden, d total / d w) with whole logits."""
    x, w, mask = (np.asarray(a, np.float64) for a in (hidden_btd, w_vd, mask_bt))
    nll = z = 0.0
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for b, t in np.ndindex(mask.shape):
        logits = w @ x[b, t]
        top = logits.max()
        lse = top + np.log(np.exp(logits - top).sum())
        nll += mask[b, t] * (lse - logits[targets_bt[b, t]])
        z += mask[b, t] * lse**2
        d_logits = np.exp(logits - lse) * (1 + 2 * z_coef * lse)
        d_logits[targets_bt[b, t]] -= 1
        dx[b, t] = mask[b, t] * d_logits @ w
        dw += mask[b, t] * np.outer(d_logits, x[b, t])
    return nll + z_coef * z, nll, z, dx, dw
