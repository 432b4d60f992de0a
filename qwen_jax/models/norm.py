# SPDX-License-Identifier: Apache-2.0
"""RMSNorm (arXiv 1910.07467), computed in float32 and returned in the input's dtype.

LayerNorm (arXiv 1607.06450) likewise, with a bias, for the vision towers that have it.

Shapes: x_...d, weight_d -> same as x; a weight_rd has a row for each of the r streams
of x_...rd. The statistic is a mean of squares over the last
dim; `eps` is added to it. The product with the weight is taken after the cast back, the
order the published Qwen checkpoints were trained with; with `offset`, which the
families from Qwen3-Next on have, the product with 1 + w is taken before the cast.
"""

import functools

import jax
import jax.numpy as jnp


def rms_norm(
    x: jax.Array, weight_d: jax.Array, eps: float, offset: bool = False
) -> jax.Array:
    """y = x / sqrt(mean(x^2) + eps) * w, or with `offset` * (1 + w)."""
    return _rms_norm(x, weight_d, eps, offset)


# The backward pass computes it again from x instead of keeping what lies between.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _rms_norm(x, weight_d, eps, offset):
    dtype = x.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    x = x.astype(wide)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    weight = weight_d.reshape((1,) * (x.ndim - weight_d.ndim) + weight_d.shape)
    if offset:
        return (x * scale * (1 + weight.astype(wide))).astype(dtype)
    return (x * scale).astype(dtype) * weight.astype(dtype)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3,))
def layer_norm(
    x: jax.Array, weight_d: jax.Array, bias_d: jax.Array, eps: float
) -> jax.Array:
    """y = (x - mean) / sqrt(variance + eps) * w + b, all in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    shape = (1,) * (x.ndim - 1) + weight_d.shape
    y = x.astype(wide)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y * weight_d.astype(wide).reshape(shape) + bias_d.astype(wide).reshape(shape)
    return y.astype(x.dtype)
