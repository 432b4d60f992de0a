# SPDX-License-Identifier: Apache-2.0
"""Attention over chosen blocks of keys (QSA): a small index scores blocks, the best few
are seen, with the block that a query stands in.

    q = rope(norm(x Wq)), heads of the index;  k = x Wk, one head, kept as it is
    key of a block = rope(norm(mean of its `ratio` k)), turned to its first position
    score of a block = sum over heads of relu(q . key) / sqrt(i)

A query sees the tokens of its budget / ratio best complete blocks, and those after the
last complete block up to itself. Blocks are counted over the tokens of a document, so
packing and padding leave them as they are in the document alone. Among equal scores
the earlier block is taken.
Source: `qwen4_exp` of transformers 5.23, which leaves ties open. No gradient reaches
the index there, nor here: it is trained by other means than the loss on tokens.

Rows of fewer than budget + ratio tokens see everything: they take the ordinary path.
`attend` goes over parts of the queries, so memory is linear in the length, forward and
backward: each part meets all keys under `mask`, or, where that reads less (decoding),
the chosen keys alone.
Shapes: weights q_ldni, k_ldi, norms q_norm_li, k_norm_li; i is the width of the index,
n its heads; c complete blocks of r keys. Means, norms and scores are float32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import mesh
from qwen_jax.models import norm, rope
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import blockwise
from qwen_jax.params import Param, normal, ones, zeros

PAIRS = 1 << 21  # of queries and keys at a time: 256 queries of 8,192 tokens


def indexed_params(spec: spec_lib.Spec, layers: int) -> dict[str, Param]:
    """Weights of the index of `layers` attention blocks, stacked."""
    d, n, i = spec.width, spec.indexed.heads, spec.indexed.width
    init, plain = normal(spec.init_std), zeros if spec.norm_offset else ones
    return {
        "q_ldni": Param((layers, d, n, i), ("layers", "embed", None, None), init),
        "k_ldi": Param((layers, d, i), ("layers", "embed", None), init),
        "q_norm_li": Param((layers, i), ("layers", None), plain),
        "k_norm_li": Param((layers, i), ("layers", None), plain),
    }


def chooses(spec: spec_lib.Spec, tokens: int) -> bool:
    """Whether a row of so many tokens has more blocks than a query may see."""
    indexed = spec.indexed
    return indexed is not None and tokens >= indexed.budget + indexed.ratio


def project(p, x_btd, cos_btk, sin_btk, spec, rules):
    """(queries of the index, turned: q_btni; keys as they are kept: k_bti)."""
    p, x_btd = jax.lax.stop_gradient((p, x_btd))
    how = {"dtype": x_btd.dtype, "reduce_dtype": spec.reduce_dtype}
    q_dni = mesh.gather(p["q_ldni"], rules, "embed", None, None, **how)
    k_di = mesh.gather(p["k_ldi"], rules, "embed", None, **how)
    q_btni = mesh.product(x_btd, q_dni, out=rules.pspec("batch", None, None, None))
    q_btni = norm.rms_norm(q_btni, p["q_norm_li"], spec.norm_eps, spec.norm_offset)
    k_bti = mesh.product(x_btd, k_di, out=rules.pspec("batch", None, None))
    return rope.apply(q_btni, cos_btk, sin_btk), k_bti


@struct.dataclass
class Blocks:
    """Complete blocks of a row, and where its tokens stand.

    keys_bci; slots_bcr of its tokens; segments_bc, 0 where there is no such block. Of
    each slot: count_bs, real tokens up to it; rank_bs, tokens of its document before
    it; block_bs, the block it is in, if that is complete.
    """

    keys_bci: jax.Array
    slots_bcr: jax.Array
    segments_bc: jax.Array
    count_bs: jax.Array
    rank_bs: jax.Array
    block_bs: jax.Array


def blocks(k_bsi, cos_bsk, sin_bsk, segments_bs, norm_i, spec) -> Blocks:
    """The keys of all complete blocks."""
    ratio, s = spec.indexed.ratio, k_bsi.shape[1]
    real, slot_s = segments_bs > 0, jnp.arange(s)
    count_bs = jnp.cumsum(real, axis=1)
    last_bs = jax.lax.cummax(jnp.where(real, slot_s[None], -1), axis=1)
    before_bs = jnp.pad(last_bs, [(0, 0), (1, 0)], constant_values=-1)[:, :s]
    owner_bs = jnp.take_along_axis(segments_bs, jnp.maximum(before_bs, 0), axis=1)
    first = real & ((owner_bs != segments_bs) | (before_bs < 0))
    rank_bs = count_bs - jax.lax.cummax(jnp.where(first, count_bs, 0), axis=1)
    last = real & (rank_bs % ratio == ratio - 1)
    ended_bs = jnp.cumsum(last, axis=1)
    number_c = jnp.arange(max(s // ratio, 1))
    wanted_bc = jnp.broadcast_to(number_c[None] + 1, (len(k_bsi), len(number_c)))
    ends_bc = _first(ended_bs, wanted_bc)
    owner_bc = jnp.take_along_axis(segments_bs, jnp.minimum(ends_bc, s - 1), axis=1)
    counts_bc = jnp.take_along_axis(count_bs, jnp.minimum(ends_bc, s - 1), axis=1)
    counts_bcr = counts_bc[..., None] - jnp.arange(ratio)[None, None, ::-1]
    slots_bm = _first(count_bs, counts_bcr.reshape(len(k_bsi), -1))
    slots_bm = jnp.minimum(slots_bm, s - 1)
    wide = jnp.promote_types(k_bsi.dtype, jnp.float32)
    k_bmi = jnp.take_along_axis(k_bsi, slots_bm[..., None], axis=1).astype(wide)
    k_bci = jnp.mean(k_bmi.reshape(*counts_bcr.shape, -1), axis=2).astype(k_bsi.dtype)
    k_bci = norm.rms_norm(k_bci, norm_i, spec.norm_eps, spec.norm_offset)
    slots_bcr = slots_bm.reshape(counts_bcr.shape)
    cos_bck, sin_bck = (
        jnp.take_along_axis(x, slots_bcr[:, :, :1], axis=1) for x in (cos_bsk, sin_bsk)
    )
    return Blocks(
        keys_bci=rope.apply(k_bci[:, :, None], cos_bck, sin_bck)[:, :, 0],
        slots_bcr=slots_bcr,
        segments_bc=jnp.where(ends_bc < s, owner_bc, 0),
        count_bs=count_bs,
        rank_bs=rank_bs,
        block_bs=jnp.minimum(ended_bs - last, len(number_c) - 1),
    )


_first = jax.vmap(jnp.searchsorted)  # where a rising row reaches each of some counts


def choose(q_bqni, slot_q, segments_bq, found: Blocks, spec):
    """The best blocks of each query: (numbers [b, q, a], whether there is one)."""
    wide = jnp.promote_types(q_bqni.dtype, jnp.float32)
    score_bqnc = jnp.einsum(
        "bqni,bci->bqnc", q_bqni, found.keys_bci, preferred_element_type=wide
    )
    score_bqc = jnp.sum(jax.nn.relu(score_bqnc), axis=2) * q_bqni.shape[-1] ** -0.5
    whole = segments_bq[:, :, None] == found.segments_bc[:, None, :]
    whole &= found.slots_bcr[:, None, :, -1] <= slot_q[None, :, None]
    whole &= (segments_bq > 0)[:, :, None]
    most = min(spec.indexed.budget // spec.indexed.ratio, score_bqc.shape[-1])
    best_bqa, block_bqa = jax.lax.top_k(jnp.where(whole, score_bqc, -1.0), most)
    return block_bqa, best_bqa >= 0


def mask(q_bqni, slot_q, segments_bq, segments_bs, found: Blocks, spec) -> jax.Array:
    """Which slots the queries in slots `slot_q` see: bool [b, q, s]."""
    block_bqa, there_bqa = choose(q_bqni, slot_q, segments_bq, found, spec)
    none_bqc = jnp.zeros((*block_bqa.shape[:2], found.keys_bci.shape[1]), bool)
    chosen_bqc = jnp.put_along_axis(
        none_bqc, block_bqa, there_bqa, axis=2, inplace=False
    )
    chosen_bqs = jnp.take_along_axis(chosen_bqc, found.block_bs[:, None, :], axis=2)
    rank_bq = jnp.take(found.rank_bs, slot_q, axis=1, mode="clip")
    ratio = spec.indexed.ratio
    tail_bq = (rank_bq + 1) // ratio * ratio
    seen = chosen_bqs | (found.rank_bs[:, None, :] >= tail_bq[:, :, None])
    seen &= slot_q[None, :, None] >= jnp.arange(segments_bs.shape[1])[None, None, :]
    seen &= segments_bq[:, :, None] == segments_bs[:, None, :]
    return seen & (segments_bq > 0)[:, :, None]


def chosen_slots(q_bqni, slot_q, segments_bq, found: Blocks, spec):
    """As `mask`, as a list: (slots [b, q, m], which of them are seen)."""
    block_bqa, there_bqa = choose(q_bqni, slot_q, segments_bq, found, spec)
    b, q, ratio = *block_bqa.shape[:2], spec.indexed.ratio
    slots_bqar = jax.vmap(lambda slots, block: slots[block])(found.slots_bcr, block_bqa)
    there_bqar = jnp.broadcast_to(there_bqa[..., None], slots_bqar.shape)
    rank_bq, count_bq = (
        jnp.take(x, slot_q, axis=1, mode="clip")
        for x in (found.rank_bs, found.count_bs)
    )
    back = jnp.arange(ratio - 1)
    wanted = (count_bq[..., None] - back[None, None]).reshape(b, -1)
    last_bqr = _first(found.count_bs, wanted).reshape(b, q, ratio - 1)
    tail = back[None, None] < ((rank_bq + 1) % ratio)[..., None]
    slots = jnp.concatenate([slots_bqar.reshape(b, q, -1), last_bqr], axis=2)
    seen = jnp.concatenate([there_bqar.reshape(b, q, -1), tail], axis=2)
    return slots, seen & (segments_bq > 0)[..., None]


def attend(
    q_btnk,
    k_bhks,
    v_bhsk,
    q_btni,
    k_bsi,
    cos_bsk,
    sin_bsk,
    segments_bt,
    segments_bs,
    length,
    norm_i,
    *,
    spec: spec_lib.Spec,
    queries: int | None = None,
) -> jax.Array:
    """Attention of one device's rows and heads: out_btnk; query j is in slot length + j
    and its key is among the s slots. `queries` at a time; None chooses."""
    b, t, n, k = q_btnk.shape
    h, s = v_bhsk.shape[1:3]
    queries = queries or max(8, min(256, PAIRS // s))
    found = jax.lax.stop_gradient(
        blocks(k_bsi, cos_bsk, sin_bsk, segments_bs, norm_i, spec)
    )

    few = t * (spec.indexed.budget + spec.indexed.ratio - 1) < s

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def some(q_bqnk, q_bqni, segments_bq, slot_q):
        q_bqhgk = (q_bqnk * k**-0.5).reshape(b, -1, h, n // h, k)
        if few:
            slots, seen = chosen_slots(q_bqni, slot_q, segments_bq, found, spec)
            take = jax.vmap(lambda x, slots_qs: jnp.take(x, slots_qs, axis=-1))
            keys, dims = take(k_bhks, slots), ("bhkqs", "bhqsk")
            values = jax.vmap(lambda x_hsk, slots_qs: x_hsk[:, slots_qs])(v_bhsk, slots)
        else:
            seen = mask(q_bqni, slot_q, segments_bq, segments_bs, found, spec)
            keys, values, dims = k_bhks, v_bhsk, ("bhks", "bhsk")
        wide = {"preferred_element_type": jnp.promote_types(q_bqnk.dtype, jnp.float32)}
        scores = jnp.einsum(f"bqhgk,{dims[0]}->bhgqs", q_bqhgk, keys, **wide)
        seen = jnp.broadcast_to(seen[:, None, None], scores.shape)
        p = jax.nn.softmax(jnp.where(seen, scores, blockwise.NEG), axis=-1)
        p = jnp.where(seen, p, 0.0).astype(values.dtype)
        out = jnp.einsum(f"bhgqs,{dims[1]}->bqhgk", p, values, **wide)
        return out.astype(q_bqnk.dtype).reshape(q_bqnk.shape)

    slot_t = length + jnp.arange(t)
    if t <= queries:
        return some(q_btnk, q_btni, segments_bt, slot_t)
    parts, rest = -(-t // queries), -t % queries

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], parts, queries, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    pieces = (*map(cut, (q_btnk, q_btni, segments_bt)), cut(slot_t[None])[:, 0])
    out = jax.lax.map(lambda piece: some(*piece), pieces)
    return jnp.moveaxis(out, 0, 1).reshape(b, parts * queries, n, k)[:, :t]


def attention(
    p, x_btd, qkv, cos_btk, sin_btk, segments_bt, *, spec, rules
) -> jax.Array:
    """One layer's attention over whole rows: out_btnk; `p` is of the index, `qkv` what
    `attention.project` gives."""
    rows = rules.pspec("batch", None)
    if segments_bt is None:
        segments_bt = mesh.reshard(jnp.ones(x_btd.shape[:2], jnp.int32), rows)
    q_btni, k_bti = project(p, x_btd, cos_btk, sin_btk, spec, rules)
    run = local(spec, rules)
    q_btnk, k_bshk, v_bshk = qkv
    out_btnk = run(
        *(q_btnk, k_bshk.transpose(0, 2, 3, 1), v_bshk.transpose(0, 2, 1, 3)),
        q_btni,
        k_bti,
        cos_btk,
        sin_btk,
        segments_bt,
        segments_bt,
        jnp.zeros((), jnp.int32),
        jax.lax.stop_gradient(p["k_norm_li"]),
    )
    return checkpoint_name(out_btnk, "attention")


def local(spec, rules):
    """`attend` on each device's rows and heads."""
    heads = rules.pspec("batch", None, "heads", None)
    kv_heads = rules.pspec("batch", "kv_heads", None, None)
    rows, index = rules.pspec("batch", None), rules.pspec("batch", None, None)
    queries = rules.pspec("batch", None, None, None)
    return mesh.local(
        functools.partial(attend, spec=spec),
        inputs=(
            *(heads, kv_heads, kv_heads, queries, index, index, index),
            *(rows, rows, jax.P(), jax.P()),
        ),
        out=heads,
    )
