# SPDX-License-Identifier: Apache-2.0
"""Rotary positions (arXiv 2104.09864), with linear and YaRN (arXiv 2309.00071) scaling.

Tokens of images and videos have three positions, temporal, row and column (M-RoPE,
arXiv 2409.12191): each rotated pair turns with one of them. Text has three equal ones.

Layout: the two halves of a head rotate against each other (x1 = first half, x2 = second
half), the layout of the published checkpoints.

Shapes: positions_bt int32 (or [3, b, t]) -> cos_btk, sin_btk float32 with k = rotated
width / 2; `apply` takes x_btnk with the full head width.
Invariants: angles are always computed in float32 or wider, whatever x is.
YaRN follows section 3 of its paper: `find_dim(rotations) = K ln(L / (2 pi r)) /
(2 ln theta)` bounds a linear ramp between interpolated and plain frequencies, and cos
and sin are multiplied by the attention factor.
Raises: config.InputError for three positions in a model that has no sections for them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config
from qwen_jax.models import spec as spec_lib


def frequencies(spec: spec_lib.Spec) -> tuple[np.ndarray, float]:
    """(inverse frequencies [rotary_width / 2] float64, factor on cos and sin)."""
    k = spec.rotary_width
    plain = spec.rope_theta ** -(np.arange(0, k, 2, dtype=np.float64) / k)
    scaling = spec.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0

    def dim_of(rotations: float) -> float:
        turns = scaling.original_positions / (rotations * 2 * math.pi)
        return k * math.log(turns) / (2 * math.log(spec.rope_theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, k - 1)
    span = max(high - low, 1e-3)
    ramp = np.clip((np.arange(k // 2, dtype=np.float64) - low) / span, 0, 1)
    inverse = plain / scaling.factor * ramp + plain * (1 - ramp)
    factor = scaling.attention_factor
    if factor is None:
        factor = 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
    return inverse, factor


def section_of(spec: spec_lib.Spec) -> np.ndarray:
    """Which of the three positions each rotated pair turns with: [rotary_width / 2]."""
    _, rows, columns = spec.mrope_sections
    if not spec.mrope_interleaved:
        return np.repeat(np.arange(3), spec.mrope_sections)
    out = np.zeros(spec.rotary_width // 2, np.int64)
    out[1 : 3 * rows : 3] = 1
    out[2 : 3 * columns : 3] = 2
    return out


def angles(spec: spec_lib.Spec, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos_btk, sin_btk of positions [b, t] or [3, b, t], scaled; float32 (float64 in
    float64 runs)."""
    inverse, factor = frequencies(spec)
    wide = jnp.promote_types(spec.compute_dtype, jnp.float32)
    inverse_k = jnp.asarray(inverse, wide)[None, None, :]
    if positions.ndim == 2:
        angle_btk = positions[..., None].astype(wide) * inverse_k
        return jnp.cos(angle_btk) * factor, jnp.sin(angle_btk) * factor
    if not spec.mrope_sections or positions.shape[0] != 3:
        raise config.InputError(
            f"positions of shape {positions.shape} for a {spec.family} model with "
            f"mrope_sections={spec.mrope_sections}: wanted [rows, tokens], or "
            "[3, rows, tokens] for a model with three sections"
        )
    which_k = section_of(spec)[None, None, :]
    three = [x[..., None].astype(wide) * inverse_k for x in positions]
    angle_btk = jnp.where(
        which_k == 0, three[0], jnp.where(which_k == 1, three[1], three[2])
    )
    return jnp.cos(angle_btk) * factor, jnp.sin(angle_btk) * factor


def apply(x_btnk: jax.Array, cos_btk: jax.Array, sin_btk: jax.Array) -> jax.Array:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32, back to x's dtype.

    Dims of a head beyond the rotated ones stay as they are.
    """
    half = cos_btk.shape[-1]
    turning = x_btnk[..., : 2 * half].astype(cos_btk.dtype)
    x1, x2 = jnp.split(turning, 2, axis=-1)
    cos, sin = cos_btk[:, :, None, :], sin_btk[:, :, None, :]
    y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    y = y.astype(x_btnk.dtype)
    if 2 * half == x_btnk.shape[-1]:
        return y
    return jnp.concatenate([y, x_btnk[..., 2 * half :]], axis=-1)
