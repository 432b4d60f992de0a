# SPDX-License-Identifier: Apache-2.0
"""Dual chunk attention: positions far beyond the trained length, none of them unseen.

A document is cut in chunks of c = chunk_size - local_size tokens. Keys stand at
j mod c; where a query stands depends on the chunk of the key it meets:

    its own          i mod c                        (ordinary attention)
    the one before   min(i mod c + c, chunk_size)   (true distances up to local_size)
    earlier ones     min(2 c - 1, chunk_size)

so no distance passes chunk_size, the trained length. Scores are multiplied by
max(1, 0.1 ln((i + 1) / original_positions) + 1)^2, the temperature of YaRN.

Source: arXiv 2402.17463 (section 3) and Qwen2.5-1M, arXiv 2501.15383. Deviations: as in
the published code of Qwen2.5-1M the largest position is chunk_size, in the first paper
one less; the temperature is of the query's own position (there of the whole prompt, for
each prompt anew), so that cached decoding, packed rows and whole rows agree; the sparse
attention of long prompts there, an approximation of this, is not used.

Shapes: q_btnk and k_bshk come turned to i mod c and j mod c; positions_bt int32 count
inside each document; segments_bt as in attention. A query is turned further, by the
difference, for each of the three relations: q_brtnk, r = 3. Softmax is float32.
Invariants: rows shorter than c and than original_positions are ordinary attention;
memory is linear in length, backward too: a query block meets key blocks one at a time,
and those that it does not see are left out. `reference` is the plain twin.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import rope
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import blockwise

RELATIONS = 3


def counted(segments_bs: jax.Array) -> jax.Array:
    """Positions inside each document, 0 in padding, wherever padding stands."""
    real = segments_bs > 0
    s = segments_bs.shape[1]
    index_bs = jnp.where(real, jnp.arange(s)[None], -1)
    before = jax.lax.cummax(index_bs, axis=1)
    before = jnp.pad(before, [(0, 0), (1, 0)], constant_values=-1)[:, :s]
    last = jnp.take_along_axis(segments_bs, jnp.maximum(before, 0), axis=1)
    new = real & (segments_bs != jnp.where(before >= 0, last, 0))
    rank = jnp.cumsum(real, axis=1) - 1
    start = jax.lax.cummax(jnp.where(new, rank, 0), axis=1)
    return jnp.where(real, rank - start, 0).astype(jnp.int32)


def needed(chunks: spec_lib.DualChunk, longest: int) -> bool:
    """Whether documents of so many tokens meet anything but ordinary attention."""
    return longest > min(chunks.stride, chunks.original_positions or longest)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def turned(
    spec: spec_lib.Spec, q_btnk: jax.Array, positions_bt: jax.Array
) -> jax.Array:
    """Queries at i mod c -> those of the three relations, tempered: q_brtnk."""
    chunks = spec.dual_chunk
    c, size = chunks.stride, chunks.chunk_size
    own_bt = positions_bt % c
    further = (
        jnp.minimum(own_bt + c, size),
        jnp.full_like(own_bt, min(2 * c - 1, size)),
    )
    all_q = [q_btnk]
    for place_bt in further:
        all_q.append(rope.apply(q_btnk, *rope.angles(spec, place_bt - own_bt)))
    q_brtnk = jnp.stack(all_q, axis=1)
    if not chunks.original_positions:
        return q_brtnk
    ratio_bt = (positions_bt + 1).astype(_wide(q_btnk)) / chunks.original_positions
    heat_bt = jnp.square(jnp.maximum(0.1 * jnp.log(ratio_bt) + 1, 1))
    return (q_brtnk * heat_bt[:, None, :, None, None]).astype(q_btnk.dtype)


def attention(
    q_btnk: jax.Array,
    k_bshk: jax.Array,
    v_bshk: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array | None = None,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    block: int = 256,
    plain: bool = False,
) -> jax.Array:
    """Causal self-attention over whole rows, [b, t, n, k].

    Args:
      q_btnk: queries, turned to positions mod c.
      k_bshk: keys, likewise.
      v_bshk: values.
      positions_bt: int32, inside each document.
      segments_bt: int32, 0 for padding; None for one document a row.
      spec: the model; its `dual_chunk` is given.
      rules: dims -> mesh axes.
      block: tokens of a query block and of a key block.
      plain: by the twin, with the whole matrix.
    """
    rows = rules.pspec("batch", None)
    if segments_bt is None:
        segments_bt = mesh.reshard(jnp.ones(positions_bt.shape, jnp.int32), rows)
    stride = spec.dual_chunk.stride
    heads = rules.pspec("batch", None, "heads", None)
    all_heads = rules.pspec("batch", None, None, "heads", None)
    kv_heads = rules.pspec("batch", None, "kv_heads", None)
    run = functools.partial(reference if plain else _blocks, stride=stride)
    if not plain:
        run = functools.partial(run, block=block)
    run = mesh.local(run, inputs=(all_heads, kv_heads, kv_heads, rows, rows), out=heads)
    q_brtnk = turned(spec, q_btnk, positions_bt)
    return run(q_brtnk, k_bshk, v_bshk, positions_bt, segments_bt)


def reference(q_brtnk, k_bshk, v_bshk, positions_bt, segments_bt, *, stride):
    """The plain twin: the matrix of the three relations in the open."""
    t = positions_bt.shape[1]
    k_bhks, v_bhsk = k_bshk.transpose(0, 2, 3, 1), v_bshk.transpose(0, 2, 1, 3)
    index = jnp.arange(t)
    seen = (index[:, None] >= index[None, :])[None]
    return over(
        q_brtnk, k_bhks, v_bhsk, positions_bt, positions_bt, segments_bt, segments_bt,
        seen, stride=stride,
    )  # fmt: skip


def over(
    q_brtnk, k_bhks, v_bhsk, at_bt, at_bs, segments_bt, segments_bs, seen, *, stride
):
    """Attention of queries at `at_bt` over keys at `at_bs`, where `seen` and of one
    document, with the [t, s] matrix of all three relations."""
    b, r, t, n, k = q_brtnk.shape
    h = v_bhsk.shape[1]
    q = (q_brtnk * k**-0.5).reshape(b, r, t, h, n // h, k)
    scores = jnp.einsum(
        "brthgk,bhks->brhgts", q, k_bhks, preferred_element_type=_wide(q)
    )
    same = (segments_bt[:, :, None] == segments_bs[:, None, :]) & seen
    same &= (segments_bt > 0)[:, :, None]
    which = jnp.clip(_relation(at_bt, at_bs, stride), 0, RELATIONS - 1)
    picked = scores[:, 0]
    for i in range(1, RELATIONS):
        picked = jnp.where((which == i)[:, None, None], scores[:, i], picked)
    same = same[:, None, None]
    p = jax.nn.softmax(jnp.where(same, picked, blockwise.NEG), axis=-1)
    p = jnp.where(same, p, 0).astype(v_bhsk.dtype)
    out = jnp.einsum("bhgts,bhsk->bthgk", p, v_bhsk, preferred_element_type=_wide(p))
    return out.reshape(b, t, n, k).astype(q_brtnk.dtype)


def _relation(at_bt, at_bs, stride):
    """How many chunks before the query's the key's is: [b, t, s]."""
    return (at_bt // stride)[:, :, None] - (at_bs // stride)[:, None, :]


def over_cache(
    q_brtnk, k_bhks, v_bhsk, at_bt, at_bs, segments_bt, segments_bs, length, *, stride
):
    """New queries over cache slots; query i sits in slot length + i. In blocks of
    queries, so that prefill holds [block, s] scores of each relation at a time."""
    t, block = at_bt.shape[1], 256
    slot_s = jnp.arange(at_bs.shape[1])

    def rows(q, at, segments, start):
        slot_q = length + start + jnp.arange(at.shape[1])
        seen = (slot_q[:, None] >= slot_s[None, :])[None]
        return over(
            q, k_bhks, v_bhsk, at, at_bs, segments, segments_bs, seen, stride=stride
        )

    if t <= block:
        return rows(q_brtnk, at_bt, segments_bt, 0)
    blocks = -(-t // block)
    rest = blocks * block - t
    q = jnp.pad(q_brtnk, [(0, 0), (0, 0), (0, rest), (0, 0), (0, 0)])
    at, segments = (jnp.pad(x, [(0, 0), (0, rest)]) for x in (at_bt, segments_bt))

    def one(i):
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=i * block, slice_size=block
        )
        return rows(cut(q, axis=2), cut(at, axis=1), cut(segments, axis=1), i * block)

    out = jnp.moveaxis(jax.lax.map(one, jnp.arange(blocks)), 0, 1)
    b, _, _, n, k = out.shape
    return out.reshape(b, blocks * block, n, k)[:, :t]


def _blocks(q_brtnk, k_bshk, v_bshk, positions_bt, segments_bt, *, stride, block):
    """The same as `reference`, one pair of blocks at a time."""
    b, r, t, n, k = q_brtnk.shape
    h, block = k_bshk.shape[2], min(block, t)
    rest = -t % block

    def padded(x, axis):
        return jnp.pad(x, [(0, rest if i == axis else 0) for i in range(x.ndim)])

    q = padded((q_brtnk * k**-0.5).reshape(b, r, t, h, n // h, k), 2)
    q_brhgtk = q.transpose(0, 1, 3, 4, 2, 5)
    k_bhsk, v_bhsk = (padded(x, 1).transpose(0, 2, 1, 3) for x in (k_bshk, v_bshk))
    at, segments = padded(positions_bt, 1), padded(segments_bt, 1)
    blocks = (t + rest) // block
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=block)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def query_block(_, i):
        mine = [cut(q_brhgtk, i * block, axis=4)]
        mine += [cut(x, i * block, axis=1) for x in (at, segments)]

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def key_block(carry, j):
            theirs = [cut(x, j * block, axis=2) for x in (k_bhsk, v_bhsk)]
            theirs += [cut(x, j * block, axis=1) for x in (at, segments)]
            seen, which = _pair(mine, theirs, i, j, block, stride)
            carry = jax.lax.cond(
                jnp.any(seen),
                lambda carry: _merged(carry, mine[0], *theirs[:2], seen, which),
                lambda carry: carry,
                carry,
            )
            return carry, None

        shape, wide = (b, h, n // h, block), _wide(q)
        near = mesh.varying(q) | mesh.varying(at) | mesh.varying(k_bhsk)
        empty = (
            mesh.vary(jnp.zeros((*shape, k), wide), near),
            mesh.vary(jnp.full(shape, blockwise.NEG, wide), near),
            mesh.vary(jnp.zeros(shape, wide), near),
        )
        (out, _, total), _ = jax.lax.scan(key_block, empty, jnp.arange(blocks))
        out = out / jnp.where(total > 0, total, 1)[..., None]
        return None, out.astype(q.dtype)

    _, out = jax.lax.scan(query_block, None, jnp.arange(blocks))
    out = jnp.moveaxis(out, 0, 3).reshape(b, h, n // h, t + rest, k)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t + rest, n, k)[:, :t]


def _pair(mine, theirs, i, j, block, stride):
    """(who sees whom, how many chunks apart) of a pair of blocks: [b, q, s] each."""
    within = jnp.arange(block)
    causal = (i * block + within)[:, None] >= (j * block + within)[None, :]
    (_, at_q, seg_q), (_, _, at_s, seg_s) = mine, theirs
    seen = causal[None] & (seg_q[:, :, None] == seg_s[:, None, :])
    return seen & (seg_q > 0)[:, :, None], _relation(at_q, at_s, stride)


def _merged(carry, q_brhgqk, k_bhsk, v_bhsk, seen, which):
    """Online softmax: (sums of weighted values, tops, sums of weights) with a block of
    keys in. Only relations that some pair of the block has are computed."""
    out, top, total = carry
    scores = jnp.full((*top.shape, k_bhsk.shape[2]), blockwise.NEG, top.dtype)
    scores = mesh.vary(scores, mesh.varying(top))
    for r in range(RELATIONS):
        here = seen & (which == r if r < RELATIONS - 1 else which >= r)

        def computed(scores, r=r, here=here):
            mine = jnp.einsum(
                "bhgqk,bhsk->bhgqs",
                q_brhgqk[:, r],
                k_bhsk,
                preferred_element_type=scores.dtype,
            )
            return jnp.where(here[:, None, None], mine, scores)

        scores = jax.lax.cond(jnp.any(here), computed, lambda scores: scores, scores)
    # Half of NEG where nothing is seen: exp(NEG - top) is zero without another mask.
    highest = jnp.maximum(jnp.max(scores, axis=-1), blockwise.NEG / 2)
    new_top = jnp.maximum(top, highest)
    shrink = jnp.exp(top - new_top)
    p = jnp.exp(scores - new_top[..., None])
    weighed = jnp.einsum(
        "bhgqs,bhsk->bhgqk",
        p.astype(v_bhsk.dtype),
        v_bhsk,
        preferred_element_type=out.dtype,
    )
    out = out * shrink[..., None] + weighed
    return out, new_top, total * shrink + jnp.sum(p, axis=-1)
