# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy in chunks: [b, t, v] logits never exist.

    loss = sum_bt mask * (lse - logit[target]) / count
    z    = sum_bt mask * lse^2 / count              (z-loss, PaLM arXiv 2204.02311)

The forward pass of a chunk also computes its gradient (softmax - onehot), so that the
backward pass multiplies nothing again: three products with the vocabulary instead of
the four of recomputation. Runs inside shard_map: rows by `batch`, their tokens by
`tokens` (in any order, as each stands for itself), vocabulary by `vocab`
(log-sum-exp reduced over its axis), the gradient of the output matrix is accumulated on
each device and reduced once, not once a chunk.

Shapes: hidden_btd in the compute dtype, w_vd the output matrix; targets_bt int32,
mask_bt float32. Sums are float32 and global. Chunk memory is `CHUNK_BYTES` of logits.
`reference` is the plain twin with the logits in the open.
Raises: ValueError when a chunk would be below one token.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib

CHUNK_BYTES = 32 << 20


def reference(hidden_btd, w_vd, targets_bt, mask_bt):
    """Plain twin: (sum of cross-entropies, sum of lse^2) over whole logits."""
    wide = jnp.promote_types(hidden_btd.dtype, jnp.float32)
    logits = jnp.einsum("btd,vd->btv", hidden_btd, w_vd).astype(wide)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets_bt[..., None], axis=-1)[..., 0]
    return jnp.sum(mask_bt * (lse - picked)), jnp.sum(mask_bt * lse**2)


def cross_entropy(
    hidden_btd: jax.Array,
    w_vd: jax.Array,
    targets_bt: jax.Array,
    mask_bt: jax.Array,
    *,
    z_coef: float,
    rules: mesh.Rules,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over counted targets of cross-entropy + z_coef * lse^2, and its parts.

    Args:
      hidden_btd: final hidden states.
      w_vd: output matrix (the embedding table when tied).
      targets_bt: next tokens.
      mask_bt: weight of each target.
      z_coef: weight of the z-loss.
      rules: where the dims lie.
      chunk: tokens of each row in a chunk; None fits CHUNK_BYTES.
    Returns:
      (total to differentiate, dict with `nll` and `z` sums), float32 scalars.
    """
    ways = mesh.axis_size(rules.vocab)
    rows = hidden_btd.shape[0] // mesh.axis_size(rules.batch)
    each = hidden_btd.shape[1] // mesh.axis_size(rules.split)
    chunk = chunk or _chunk(rows, each, w_vd.shape[0] // ways)
    batch_axes = rules.spread
    vocab_axes = mesh.names(rules.vocab) if mesh.active() else ()
    spread = vocab_axes if mesh.nested() else ()
    # Axes of the width alone gather equal parts: out here, where the type says so.
    embed_axes = tuple(a for a in mesh.names(rules.embed) if a in batch_axes)
    lies = jax.P(*rules.pspec("vocab"), embed_axes or None)
    w_vd = mesh.reshard(w_vd, lies)

    def local(x, w, targets, mask):
        if mesh.active():
            # Before the gather: what is summed over other axes is then a slice.
            w = mesh.vary(w, batch_axes)
        for axis in reversed(embed_axes):
            # One at a time, as in mesh.gather; its transpose scatters the gradient.
            if mesh.axis_size(axis) > 1:
                w = jax.lax.all_gather(w, axis, axis=1, tiled=True)
        w = w.astype(x.dtype)
        how = z_coef, chunk, vocab_axes, spread
        total, nll, z = _chunked(x, w, targets, mask, *how)
        sums = jnp.stack([total, nll, z])
        return jax.lax.psum(sums, batch_axes) if mesh.active() else sums

    run = mesh.local(
        local,
        inputs=(
            rules.pspec("batch", "tokens", None),
            lies,
            rules.pspec("batch", "tokens"),
            rules.pspec("batch", "tokens"),
        ),
        out=jax.P(),
    )
    sums = run(hidden_btd, w_vd, targets_bt, mask_bt)
    return sums[0], {"nll": sums[1], "z": sums[2]}


def _chunk(rows: int, t: int, v: int) -> int:
    """Tokens of each row so that rows * chunk * v float32 logits fit CHUNK_BYTES."""
    fit = CHUNK_BYTES // (4 * v * rows)
    return max(1, min(t, 1 << int(math.log2(max(fit, 1)))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _chunked(x, w, targets, mask, z_coef, chunk, vocab_axes, spread):
    sums, _ = _run(x, w, targets, mask, z_coef, chunk, vocab_axes, grad=False)
    return sums


def _chunked_fwd(x, w, targets, mask, z_coef, chunk, vocab_axes, spread):
    sums, grads = _run(x, w, targets, mask, z_coef, chunk, vocab_axes, grad=True)
    return sums, grads


def _chunked_bwd(z_coef, chunk, vocab_axes, spread, grads, cotangents):
    # Only `total` is differentiated; nll and z are reported.
    dx, dw = grads
    scale = cotangents[0]
    # Parts of dx are summed again outside; each row of dw is here alone.
    whole = jax.lax.psum(scale, spread) if spread else scale
    return (dx * scale.astype(dx.dtype)), (dw * whole.astype(dw.dtype)), None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _run(x, w, targets, mask, z_coef, chunk, vocab_axes, *, grad: bool) -> Any:
    """Scan over chunks of tokens -> ((total, nll, z), (dx, dw) or None)."""
    b, t, d = x.shape
    steps = -(-t // chunk)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if steps * chunk != t:
        rest = steps * chunk - t
        x = jnp.pad(x, [(0, 0), (0, rest), (0, 0)])
        targets, mask = (jnp.pad(a, [(0, 0), (0, rest)]) for a in (targets, mask))
    v = w.shape[0]
    first = jax.lax.axis_index(vocab_axes) * v if vocab_axes else 0

    def cut(a, i):
        return jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1)

    def body(carry, i):
        x_bcd, target_bc, mask_bc = cut(x, i), cut(targets, i), cut(mask, i)
        logits = jnp.einsum("bcd,vd->bcv", x_bcd, w, preferred_element_type=wide)
        top = jnp.max(logits, axis=-1)
        if vocab_axes:
            top = jax.lax.pmax(top, vocab_axes)
        e_bcv = jnp.exp(logits - top[..., None])
        hit = jnp.arange(v)[None, None, :] == (target_bc - first)[..., None]
        total = jnp.sum(e_bcv, axis=-1)
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        if vocab_axes:
            total, picked = jax.lax.psum((total, picked), vocab_axes)
        lse = top + jnp.log(total)
        nll = jnp.sum(mask_bc * (lse - picked))
        z = jnp.sum(mask_bc * jnp.square(lse))
        sums = carry[0] + jnp.stack([nll + z_coef * z, nll, z]).astype(wide)
        if not grad:
            return (sums,), None
        # d lse / d logits = softmax, so the two terms share it.
        slope = mask_bc * (1 + 2 * z_coef * lse)
        dlogits = e_bcv * (slope / total)[..., None]
        dlogits = jnp.where(hit, dlogits - mask_bc[..., None], dlogits).astype(x.dtype)
        # As matrices: a product over two dims (b, c) would copy dlogits transposed.
        dlogits = dlogits.reshape(-1, v)
        dx = jnp.einsum("mv,vd->md", dlogits, w, preferred_element_type=wide)
        dx = dx.reshape(x_bcd.shape)
        if vocab_axes:
            dx = jax.lax.psum(dx, vocab_axes)
        dw = carry[1] + jnp.einsum(
            "mv,md->vd", dlogits, x_bcd.reshape(-1, d), preferred_element_type=wide
        )
        return (sums, dw), dx.astype(x.dtype)

    near = mesh.varying(x)
    zero = mesh.vary(jnp.zeros((3,), wide), near)
    if not grad:
        (sums,), _ = jax.lax.scan(body, (zero,), jnp.arange(steps))
        return tuple(sums), None
    init = (zero, mesh.vary(jnp.zeros(w.shape, wide), near | mesh.varying(w)))
    (sums, dw), dxs = jax.lax.scan(body, init, jnp.arange(steps))
    dx = jnp.moveaxis(dxs, 0, 1).reshape(b, steps * chunk, d)[:, :t]
    return tuple(sums), (dx, dw.astype(w.dtype))


def of_rows(
    spec: spec_lib.Spec,
    params: Any,
    hidden_btd: jax.Array,
    rows: dict[str, jax.Array],
    *,
    z_coef: float,
    rules: mesh.Rules,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`cross_entropy` of the targets of rows (or chunks), by the head of the model."""
    return cross_entropy(
        hidden_btd,
        decoder.head_vd(spec, params),
        rows["targets_bt"],
        rows["mask_bt"],
        z_coef=z_coef,
        rules=rules,
    )
