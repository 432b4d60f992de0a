# SPDX-License-Identifier: Apache-2.0
"""Self-attention in blocks, causal or not: memory linear in length, both passes.

Source: online softmax of FlashAttention (arXiv 2205.14135), in plain XLA. The forward
pass keeps each query's log-sum-exp; the backward pass computes probabilities again from
it, so no [t, s] matrix lives outside one block pair.

A query block meets only the key blocks it can see: those up to the diagonal, inside the
window, and, in packed rows, from the first block that holds the segment its first query
is in. That last bound is data, so rows packed with short documents cost what short
documents cost; without the causal mask the same holds of the last block. Short rows (at
most `UNROLL` blocks) are written out, each query block against its whole prefix in one
product, which is 2-4x faster on a CPU.

Shapes: q_btnk, k_bshk, v_bshk with s = t and n a multiple of h; segments_bt int32 (0 is
padding; equal numbers are contiguous) or None; result out_btnk in q's dtype.
A token attends where key index <= query index (unless `causal` is off), within `window`
tokens when window > 0, and inside its own segment. A padding query gets zeros. Softmax
is float32.
`reference` is the plain twin: the same function with the [t, s] matrix in the open.
Raises: ValueError when shapes do not fit together, or a window is not causal.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import mesh

UNROLL = 8
NEG = -1e30  # finite: a row of only masked scores must not make NaN


def reference(
    q_btnk, k_bshk, v_bshk, segments_bt=None, *, window: int = 0, causal: bool = True
):
    """The plain twin: softmax over a full [t, s] matrix."""
    b, t, n, k = q_btnk.shape
    h = k_bshk.shape[2]
    q_bthgk = q_btnk.reshape(b, t, h, n // h, k).astype(wide_of(q_btnk)) * k**-0.5
    scores = jnp.einsum("bthgk,bshk->bhgts", q_bthgk, k_bshk.astype(q_bthgk.dtype))
    query, key = jnp.arange(t)[:, None], jnp.arange(t)[None, :]
    seen = query >= key if causal else jnp.ones((t, t), bool)
    if window:
        seen &= query - key < window
    seen = jnp.broadcast_to(seen[None], (b, t, t))
    if segments_bt is not None:
        same = segments_bt[:, :, None] == segments_bt[:, None, :]
        seen = seen & same & (segments_bt > 0)[:, :, None]
    seen = seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, NEG), axis=-1)
    weights = jnp.where(seen, weights, 0.0)
    out = jnp.einsum("bhgts,bshk->bthgk", weights, v_bshk.astype(weights.dtype))
    return out.reshape(b, t, n, k).astype(q_btnk.dtype)


def attention(
    q_btnk: jax.Array,
    k_bshk: jax.Array,
    v_bshk: jax.Array,
    segments_bt: jax.Array | None = None,
    *,
    window: int = 0,
    block: int | None = None,
    causal: bool = True,
) -> jax.Array:
    """Self-attention of one device's rows and heads.

    Args:
      q_btnk: queries [b, t, n, k].
      k_bshk: keys [b, t, h, k]; query head i uses key head i // (n / h).
      v_bshk: values [b, t, h, k].
      segments_bt: int32 [b, t], or None for one segment a row and no padding.
      window: tokens a query sees, itself included; 0 for all before it.
      block: tokens in a block; None chooses by length.
      causal: whether a query sees only what stands before it.
    Returns:
      [b, t, n, k].
    """
    b, t, n, k = q_btnk.shape
    h = k_bshk.shape[2]
    if k_bshk.shape != (b, t, h, k) or v_bshk.shape != k_bshk.shape or n % h:
        raise ValueError(
            f"attention shapes do not fit: q {q_btnk.shape}, k {k_bshk.shape}, "
            f"v {v_bshk.shape}"
        )
    if window and not causal:
        raise ValueError(f"window={window} goes with causal attention only")
    block = block or block_for(t)
    padded = -(-t // block) * block
    if segments_bt is None and padded != t:
        segments_bt = jnp.ones((b, t), jnp.int32)
    q_bhgtk = (q_btnk * k**-0.5).reshape(b, t, h, n // h, k).transpose(0, 2, 3, 1, 4)
    k_bhsk, v_bhsk = k_bshk.transpose(0, 2, 1, 3), v_bshk.transpose(0, 2, 1, 3)
    if padded != t:
        rest = padded - t
        q_bhgtk = jnp.pad(q_bhgtk, [(0, 0)] * 3 + [(0, rest), (0, 0)])
        k_bhsk = jnp.pad(k_bhsk, [(0, 0)] * 2 + [(0, rest), (0, 0)])
        v_bhsk = jnp.pad(v_bhsk, [(0, 0)] * 2 + [(0, rest), (0, 0)])
        segments_bt = jnp.pad(segments_bt, [(0, 0), (0, rest)])
    out_bhgtk = _attend(q_bhgtk, k_bhsk, v_bhsk, segments_bt, window, block, causal)
    out_btnk = out_bhgtk.transpose(0, 3, 1, 2, 4).reshape(b, padded, n, k)
    return out_btnk[:, :t]


def block_for(t: int) -> int:
    """128 up to 1,024 tokens (written out), larger blocks in the loop above that."""
    if t <= 128 * UNROLL:
        return min(128, max(t, 1))
    return 256 if t <= 4096 else 512


def wide_of(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, segments, window, block, causal):
    return _forward(q, k, v, segments, window, block, causal)[0]


def _attend_fwd(q, k, v, segments, window, block, causal):
    out, lse = _forward(q, k, v, segments, window, block, causal)
    # Named inside the rule, so that a remat policy can keep both (decoder.SAVED).
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, out, lse)


def _attend_bwd(window, block, causal, saved, d_out):
    q, k, v, segments, out, lse = saved
    # delta = rowsum(dO * O) = sum_s P dP, so dS = P (dP - delta).
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)
    backward = _backward_unrolled if _unrolls(q, block) else _backward_loop
    how = (window, block, causal)
    dq, dk, dv = backward(q, k, v, segments, lse, delta, d_out, *how)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _unrolls(q: jax.Array, block: int) -> bool:
    return q.shape[3] <= block * UNROLL


def _forward(q, k, v, segments, window, block, causal):
    forward = _forward_unrolled if _unrolls(q, block) else _forward_loop
    return forward(q, k, v, segments, window, block, causal)


def score(q_bhgqk, k_bhsk):
    """[b, h, g, q, k] x [b, h, s, k] -> float32 [b, h, g, q, s].

    The g query heads of a kv head are folded into the query dim: one matrix product of
    g*q rows for each kv head, and no repeated keys.
    """
    b, h, g, q, k = q_bhgqk.shape
    rows = q_bhgqk.reshape(b, h, g * q, k)
    scores = jnp.einsum(
        "bhqk,bhsk->bhqs", rows, k_bhsk, preferred_element_type=wide_of(q_bhgqk)
    )
    return scores.reshape(b, h, g, q, k_bhsk.shape[2])


def weigh(p_bhgqs, v_bhsk):
    """[b, h, g, q, s] x [b, h, s, k] -> float32 [b, h, g, q, k]."""
    b, h, g, q, s = p_bhgqs.shape
    rows = p_bhgqs.reshape(b, h, g * q, s).astype(v_bhsk.dtype)
    out = jnp.einsum(
        "bhqs,bhsk->bhqk", rows, v_bhsk, preferred_element_type=wide_of(v_bhsk)
    )
    return out.reshape(b, h, g, q, v_bhsk.shape[3])


def weigh_back(p_bhgqs, x_bhgqk):
    """Transposed product, summed over the g heads too: -> float32 [b, h, s, k]."""
    b, h, g, q, s = p_bhgqs.shape
    p = p_bhgqs.reshape(b, h, g * q, s).astype(x_bhgqk.dtype)
    x = x_bhgqk.reshape(b, h, g * q, x_bhgqk.shape[4])
    return jnp.einsum("bhqs,bhqk->bhsk", p, x, preferred_element_type=wide_of(x))


def visible(query, key, segments_q, segments_s, window, causal):
    """Mask [b or 1, 1, 1, q, s] (or None for all seen) of index and segment rules."""
    seen = None
    if causal:
        seen = (query[:, None] >= key[None, :])[None]
    if window:
        near = (query[:, None] - key[None, :] < window)[None]
        seen = near if seen is None else seen & near
    if segments_q is not None:
        same = segments_q[:, :, None] == segments_s[:, None, :]
        same &= (segments_q > 0)[:, :, None]
        seen = same if seen is None else seen & same
    return None if seen is None else seen[:, None, None]


def masked(scores, seen):
    if seen is None:
        return scores
    return jnp.where(jnp.broadcast_to(seen, scores.shape), scores, NEG)


def exp_below(scores, lse):
    """exp(scores - lse): zero where masked: lse is far above NEG (see `top_of`)."""
    return jnp.exp(scores - lse[..., None])


def top_of(scores):
    """The largest score of each query; half of NEG where nothing is seen, so that every
    exp(NEG - top) is zero without another mask."""
    return jnp.maximum(jnp.max(scores, axis=-1), NEG / 2)


# ---- Short rows: every query block against its whole visible prefix, written out.


def _spans(t, block, window, causal):
    """((query start, one past its end), the same of the visible keys) of each block."""
    for start in range(0, t, block):
        low = max(0, start - window + 1) // block * block if window else 0
        yield (start, start + block), (low, start + block if causal else t)


def _part(x, start, stop, dim):
    return jax.lax.slice_in_dim(x, start, stop, axis=dim)


def _block_mask(segments, queries, keys, window, causal):
    query, key = jnp.arange(*queries), jnp.arange(*keys)
    if segments is None:
        return visible(query, key, None, None, window, causal)
    seg_q, seg_s = segments[:, slice(*queries)], segments[:, slice(*keys)]
    return visible(query, key, seg_q, seg_s, window, causal)


def _forward_unrolled(q, k, v, segments, window, block, causal):
    outs, lses = [], []
    for queries, keys in _spans(q.shape[3], block, window, causal):
        seen = _block_mask(segments, queries, keys, window, causal)
        scores = masked(score(_part(q, *queries, 3), _part(k, *keys, 2)), seen)
        top = top_of(scores)
        p = exp_below(scores, top)
        total = jnp.sum(p, axis=-1)
        safe = jnp.where(total > 0, total, 1.0)
        out = weigh(p, _part(v, *keys, 2)) / safe[..., None]
        outs.append(out.astype(q.dtype))
        lses.append(top + jnp.log(safe))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _backward_unrolled(q, k, v, segments, lse, delta, d_out, window, block, causal):
    dqs = []
    dk = jnp.zeros(k.shape, lse.dtype)
    dv = jnp.zeros(v.shape, lse.dtype)
    for queries, keys in _spans(q.shape[3], block, window, causal):
        seen = _block_mask(segments, queries, keys, window, causal)
        q_i, k_i, v_i = (
            _part(q, *queries, 3),
            _part(k, *keys, 2),
            _part(v, *keys, 2),
        )
        d_i = _part(d_out, *queries, 3)
        p = exp_below(masked(score(q_i, k_i), seen), _part(lse, *queries, 3))
        ds = p * (score(d_i, v_i) - _part(delta, *queries, 3)[..., None])
        dqs.append(weigh(ds, k_i))
        dk = dk.at[:, :, slice(*keys)].add(weigh_back(ds, q_i))
        dv = dv.at[:, :, slice(*keys)].add(weigh_back(p, d_i))
    return jnp.concatenate(dqs, axis=3), dk, dv


# ---- Long rows: loops over block pairs, bounded by what can be seen.


def block_at(x, i, block, dim):
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=dim)


def _began(segments):
    """Index at which the segment of each token began, in each row."""
    t = segments.shape[1]
    new = segments != jnp.pad(segments, [(0, 0), (1, 0)], constant_values=-1)[:, :t]
    return jax.lax.cummax(jnp.where(new, jnp.arange(t)[None, :], 0), axis=1)


def _key_blocks(segments, t, window, block, causal):
    """For each query block, the key blocks that any row must look at: the first, and
    one past the last."""
    index = jnp.arange(t // block)
    if causal:
        return _first_key_block(segments, t, window, block), index + 1
    if segments is None:
        return jnp.zeros_like(index), jnp.full_like(index, t // block)
    began = _began(segments)
    ended = t - 1 - _began(segments[:, ::-1])[:, ::-1]
    # Padding looks at nothing, so a block of it has no key blocks.
    began = jnp.where(segments > 0, began, t).reshape(-1, t // block, block)
    ended = jnp.where(segments > 0, ended, -1).reshape(-1, t // block, block)
    return (
        jnp.min(began, axis=(0, 2)) // block,
        (jnp.max(ended, axis=(0, 2)) + block) // block,
    )


def _query_blocks(low, high, causal):
    """The query blocks that look at each key block: first, and one past the last."""
    if not causal:  # who sees is seen
        return low, high
    # From j to the last i with low[i] <= j.
    index = jnp.arange(len(low))
    looks = low[None, :] <= index[:, None]
    last = jnp.max(jnp.where(looks, index[None, :], index[:, None]), axis=1)
    return index, last + 1


def _first_key_block(segments, t, window, block):
    """For each query block, the first key block any row must look at."""
    starts = jnp.arange(0, t, block)
    low = jnp.maximum(starts - window + 1, 0) if window else jnp.zeros_like(starts)
    if segments is not None:
        began = _began(segments)[:, ::block]
        # A block of padding looks at nothing before itself.
        began = jnp.where(segments[:, ::block] > 0, began, starts[None, :])
        low = jnp.maximum(low, jnp.min(began, axis=0))
    return low // block


def _pair_mask(segments, i, j, window, block, causal):
    within = jnp.arange(block)
    query, key = i * block + within, j * block + within
    if segments is None:
        return visible(query, key, None, None, window, causal)
    seg_q, seg_s = block_at(segments, i, block, 1), block_at(segments, j, block, 1)
    return visible(query, key, seg_q, seg_s, window, causal)


def _forward_loop(q, k, v, segments, window, block, causal):
    b, h, g, t, width = q.shape
    low, high = _key_blocks(segments, t, window, block, causal)
    wide = wide_of(q)

    def query_block(_, i):
        q_i = block_at(q, i, block, 3)

        def key_block(j, carry):
            out, top, total = carry
            seen = _pair_mask(segments, i, j, window, block, causal)
            scores = masked(score(q_i, block_at(k, j, block, 2)), seen)
            new_top = jnp.maximum(top, top_of(scores))
            shrink = jnp.exp(top - new_top)
            p = exp_below(scores, new_top)
            out = out * shrink[..., None] + weigh(p, block_at(v, j, block, 2))
            return out, new_top, total * shrink + jnp.sum(p, axis=-1)

        shape = (b, h, g, block)
        init = (
            mesh.vary(jnp.zeros((*shape, width), wide), mesh.varying(q)),
            mesh.vary(jnp.full(shape, NEG, wide), mesh.varying(q)),
            mesh.vary(jnp.zeros(shape, wide), mesh.varying(q)),
        )
        out, top, total = jax.lax.fori_loop(low[i], high[i], key_block, init)
        safe = jnp.where(total > 0, total, 1.0)
        return None, ((out / safe[..., None]).astype(q.dtype), top + jnp.log(safe))

    _, (outs, lses) = jax.lax.scan(query_block, None, jnp.arange(t // block))
    out = jnp.moveaxis(outs, 0, 3).reshape(q.shape)
    return out, jnp.moveaxis(lses, 0, 3).reshape(q.shape[:-1])


def _backward_loop(q, k, v, segments, lse, delta, d_out, window, block, causal):
    t = q.shape[3]
    low, high = _key_blocks(segments, t, window, block, causal)
    first, last = _query_blocks(low, high, causal)

    def key_block(dq, j):
        k_j, v_j = block_at(k, j, block, 2), block_at(v, j, block, 2)

        def query_block(i, carry):
            dq, dk_j, dv_j = carry
            q_i, d_i = block_at(q, i, block, 3), block_at(d_out, i, block, 3)
            seen = _pair_mask(segments, i, j, window, block, causal)
            p = exp_below(masked(score(q_i, k_j), seen), block_at(lse, i, block, 3))
            ds = p * (score(d_i, v_j) - block_at(delta, i, block, 3)[..., None])
            dq_i = block_at(dq, i, block, 3) + weigh(ds, k_j)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, axis=3)
            return dq, dk_j + weigh_back(ds, q_i), dv_j + weigh_back(p, d_i)

        zero = mesh.vary(jnp.zeros(k_j.shape, lse.dtype), mesh.varying(k))
        carry = (dq, zero, zero)
        dq, dk_j, dv_j = jax.lax.fori_loop(first[j], last[j], query_block, carry)
        return dq, (dk_j, dv_j)

    dq = mesh.vary(jnp.zeros(q.shape, lse.dtype), mesh.varying(q))
    dq, (dk, dv) = jax.lax.scan(key_block, dq, jnp.arange(t // block))
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(k.shape) for x in (dk, dv))
    return dq, dk, dv
