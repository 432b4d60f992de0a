# SPDX-License-Identifier: Apache-2.0
"""Embeddings of the last few tokens, looked up by hashes, added to all streams.

For each length n from 2 to `size`, and each of `heads` hashes of that length,

    id = (x_t m_0 xor x_(t-1) m_1 xor ...) mod p + offset

with a prime p of its own, so a row of its own table; odd multipliers m of the layer
from splitmix64. Where an n-gram would reach across an end-of-text token or the border
of a document, the end-of-text id stands for what lies beyond. With e the rows joined,

    value = e Wv;  key = norm(e Wk), query = norm(X), for each stream
    s = key . query / sqrt(d);  y = sigmoid(sign(s) sqrt(max(|s|, 1e-6))) value
    X <- X + y + silu(conv(norm(y)))

The convolution is causal, a filter for each channel, its taps `size` tokens apart.
Source: `qwen4_exp` of transformers 5.23. Deviation: packed rows equal separate rows.

Hashes need 64 bits: `ids` computes them on the host in NumPy's uint64 and is the plain
twin of `device_ids`, which has two uint32 for each, so it runs under jit on any device.

Shapes: x_btrd -> x_btrd; ids int32 [l, b, t, n] for the l layers that have tables, n
hashes; weights table_lvk (tables one after another), key_lprd, value_lpd, norm_key_lrd,
norm_query_lrd, norm_conv_lrd, conv_ljrd; p is the width of the joined rows. Layers'
tables differ a little in rows: all are as long as the longest, the rest is never read.
State in, state out: inputs of the convolution and ids of the last `reach` real tokens.
The rows of a table are split over the mesh axis of `vocab`, their width over `embed`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import mesh
from qwen_jax.models import front, norm
from qwen_jax.models import spec as spec_lib
from qwen_jax.params import Param, normal, ones, zeros

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True)
class Tables:
    """The hashes of one layer: `primes[i]` rows from `offsets[i]` on are hash i's."""

    multipliers: tuple[int, ...]
    primes: tuple[int, ...]
    offsets: tuple[int, ...]
    rows: int


@functools.lru_cache
def tables(ngram: spec_lib.Ngram, vocab_size: int) -> tuple[Tables, ...]:
    """The hashes of each layer that has some."""
    out, prime = [], ngram.base - 1
    for layer in range(len(ngram.layers)):
        primes = []
        for _ in range(ngram.tables):
            prime = _next_prime(prime)
            primes.append(prime)
        ends = np.cumsum(primes).tolist()
        bound = max(1, (2**63 - 1) // vocab_size // 2)
        first = ngram.seed + 10_007 * layer
        multipliers = tuple(
            2 * (_splitmix64(first + _GAMMA * (i + 1)) % bound) + 1
            for i in range(ngram.size)
        )
        rows = -(-ends[-1] // ngram.multiple) * ngram.multiple
        out.append(Tables(multipliers, tuple(primes), (0, *ends[:-1]), rows))
    return tuple(out)


def _splitmix64(x: int) -> int:
    x = (x + _GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _next_prime(x: int) -> int:
    x += 1
    while x < 2 or any(x % i == 0 for i in range(2, math.isqrt(x) + 1)):
        x += 1
    return x


def reach(ngram: spec_lib.Ngram) -> int:
    """Tokens before a token that it can depend on, by hashes or the convolution."""
    return ngram.size * (ngram.taps - 1) if ngram.taps > 1 else ngram.size - 1


def ngram_params(spec: spec_lib.Spec, layers: int) -> dict[str, Param]:
    """Tables, gates and filters of the layers that have them, stacked."""
    ngram, d, r = spec.ngram, spec.width, spec.streams.count
    init, plain = normal(spec.init_std), zeros if spec.norm_offset else ones
    rows = max(x.rows for x in tables(ngram, spec.vocab_size))
    p, k, free = ngram.width, ngram.width // ngram.tables, ("layers", None, None)
    return {
        "table_lvk": Param((layers, rows, k), ("layers", "vocab", "embed"), init),
        "key_lprd": Param((layers, p, r, d), (*free, "embed"), init),
        "value_lpd": Param((layers, p, d), ("layers", None, "embed"), init),
        "norm_key_lrd": Param((layers, r, d), free, plain),
        "norm_query_lrd": Param((layers, r, d), free, plain),
        "norm_conv_lrd": Param((layers, r, d), free, plain),
        "conv_ljrd": Param((layers, ngram.taps, r, d), (*free, None), zeros),
    }


def ids(
    spec: spec_lib.Spec, tokens_bt: np.ndarray, segments_bt: np.ndarray | None = None
) -> np.ndarray:
    """Row of each hash of each token, on the host: int32 [l, b, t, n]; 0 in padding."""
    ngram = spec.ngram
    tokens_bt = np.asarray(tokens_bt).astype(np.uint64)
    if segments_bt is None:
        segments_bt = np.ones(tokens_bt.shape, np.int32)
    out = np.zeros((len(ngram.layers), *tokens_bt.shape, ngram.tables), np.int32)
    for b, (row, segments) in enumerate(zip(tokens_bt, segments_bt, strict=True)):
        real = np.flatnonzero(segments)
        row, segments = row[real], segments[real]
        shifted, whole = [row], np.ones(row.shape, bool)
        for n in range(1, ngram.size):
            # Padded with what no n-gram reaches across.
            before = np.concatenate([np.full(n, ngram.eos_id, np.uint64), row])
            before = before[: len(row)]
            same = np.concatenate([np.zeros(n, np.int32), segments])[: len(row)]
            whole &= (same == segments) & (before != ngram.eos_id)
            shifted.append(np.where(whole, before, np.uint64(ngram.eos_id)))
        for layer, table in enumerate(tables(ngram, spec.vocab_size)):
            mixed = shifted[0] * np.uint64(table.multipliers[0])
            for n in range(1, ngram.size):
                mixed = mixed ^ shifted[n] * np.uint64(table.multipliers[n])
                for i in range((n - 1) * ngram.heads, n * ngram.heads):
                    found = mixed % np.uint64(table.primes[i])
                    out[layer, b, real, i] = found.astype(np.int64) + table.offsets[i]
    return out


def device_ids(
    spec: spec_lib.Spec,
    tokens_bt: jax.Array,
    segments_bt: jax.Array,
    recent: dict[str, jax.Array],
) -> jax.Array:
    """As `ids`, in uint32 alone, after the tokens that `recent` holds."""
    ngram, t = spec.ngram, tokens_bt.shape[1]
    order, back = front.order(segments_bt)
    seen = front.take(jnp.maximum(segments_bt, 0), order)
    now = front.take(tokens_bt, order)
    before = jnp.concatenate([recent["tokens_bj"], now], axis=1)
    owner = jnp.concatenate([recent["segments_bj"], seen], axis=1)
    shifted, whole = [now.astype(jnp.uint32)], jnp.ones(now.shape, bool)
    for n in range(1, ngram.size):
        first = before.shape[1] - t - n
        token, segment = (x[:, first : first + t] for x in (before, owner))
        whole &= (segment == seen) & (token != ngram.eos_id)
        shifted.append(jnp.where(whole, token, ngram.eos_id).astype(jnp.uint32))
    layers = []
    for table in tables(ngram, spec.vocab_size):
        high, low = _times(shifted[0], table.multipliers[0])
        found = []
        for n in range(1, ngram.size):
            more = _times(shifted[n], table.multipliers[n])
            high, low = high ^ more[0], low ^ more[1]
            mine = slice((n - 1) * ngram.heads, n * ngram.heads)
            rest = _modulo(high, low, np.array(table.primes[mine], np.uint32))
            found.append(rest + np.array(table.offsets[mine], np.int32)[None, None])
        layers.append(front.take(jnp.concatenate(found, axis=-1), back))
    return jnp.where((segments_bt > 0)[None, ..., None], jnp.stack(layers), 0)


def _times(x: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """x * factor below 2^64 as (high, low), by halves of 16 bits."""
    low, high = (np.uint32((factor >> shift) & 0xFFFFFFFF) for shift in (0, 32))
    x0, x1, f0, f1 = x & 0xFFFF, x >> 16, low & 0xFFFF, low >> 16
    p00, p01, p10, p11 = x0 * f0, x0 * f1, x1 * f0, x1 * f1
    middle = (p00 >> 16) + (p01 & 0xFFFF) + (p10 & 0xFFFF)
    carried = (p01 >> 16) + (p10 >> 16) + (middle >> 16)
    return p11 + carried + x * high, (p00 & 0xFFFF) | (middle << 16)


def _modulo(high_bt, low_bt, primes_n) -> jax.Array:
    """(high 2^32 + low) mod each prime: int32 [b, t, n]. By long division, so many bits
    at a time that the remainder before them still leaves room in 32."""
    step = 32 - int(primes_n.max()).bit_length()
    primes = jnp.asarray(primes_n)[None, None]
    rest = jnp.zeros((*low_bt.shape, len(primes_n)), jnp.uint32)
    for limb in (high_bt, low_bt):
        left = 32
        while left:
            bits = min(step, left)
            left -= bits
            piece = (limb >> left) & ((1 << bits) - 1)
            rest = ((rest << bits) | piece[..., None]) % primes
    return rest.astype(jnp.int32)


def attach(
    spec: spec_lib.Spec,
    layers: Any,
    tokens_bt: jax.Array,
    segments_bt: jax.Array | None,
    recent: dict[str, jax.Array] | None,
    rules: mesh.Rules,
) -> Any:
    """The layers, stacked or a list, with the ids of their n-grams beside the tables.

    All other ways of taking a layer's part of a stack then hold for its ids, too.
    """
    if spec.ngram is None:
        return layers
    b, t = tokens_bt.shape
    rows = rules.pspec("batch", None)
    if segments_bt is None:
        segments_bt = mesh.reshard(jnp.ones((b, t), jnp.int32), rows)
    recent = recent or fresh_recent(spec, b, rules)
    run = mesh.local(
        functools.partial(device_ids, spec),
        inputs=(rows, rows, dict.fromkeys(recent, rows)),
        out=rules.pspec(None, "batch", None, None),
    )
    ids_lbtn = run(tokens_bt, segments_bt, recent)
    if not isinstance(layers, list):
        return layers | {"ngram": layers["ngram"] | {"ids_lbtn": ids_lbtn}}
    return [
        p | {"ngram": p["ngram"] | {"ids_lbtn": ids_lbtn[spec.ngram.layers.index(i)]}}
        if i in spec.ngram.layers
        else p
        for i, p in enumerate(layers)
    ]


def add(
    p: dict[str, jax.Array],
    x_btrd: jax.Array,
    segments_bt: jax.Array | None,
    state: dict[str, Any] | None = None,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
) -> tuple[jax.Array, dict[str, Any]]:
    """One layer's n-grams in: (x_btrd, what the next call needs).

    `p` has one layer's weights and ids; `state` is {"x_bjrd", "segments_bj"}: inputs of
    the convolution and segments of the last real tokens; what comes back has all but
    the segments, which are the same in all layers: see `recent_after`.
    """
    b, t = x_btrd.shape[:2]
    rows, whole = rules.pspec("batch", None), rules.pspec("batch", None, None, None)
    if segments_bt is None:
        segments_bt = mesh.reshard(jnp.ones((b, t), jnp.int32), rows)
    if state is None:
        state = {k: x[0] for k, x in fresh(spec, b, x_btrd.dtype, rules, 1).items()}
        state["segments_bj"] = fresh_recent(spec, b, rules)["segments_bj"]
    how = {"dtype": x_btrd.dtype, "reduce_dtype": spec.reduce_dtype}
    eps, offset = spec.norm_eps, spec.norm_offset
    e_btnk = lookup(p["table_lvk"], p["ids_lbtn"], rules).astype(x_btrd.dtype)
    key_prd = mesh.gather(p["key_lprd"], rules, None, None, "embed", **how)
    value_pd = mesh.gather(p["value_lpd"], rules, None, "embed", **how)
    e_btp = mesh.reshard(e_btnk, whole).reshape(b, t, -1)
    key_btrd = mesh.product(e_btp, key_prd, out=whole)
    value_btd = mesh.product(e_btp, value_pd, out=rules.pspec("batch", None, None))
    key_btrd = norm.rms_norm(key_btrd, p["norm_key_lrd"], eps, offset)
    query_btrd = norm.rms_norm(x_btrd, p["norm_query_lrd"], eps, offset)
    score_btr = jnp.sum(key_btrd * query_btrd, axis=-1) * x_btrd.shape[-1] ** -0.5
    size_btr = jnp.sqrt(jnp.maximum(jnp.abs(score_btr), 1e-6))
    gate_btr = jax.nn.sigmoid(size_btr * jnp.sign(score_btr))
    y_btrd = gate_btr[..., None] * value_btd[:, :, None, :]
    conv = mesh.local(
        functools.partial(_conv, dilation=spec.ngram.size),
        inputs=(whole, rows, whole, rows, jax.P()),
        out=(whole, whole),
    )
    normed_btrd = norm.rms_norm(y_btrd, p["norm_conv_lrd"], eps, offset)
    filter_jrd = p["conv_ljrd"].astype(x_btrd.dtype)
    near_btrd, tail_bjrd = conv(
        normed_btrd, segments_bt, state["x_bjrd"], state["segments_bj"], filter_jrd
    )
    return x_btrd + y_btrd + near_btrd, {"x_bjrd": tail_bjrd}


def _conv(x, segments, tail, tail_segments, filter_jrd, *, dilation):
    """(silu of the causal filter inside each segment, the last inputs)."""
    taps, t, kept = filter_jrd.shape[0], x.shape[1], tail.shape[1]
    filter_jrd = mesh.vary(filter_jrd, mesh.varying(x))
    order, back = front.order(segments)
    x, own = (front.take(y, order) for y in (x, segments))
    seen = jnp.concatenate([tail_segments, own], axis=1)
    x = jnp.concatenate([tail, x], axis=1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = mesh.vary(jnp.zeros((x.shape[0], t, *x.shape[2:]), wide), mesh.varying(x))
    for j in range(taps):
        first = kept - (taps - 1 - j) * dilation
        near = (seen[:, first : first + t] == own) & (own > 0)
        part = x[:, first : first + t] * filter_jrd[j][None, None]
        y = y + jnp.where(near[..., None, None], part, 0)
    y = front.take(jax.nn.silu(y).astype(x.dtype), back)
    return y, front.last(x, segments, kept)


def lookup(table_vk: jax.Array, ids_btn: jax.Array, rules: mesh.Rules) -> jax.Array:
    """Rows of a table that stays where it lies: [v, k], [b, t, n] -> [b, t, n, k].

    Each device looks up what it has, its rows and its slice of the width, for the batch
    of its whole group; the traffic is what was found, never the table.
    """
    if not mesh.active():
        return table_vk[ids_btn]
    width, split = mesh.names(rules.embed), mesh.names(rules.vocab)
    outer = tuple(a for a in mesh.names(rules.batch) if a not in width) or None

    def run(table, ids):
        mine = table.shape[0]
        ids = ids - (jax.lax.axis_index(split) * mine if split else 0)
        here = (ids >= 0) & (ids < mine)
        found = jnp.where(here[..., None], table[jnp.where(here, ids, 0)], 0)
        return jax.lax.psum(found, split) if split else found

    run = mesh.local(
        run,
        inputs=(jax.P(split or None, width or None), jax.P(outer, None, None)),
        out=jax.P(outer, None, None, width or None),
    )
    found = run(table_vk, mesh.reshard(ids_btn, jax.P(outer, None, None)))
    return mesh.reshard(found, rules.pspec("batch", None, None, None))


def fresh(
    spec: spec_lib.Spec, b: int, dtype: Any, rules: mesh.Rules, layers: int
) -> dict[str, jax.Array]:
    """What the layers hold before the first token of `b` rows."""
    shape = (layers, b, reach(spec.ngram), spec.streams.count, spec.width)
    layout = rules.pspec("layers", "batch", None, None, None)
    return {"x_bjrd": mesh.reshard(jnp.zeros(shape, dtype), layout)}


def fresh_recent(
    spec: spec_lib.Spec, b: int, rules: mesh.Rules
) -> dict[str, jax.Array]:
    """No tokens yet: see `recent_after`."""
    empty = jnp.zeros((b, reach(spec.ngram)), jnp.int32)
    empty = mesh.reshard(empty, rules.pspec("batch", None))
    return {"tokens_bj": empty, "segments_bj": empty}


def recent_after(
    before: dict[str, jax.Array] | None,
    tokens_bt: jax.Array,
    segments_bt: jax.Array,
    rules: mesh.Rules,
) -> dict[str, jax.Array] | None:
    """Ids and segments of the last real tokens of each row, after new tokens; None
    where none are held."""
    if before is None:
        return None

    def run(before, tokens, segments):
        order, _ = front.order(segments)
        new = {"tokens_bj": tokens, "segments_bj": segments}
        both = {
            k: jnp.concatenate([x, front.take(new[k], order)], axis=1)
            for k, x in before.items()
        }
        kept = before["tokens_bj"].shape[1]
        return {k: front.last(x, segments, kept) for k, x in both.items()}

    rows = rules.pspec("batch", None)
    each = dict.fromkeys(before, rows)
    run = mesh.local(run, inputs=(each, rows, rows), out=each)
    return run(before, tokens_bt, segments_bt)
