# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule: a linear recurrence over a matrix state, in chunks or by steps.

Source: Gated Delta Networks (arXiv 2412.06464), the rule of the linear layers of
Qwen3-Next and Qwen3.5. With S [k, u] the state of one head,

    S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q

In chunks of C tokens, with G the running sum of g inside the chunk and
D_ij = e^(G_i - G_j) for i >= j, else 0, where token j is of the segment of token i:

    A = I + strictly_lower((beta k k^T) D);  [U | W] = A^-1 [beta v | beta k e^G]
    V' = U - W S;  o = (q e^G) S + ((q k^T) D) V'
    S <- e^(G_C) S + (k e^(G_C - G))^T V'

so that all but one pass over C steps is matrix products. Differs from the source in the
segments: a token meets the state only where the state is of its own segment, which
makes packed rows equal separate rows.

Shapes: q_bthk and k_bthk (already normalised and scaled), v_bthu, g_bth (log of the
decay, at most 0) and beta_bth; segments_bt int32 with 0 for padding, which changes
nothing and gets zeros; the state is a `State`: s_bhku and the segment it is of.
Everything is held and summed in float32 (float64 in float64 runs); a TPU multiplies in
its default precision, bfloat16, but for the solve. The output has v's dtype.
`recurrent` is the plain twin: the three lines above, one token after another; it is
also what decoding runs.
Raises: ValueError when shapes do not fit together.
"""

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import mesh

CHUNK = 64


@struct.dataclass
class State:
    """What earlier tokens left: the matrices, and the segment they are of (0: none)."""

    s_bhku: jax.Array
    segment_b: jax.Array


def empty(b: int, h: int, k: int, u: int, dtype=jnp.float32) -> State:
    """The state before the first token."""
    return State(jnp.zeros((b, h, k, u), dtype), jnp.zeros((b,), jnp.int32))


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def prepared(q, k, v, g, beta, segments, state):
    """All in the wide dtype, padding made inert, the state always there."""
    b, t, h, width = k.shape
    if q.shape != k.shape or v.shape[:3] != (b, t, h) or g.shape != (b, t, h):
        raise ValueError(
            f"delta rule shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}, "
            f"g {g.shape}"
        )
    wide = _wide(v)
    q, k, v, g, beta = (x.astype(wide) for x in (q, k, v, g, beta))
    if segments is None:
        segments = jnp.ones((b, t), jnp.int32)
    if state is None:
        state = empty(b, h, width, v.shape[-1], wide)
        # A state of no segment meets no token.
    state = State(state.s_bhku.astype(wide), state.segment_b)
    near = mesh.varying(v)
    state = jax.tree.map(lambda x: mesh.vary(x, near), state)
    real = (segments > 0)[:, :, None]
    g, beta = jnp.where(real, g, 0.0), jnp.where(real, beta, 0.0)
    k, v = jnp.where(real[..., None], k, 0.0), jnp.where(real[..., None], v, 0.0)
    return q, k, v, g, beta, segments, state


def recurrent(q, k, v, g, beta, segments=None, state=None):
    """One token after another; see the module docstring. -> (o_bthu, State)."""
    out_dtype = v.dtype
    q, k, v, g, beta, segments, state = prepared(q, k, v, g, beta, segments, state)

    def step(carry, now):
        s, owner = carry
        q_bhk, k_bhk, v_bhu, g_bh, beta_bh, seg_b = now
        other = (seg_b > 0) & (seg_b != owner)
        s = (
            jnp.where(other[:, None, None, None], 0.0, s)
            * jnp.exp(g_bh)[..., None, None]
        )
        told = v_bhu - jnp.einsum("bhku,bhk->bhu", s, k_bhk)
        s = s + jnp.einsum("bhk,bhu->bhku", k_bhk, beta_bh[..., None] * told)
        o_bhu = jnp.einsum("bhku,bhk->bhu", s, q_bhk)
        o_bhu = jnp.where((seg_b > 0)[:, None, None], o_bhu, 0.0)
        return (s, jnp.where(seg_b > 0, seg_b, owner)), o_bhu

    steps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta, segments))
    carry = (state.s_bhku, state.segment_b)
    (s, owner), o = jax.lax.scan(step, carry, steps)
    return jnp.moveaxis(o, 0, 1).astype(out_dtype), State(s, owner)


def _owners(segments_bt: jax.Array, first_b: jax.Array) -> jax.Array:
    """Each token's segment; padding takes that of the last real token before it."""
    index = jnp.arange(segments_bt.shape[1])[None]
    last = jax.lax.cummax(jnp.where(segments_bt > 0, index, -1), axis=1)
    there = jnp.take_along_axis(segments_bt, jnp.maximum(last, 0), axis=1)
    return jnp.where(last >= 0, there, first_b[:, None])


@struct.dataclass
class Chunks:
    """Tokens in chunks, c in front, and what of a chunk needs no state."""

    q_cbhqk: jax.Array
    k_cbhqk: jax.Array
    u_cbhqu: jax.Array
    w_cbhqk: jax.Array
    weights_cbhqs: jax.Array
    total_cbhq: jax.Array
    owners_cbq: jax.Array


def chunked(q, k, v, g, beta, segments=None, state=None, *, chunk: int = CHUNK):
    """As `recurrent`, in chunks of `chunk` tokens. -> (o_bthu, State)."""
    out_dtype, t = v.dtype, v.shape[1]
    *tokens, state = prepared(q, k, v, g, beta, segments, state)
    out, after = through(cut(*tokens, state.segment_b, chunk), state, t)
    out = jnp.where((tokens[-1] > 0)[:, :, None, None], out, 0.0)
    return out.astype(out_dtype), after


def cut(q, k, v, g, beta, segments, first_b, chunk: int = CHUNK) -> Chunks:
    """Prepared tokens in chunks; `first_b` is the segment of the state they meet."""
    (b, t, _, width), chunk = v.shape, min(chunk, max(v.shape[1], 1))
    owners = _owners(segments, first_b)
    count = -(-t // chunk)
    rest = count * chunk - t

    def part(x, mode="constant"):
        """[b, t, ...] -> [c, b, ...] with heads before tokens."""
        x = jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        x = x.reshape(b, count, chunk, *x.shape[2:])
        x = jnp.moveaxis(x, 1, 0)
        return jnp.moveaxis(x, 3, 2) if x.ndim > 3 else x  # [c, b, h, q, ...]

    q, k, v, g, beta = (part(x) for x in (q, k, v, g, beta))
    owners = part(owners, mode="edge")  # of the last token: the rest is inert
    index = jnp.arange(chunk)
    lower = (index[:, None] >= index[None, :])[None, None]
    strictly = (index[:, None] > index[None, :])[None, None, None]
    same = (owners[..., :, None] == owners[..., None, :]) & lower
    same = same[:, :, None]  # [c, b, 1, q, s]
    total = jnp.cumsum(g, axis=-1)
    gap = total[..., :, None] - total[..., None, :]
    decay = jnp.where(same, jnp.exp(jnp.where(same, gap, 0.0)), 0.0)
    k_beta = k * beta[..., None]
    a = jnp.einsum("cbhqk,cbhsk->cbhqs", k_beta, k) * jnp.where(strictly, decay, 0.0)
    grown = jnp.exp(total)[..., None]
    right = jnp.concatenate([v * beta[..., None], k_beta * grown], axis=-1)
    solved = jax.scipy.linalg.solve_triangular(
        a + jnp.eye(chunk, dtype=a.dtype)[None, None, None],
        right,
        lower=True,
        unit_diagonal=True,
    )
    weights = jnp.einsum("cbhqk,cbhsk->cbhqs", q, k) * decay
    return Chunks(
        q, k, solved[..., :width], solved[..., width:], weights, total, owners
    )


def through(chunks: Chunks, state: State, t: int) -> tuple[jax.Array, State]:
    """(o_bthu of t tokens, padding's too; the state behind them)."""

    def body(carry, now):
        s, owner = carry
        told, after = _next(s, owner, now)
        # Tokens of the state's segment are a prefix of the chunk, so their running
        # sums of g hold nothing of another segment.
        mine = (now.owners_cbq == owner[:, None])[:, None, :, None]
        grown = now.q_cbhqk * jnp.exp(now.total_cbhq)[..., None]
        out = jnp.where(mine, jnp.einsum("bhqk,bhku->bhqu", grown, s), 0.0)
        out = out + jnp.einsum("bhqs,bhsu->bhqu", now.weights_cbhqs, told)
        return after, out

    carry = (state.s_bhku, state.segment_b)
    (s, owner), out = jax.lax.scan(body, carry, chunks)
    out = jnp.moveaxis(out, 3, 2)  # [c, b, q, h, u]
    c, b, q, h, u = out.shape
    return jnp.moveaxis(out, 0, 1).reshape(b, c * q, h, u)[:, :t], State(s, owner)


def transition(chunks: Chunks, first_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a_bhkk, b_bhku): whatever the state S before these tokens, of segment `first_b`,
    behind them it is a S + b.

    The same loop over a state with k more columns, which start as the identity and to
    which no token adds.
    """
    b, h, _, k = chunks.k_cbhqk.shape[1:]
    u, dtype = chunks.u_cbhqu.shape[-1], chunks.u_cbhqu.dtype
    rest = [(0, 0)] * 4 + [(0, k)]
    wider = chunks.replace(u_cbhqu=jnp.pad(chunks.u_cbhqu, rest))
    start = jnp.broadcast_to(jnp.eye(k, u + k, u, dtype)[None, None], (b, h, k, u + k))
    start = mesh.vary(start, mesh.varying(chunks.u_cbhqu))
    (s, _), _ = jax.lax.scan(
        lambda carry, now: (_next(*carry, now)[1], None), (start, first_b), wider
    )
    return s[..., u:], s[..., :u]


def _next(s, owner, now: Chunks):
    """(V' of a chunk, (the state behind it, its segment))."""
    mine = (now.owners_cbq == owner[:, None])[:, None, :, None]
    met = jnp.einsum("bhqk,bhku->bhqu", now.w_cbhqk, s)
    told = now.u_cbhqu - jnp.where(mine, met, 0.0)
    last = now.owners_cbq[:, -1]
    ends = now.total_cbhq[..., -1:]
    tail = (now.owners_cbq == last[:, None])[:, None, :]
    left = jnp.where(tail, jnp.exp(jnp.where(tail, ends - now.total_cbhq, 0.0)), 0.0)
    goes_on = (last == owner)[:, None, None, None]
    s = jnp.where(goes_on, s * jnp.exp(ends)[..., None], 0.0)
    s = s + jnp.einsum("bhqk,bhqu->bhku", now.k_cbhqk * left[..., None], told)
    return told, (s, last)
