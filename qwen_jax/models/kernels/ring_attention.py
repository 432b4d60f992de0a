# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention of rows whose tokens are split over devices, both passes.

Runs inside `mesh.local`, on one device's tokens. A row is cut in 2 P pieces for P
devices; device i holds pieces i and 2 P - 1 - i (`mesh.zigzag`), so that each has the
same work under the causal mask. Two ways:
- "ring": keys and values go round, from each device to the next. A step meets two of
  the four pairs of pieces, since the other two lie wholly in the future; what the next
  step needs travels meanwhile. The backward pass sends keys and values round once more,
  and their gradients with them. Memory is that of a device's own tokens.
- "gather": every device gathers all keys and values, and gathers them again in the
  backward pass. One collective, and the memory of whole rows of keys and values: right
  for few devices and few key heads.

Source: Ring Attention (arXiv 2310.01889), in the balanced order of Llama 3 (arXiv
2407.21783, section 3.3.2, whose way is "gather"); online softmax as in `blockwise`,
whose products and masks these are. A pair of pieces is visited block by block, and
blocks that no query sees (other documents, beyond the window) are left out.

Shapes: q_btnk, k_bthk, v_bthk of 2 c tokens, segments_bt int32 (0 is padding; equal
numbers are contiguous in the row) or None -> out_btnk in q's dtype. Sums are float32 or
wider, and so are the gradients of keys and values while they travel.
Its twin is `blockwise.reference` over the row that the pieces are cut from.
Raises: ValueError when shapes do not fit together; config.InputError from `block_for`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import config, mesh
from qwen_jax.models.kernels import blockwise

WAYS = mesh.CONTEXT_WAYS
BLOCK = 512


def block_for(piece: int) -> int:
    """Tokens of a block of pieces of so many tokens: at most 512, all alike.

    Raises:
      config.InputError: a long piece that can only be cut in small blocks.
    """
    block = next(n for n in range(min(piece, BLOCK), 0, -1) if piece % n == 0)
    if block < min(piece, BLOCK // 4):
        raise config.InputError(
            f"a row's tokens are cut in pieces of {piece} for context parallelism: "
            f"above {BLOCK} wanted a multiple of {BLOCK // 4}; set "
            f"--config.data.seq_tokens to a multiple of {BLOCK // 2} x mesh.context"
        )
    return block


def attention(
    q_btnk: jax.Array,
    k_bthk: jax.Array,
    v_bthk: jax.Array,
    segments_bt: jax.Array | None = None,
    *,
    axes: tuple[str, ...],
    way: str = "ring",
    window: int = 0,
    block: int | None = None,
) -> jax.Array:
    """Attention of one device's queries to the keys of its rows on all devices.

    Args:
      q_btnk: queries [b, t, n, k] of this device's two pieces.
      k_bthk: keys [b, t, h, k] of the same tokens.
      v_bthk: values likewise.
      segments_bt: int32 [b, t], or None for one segment a row and no padding.
      axes: the mesh axes that tokens are split over.
      way: one of `WAYS`.
      window: tokens a query sees, itself included; 0 for all before it.
      block: tokens in a block; None chooses by the length of a piece.
    Returns:
      [b, t, n, k].
    """
    b, t, n, k = q_btnk.shape
    h = k_bthk.shape[2]
    if k_bthk.shape != (b, t, h, k) or v_bthk.shape != k_bthk.shape or n % h or t % 2:
        raise ValueError(
            f"ring attention shapes do not fit: q {q_btnk.shape}, k {k_bthk.shape}, "
            f"v {v_bthk.shape}, two pieces"
        )
    if way not in WAYS:
        raise ValueError(f"way={way!r}: wanted one of {', '.join(WAYS)}")
    piece = t // 2
    block = block or block_for(piece)
    if piece % block:
        raise ValueError(f"block={block} does not divide pieces of {piece} tokens")
    q = (q_btnk * k**-0.5).reshape(b, 2, piece, h, n // h, k)
    q_pbhgtk = q.transpose(1, 0, 3, 4, 2, 5)
    k_pbhsk, v_pbhsk = (
        x.reshape(b, 2, piece, h, k).transpose(1, 0, 3, 2, 4) for x in (k_bthk, v_bthk)
    )
    segments_pbt = None
    if segments_bt is not None:
        segments_pbt = segments_bt.reshape(b, 2, piece).transpose(1, 0, 2)
    how = (tuple(axes), way, window, block)
    near = frozenset(axes).union(*map(mesh.varying, (q_btnk, k_bthk, v_bthk)))
    arrays = (mesh.vary(x, near) for x in (q_pbhgtk, k_pbhsk, v_pbhsk))
    out_pbhgtk = _attend(*arrays, segments_pbt, *how)
    return out_pbhgtk.transpose(1, 0, 4, 2, 3, 5).reshape(b, t, n, k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _attend(q, k, v, segments, axes, way, window, block):
    return _forward(q, k, v, segments, axes, way, window, block)[0]


def _attend_fwd(q, k, v, segments, axes, way, window, block):
    out, lse = _forward(q, k, v, segments, axes, way, window, block)
    # Named inside the rule, so that a remat policy can keep both (decoder.SAVED).
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, out, lse)


def _attend_bwd(axes, way, window, block, saved, d_out):
    # Tied to the cotangent: else the compiler would take what the forward pass gathered
    # or received for the same, and keep it.
    d_out, saved = jax.lax.optimization_barrier((d_out, saved))
    q, k, v, segments, out, lse = saved
    # delta = rowsum(dO * O) = sum_s P dP, so dS = P (dP - delta).
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)
    seen_by = q, d_out, lse, delta, segments
    zero = _zeros(q.shape, lse.dtype, q)
    visit = functools.partial(_pairs_backward, seen_by, window=window, block=block)
    backward = _backward_ring if way == "ring" else _backward_gathered
    dq, dk, dv = backward(visit, zero, (k, v, segments), axes)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _zeros(shape, dtype, like):
    return mesh.vary(jnp.zeros(shape, dtype), mesh.varying(like))


# ---- The ways keys reach queries


def _forward(q, k, v, segments, axes, way, window, block):
    wide = blockwise.wide_of(q)
    state = (
        _zeros(q.shape, wide, q),
        _zeros(q.shape[:-1], wide, q) + blockwise.NEG,
        _zeros(q.shape[:-1], wide, q),
    )
    visit = functools.partial(_pairs_forward, (q, segments), window=window, block=block)
    forward = _forward_ring if way == "ring" else _forward_gathered
    out, top, total = forward(visit, state, (k, v, segments), axes)
    safe = jnp.where(total > 0, total, 1.0)
    return (out / safe[..., None]).astype(q.dtype), top + jnp.log(safe)


def _starts(device, ways, piece):
    """Where in the row the two pieces of a device begin."""
    return jnp.stack([device, 2 * ways - 1 - device]) * piece


def _own_pairs(device):
    """(queries' piece, keys' piece) of a device's own tokens: (1, 0), (0, 0), (1, 1).

    Computed from the device, so that the loop over pairs varies as its carry does.
    """
    zero = device * 0
    return jnp.stack([zero + i for i in (1, 0, 0, 0, 1, 1)]).reshape(3, 2)


def _pairs_with(device, other):
    """Later piece to earlier one, always; and of the two first pieces or the two last
    those where the keys come before. The other two pairs lie in the future."""
    zero = device * 0
    both = (other > device).astype(device.dtype)
    return jnp.stack([zero + 1, zero, both, both]).reshape(2, 2)


def _send(tree, axes):
    """`tree` to the next device of the ring."""
    ways = jax.lax.axis_size(axes)
    to_next = [(i, (i + 1) % ways) for i in range(ways)]
    return jax.lax.ppermute(tree, axes, to_next)


def _forward_ring(visit, state, keys, axes):
    ways, device = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    piece = keys[0].shape[3]
    mine = _starts(device, ways, piece)

    def step(state, keys, r):
        other = (device - r) % ways
        places = mine, _starts(other, ways, piece)
        return visit(state, keys, places, _pairs_with(device, other))

    def body(carry, r):
        state, keys = carry
        come = _send(keys, axes)  # while this step computes
        return (step(state, keys, r), come), None

    come = _send(keys, axes)
    state = visit(state, keys, (mine, mine), _own_pairs(device))
    if ways > 2:
        (state, come), _ = jax.lax.scan(body, (state, come), jnp.arange(1, ways - 1))
    return step(state, come, ways - 1)


def _backward_ring(visit, dq, keys, axes):
    ways, device = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    piece = keys[0].shape[3]
    mine = _starts(device, ways, piece)

    def step(dq, keys, sums, r):
        other = (device - r) % ways
        places = mine, _starts(other, ways, piece)
        come = _send(sums, axes)  # of these keys, from the device that had them
        dq, more = visit(dq, keys, places, _pairs_with(device, other))
        return dq, jax.tree.map(jnp.add, come, more)

    def body(carry, r):
        dq, keys, sums = carry
        come = _send(keys, axes)
        dq, sums = step(dq, keys, sums, r)
        return (dq, come, sums), None

    come = _send(keys, axes)
    dq, sums = visit(dq, keys, (mine, mine), _own_pairs(device))
    if ways > 2:
        carry = dq, come, sums
        (dq, come, sums), _ = jax.lax.scan(body, carry, jnp.arange(1, ways - 1))
    dq, sums = step(dq, come, sums, ways - 1)
    return dq, *_send(sums, axes)  # home


def _forward_gathered(visit, state, keys, axes):
    return visit(state, _gathered(keys, axes), *_whole_row(keys, axes))


def _backward_gathered(visit, dq, keys, axes):
    dq, sums = visit(dq, _gathered(keys, axes), *_whole_row(keys, axes))
    ways = jax.lax.axis_size(axes)

    def home(sum_1bhsk):
        _, b, h, s, k = sum_1bhsk.shape
        pieces = sum_1bhsk.reshape(b, h, 2 * ways, s // (2 * ways), k)
        pieces = jnp.moveaxis(pieces, 2, 0)
        each = jnp.stack([pieces[:ways], pieces[ways:][::-1]], axis=1)
        return jax.lax.psum_scatter(each, axes, scatter_dimension=0)

    return dq, *map(home, sums)


def _whole_row(keys, axes):
    """(places, pairs) of a device's pieces and one piece of keys that is all."""
    ways, device = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    zero = device * 0
    places = _starts(device, ways, keys[0].shape[3]), zero[None]
    return places, jnp.stack([zero, zero, zero + 1, zero]).reshape(2, 2)


def _gathered(keys, axes):
    """Keys, values and segments of whole rows in order, as one piece."""

    def one(x, dim):
        each = jax.lax.all_gather(x, axes, axis=0)
        pieces = jnp.concatenate([each[:, 0], each[::-1, 1]])
        row = jnp.moveaxis(pieces, 0, dim)
        shape = (*row.shape[:dim], -1, *row.shape[dim + 2 :])
        return row.reshape(shape)[None]

    k, v, segments = keys
    return one(k, 2), one(v, 2), None if segments is None else one(segments, 1)


# ---- Pairs of pieces, block by block


def _pick(x, i):
    return None if x is None else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x, part, i):
    return jax.lax.dynamic_update_index_in_dim(x, part, i, axis=0)


def _pairs_forward(queries, state, keys, places, pairs, *, window, block):
    """(out, top, total) of the queries with those pairs of pieces in."""
    q, segments_q = queries

    def pair(state, ids):
        i, j = ids
        k, v, segments_s = (_pick(x, j) for x in keys)
        part = [_pick(x, i) for x in state]
        rows = _Pair(places, (i, j), _pick(segments_q, i), segments_s, window, block)
        part = _pair_forward(part, _pick(q, i), k, v, rows)
        return tuple(_put(x, new, i) for x, new in zip(state, part, strict=True)), None

    return jax.lax.scan(pair, state, pairs)[0]


def _pairs_backward(seen_by, dq, keys, places, pairs, *, window, block):
    """(dq with those pairs in, (dk, dv) of them)."""
    q, d_out, lse, delta, segments_q = seen_by

    def pair(carry, ids):
        i, j = ids
        k, v, segments_s = (_pick(x, j) for x in keys)
        rows = _Pair(places, (i, j), _pick(segments_q, i), segments_s, window, block)
        what = [_pick(x, i) for x in (q, d_out, lse, delta)]
        dq, sums = carry
        dq_i, more = _pair_backward(_pick(dq, i), *what, k, v, rows)
        sums = tuple(
            _put(x, _pick(x, j) + new, j) for x, new in zip(sums, more, strict=True)
        )
        return (_put(dq, dq_i, i), sums), None

    zeros = tuple(_zeros(x.shape, lse.dtype, q) for x in keys[:2])
    return jax.lax.scan(pair, (dq, zeros), pairs)[0]


class _Pair:
    """Which blocks and which tokens of two pieces see each other."""

    def __init__(self, places, ids, segments_q, segments_s, window, block):
        self.at_q, self.at_s = places[0][ids[0]], places[1][ids[1]]
        self.segments = segments_q, segments_s
        self.window, self.block = window, block

    def blocks(self, t, s):
        """bool [query blocks, key blocks]: whether any query of one looks at the other.

        Of keys before a block of queries those are seen that belong to the segment of
        its first query, which go on to the last key of their block.
        """
        block, (segments_q, segments_s) = self.block, self.segments
        query = self.at_q + jnp.arange(0, t, block)[:, None]
        last = self.at_s + jnp.arange(block - 1, s, block)[None, :]
        before = last < query
        if self.window:
            before &= query - last < self.window
        if segments_q is not None:
            first_bi, last_bj = (
                segments_q[:, ::block],
                segments_s[:, block - 1 :: block],
            )
            same = first_bi[:, :, None] == last_bj[:, None, :]
            before &= jnp.any(same & (first_bi > 0)[:, :, None], axis=0)
        return before | (last == query + block - 1)

    def mask(self, i, j):
        within = jnp.arange(self.block)
        query, key = self.at_q + i * self.block, self.at_s + j * self.block
        seg_q, seg_s = self.segments
        if seg_q is not None:
            seg_q = blockwise.block_at(seg_q, i, self.block, 1)
            seg_s = blockwise.block_at(seg_s, j, self.block, 1)
        how = (self.window, True)
        return blockwise.visible(query + within, key + within, seg_q, seg_s, *how)


def _bounds(seen_ij):
    """(first, one past the last) true of each row; 0, 0 where none is."""
    some, count = jnp.any(seen_ij, axis=1), seen_ij.shape[1]
    first = jnp.argmax(seen_ij, axis=1)
    stop = count - jnp.argmax(seen_ij[:, ::-1], axis=1)
    return jnp.where(some, first, 0), jnp.where(some, stop, 0)


def _pair_forward(state, q, k, v, rows):
    t, block = q.shape[3], rows.block
    low, high = _bounds(rows.blocks(t, k.shape[2]))

    def query_block(_, i):
        q_i = blockwise.block_at(q, i, block, 3)

        def key_block(j, carry):
            out, top, total = carry
            k_j, v_j = (
                blockwise.block_at(k, j, block, 2),
                blockwise.block_at(v, j, block, 2),
            )
            scores = blockwise.masked(blockwise.score(q_i, k_j), rows.mask(i, j))
            new_top = jnp.maximum(top, blockwise.top_of(scores))
            shrink = jnp.exp(top - new_top)
            p = blockwise.exp_below(scores, new_top)
            out = out * shrink[..., None] + blockwise.weigh(p, v_j)
            return out, new_top, total * shrink + jnp.sum(p, axis=-1)

        held = tuple(blockwise.block_at(x, i, block, 3) for x in state)
        return None, jax.lax.fori_loop(low[i], high[i], key_block, held)

    _, parts = jax.lax.scan(query_block, None, jnp.arange(t // block))
    return [
        jnp.moveaxis(x, 0, 3).reshape(old.shape)
        for x, old in zip(parts, state, strict=True)
    ]


def _pair_backward(dq, q, d_out, lse, delta, k, v, rows):
    t, block = q.shape[3], rows.block
    first, last = _bounds(rows.blocks(t, k.shape[2]).T)

    def key_block(dq, j):
        k_j, v_j = (
            blockwise.block_at(k, j, block, 2),
            blockwise.block_at(v, j, block, 2),
        )

        def query_block(i, carry):
            dq, dk_j, dv_j = carry
            q_i, d_i, lse_i, delta_i = (
                blockwise.block_at(x, i, block, 3) for x in (q, d_out, lse, delta)
            )
            scores = blockwise.masked(blockwise.score(q_i, k_j), rows.mask(i, j))
            p = blockwise.exp_below(scores, lse_i)
            ds = p * (blockwise.score(d_i, v_j) - delta_i[..., None])
            dq_i = blockwise.block_at(dq, i, block, 3) + blockwise.weigh(ds, k_j)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, axis=3)
            dk_j = dk_j + blockwise.weigh_back(ds, q_i)
            return dq, dk_j, dv_j + blockwise.weigh_back(p, d_i)

        zero = _zeros(k_j.shape, lse.dtype, q)
        carry = dq, zero, zero
        dq, dk_j, dv_j = jax.lax.fori_loop(first[j], last[j], query_block, carry)
        return dq, (dk_j, dv_j)

    dq, parts = jax.lax.scan(key_block, dq, jnp.arange(k.shape[2] // block))
    return dq, [jnp.moveaxis(x, 0, 2).reshape(k.shape) for x in parts]
