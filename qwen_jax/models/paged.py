# SPDX-License-Identifier: Apache-2.0
"""Decoding state in pages: rows of any length share one pool, and may share pages.

Source: PagedAttention (arXiv 2309.06180). A page holds c tokens of one row in every
attention layer; `table_bp` says which pages a row's tokens lie in, in order. Token i of
a row lies in page table[i // c] at i % c, and i is its position. Rows need not agree on
anything: each has its own length. Linear layers keep a state per slot instead, one for
each row that runs.

    hidden_btd, pages = hidden(spec, params, tokens_bt, real_bt, pages, places)

serves decoding (t = 1) and pieces of prompts (t a multiple of c, from a page's border
on), padding on the right; with `trial` a few tokens of each row from any place on, of
which `settled` then says how many stay. Images among the tokens of a piece come as
features, which take the tokens' places (`Shown`); rows that go on behind them tell
their shift. Page 0 and the last slot are nobody's: what has no place is written there.

Shapes: k_nhkc and v_nhck with n pages for each attention layer; layers with a window
keep all of their pages, too, and look at the near ones only. Linear layers: the state
of `delta.mix` with slots r for rows; tail_rj, segments of the filters' last inputs.
Invariants: what a row computes does not depend on which pages it has, or on the other
rows; a page that two rows share is written by neither. Weights have layers apart
(`decoder.unstacked`).
Ways over pages, by platform: `page_ways.py`.
Raises: config.InputError for models whose layers keep something else.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import config, mesh
from qwen_jax.models import attention as attn
from qwen_jax.models import decoder, page_ways, paged_one, rope, streams
from qwen_jax.models import delta as delta_lib
from qwen_jax.models import spec as spec_lib


@struct.dataclass
class Pages:
    """Pools of the attention layers, and states of the linear ones; see above."""

    attention: list[dict[str, jax.Array]]
    delta: list[dict[str, jax.Array]]
    tail_rj: jax.Array
    mtp: dict[str, jax.Array] | None = None  # of the MTP head: see `paged_mtp.py`
    hidden_rd: jax.Array | None = None

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.attention[0]["v_nhck"].shape[2]


@struct.dataclass
class Places:
    """Where the rows of a call lie.

    table_bp: int32 pages of each row in order; what is behind its last is not looked
    at. length_b: its tokens before this call. slot_b: the slot of its states. shift_b:
    the position of a token is its place in the row plus this (behind images it is
    less than its place); None where no row has any.
    """

    table_bp: jax.Array
    length_b: jax.Array
    slot_b: jax.Array
    shift_b: jax.Array | None = None


@struct.dataclass
class Shown:
    """What images make of the tokens of a call.

    positions_3bt: temporal, row and column. index_bt: which of the features takes the
    token's place; -1 for text. features_fd: of merged patches. deep_lfd: what DeepStack
    adds behind the first layers, or None.
    """

    positions_3bt: jax.Array
    index_bt: jax.Array
    features_fd: jax.Array
    deep_lfd: jax.Array | None


def check(spec: spec_lib.Spec) -> None:
    """Refuse models that keep more than keys, values and linear states.

    Raises:
      config.InputError: naming what the model has.
    """
    has = {
        "indexed attention": spec.indexed is not None,
        "embeddings of n-grams": spec.ngram is not None,
        "several residual streams": spec.streams is not None,
        "dual chunk attention": spec.dual_chunk is not None,
    }
    found = [name for name, there in has.items() if there]
    if found:
        raise config.InputError(
            f"pages do not hold what {' and '.join(found)} need; use `qwen-jax "
            "generate` with this model"
        )
    if not any(kind.mixer == "attention" for kind in spec.kinds):
        raise config.InputError("pages need at least one attention layer")


def init(
    spec: spec_lib.Spec,
    pages: int,
    page_tokens: int,
    slots: int,
    rules: mesh.Rules | None = None,
    *,
    mtp: bool = False,
) -> Pages:
    """Empty pools of `pages` pages, page 0 among them, and states of `slots` rows; with
    `mtp` those of the MTP head as well."""
    check(spec)
    rules = (rules or mesh.Rules()).whole
    dtype, h, k = jnp.dtype(spec.compute_dtype), spec.num_kv_heads, spec.head_width
    layout = rules.pspec(None, "kv_heads", None, None)

    def zeros(*shape):
        return mesh.reshard(jnp.zeros(shape, dtype), layout)

    def pool():
        return {
            "k_nhkc": zeros(pages, h, k, page_tokens),
            "v_nhck": zeros(pages, h, page_tokens, k),
        }

    mixers = [kind.mixer for kind in spec.kinds]
    attention = [pool() for mixer in mixers if mixer == "attention"]
    delta, tail_rj = [], jnp.zeros((slots + 1, 0), jnp.int32)
    if "delta" in mixers:
        for _ in range(mixers.count("delta")):
            delta.append(delta_lib.fresh(spec, slots + 1, dtype, rules))
            tail_rj = delta[-1].pop("segments_bj")
    hidden_rd = jnp.zeros((slots + 1, spec.width), dtype)
    more = {"mtp": pool(), "hidden_rd": hidden_rd} if mtp else {}
    return Pages(attention, delta, tail_rj, **more)


def page_bytes(spec: spec_lib.Spec, page_tokens: int, *, mtp: bool = False) -> int:
    """Bytes of one page in all layers, with `mtp` in that of the MTP head as well."""
    layers = sum(kind.mixer == "attention" for kind in spec.kinds) + mtp
    item = jnp.dtype(spec.compute_dtype).itemsize
    return 2 * layers * spec.num_kv_heads * spec.head_width * page_tokens * item


def hidden(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    real_bt: jax.Array,
    pages: Pages,
    places: Places,
    *,
    shown: Shown | None = None,
    rules: mesh.Rules | None = None,
    way: str = "",
    trial: bool = False,
) -> tuple[jax.Array, ...]:
    """Hidden states [b, t, d] of new tokens, after the last norm, and the pages with
    them in; with `trial` also what `settled` needs, linear states being as they were.

    Args:
      spec: what the model is.
      params: its weights, layers apart.
      tokens_bt: int32; t = 1, or a multiple of the page and `length_b` likewise.
      real_bt: int32, 1 for tokens, 0 for padding on the right.
      pages: the pools.
      places: where the rows lie, room for the new tokens included.
      shown: images among the tokens.
      rules: dims -> mesh axes.
      way: over the pages; "" takes the one of the platform.
      trial: t and `length_b` are whatever they are, t is small.
    """
    rules = (rules or mesh.Rules()).whole
    see = {"images": None, "videos": None, "rules": rules, "saved": None}
    x, _ = decoder.embed_tokens(spec, params, tokens_bt, real_bt, **see)
    angles, places = angles_of(spec, places, tokens_bt.shape[1])
    deep = ()
    if shown is not None:
        angles = rope.angles(spec, shown.positions_3bt)
        x = _put_in(x, shown.features_fd, shown.index_bt, rules, add=False)
        deep = () if shown.deep_lfd is None else shown.deep_lfd
    way = way or page_ways.here()
    how = {"real_bt": real_bt, "places": places, "way": way, "trial": trial}
    mix = functools.partial(attention, **how, spec=spec, rules=rules)
    held, new, after, inputs = iter(pages.attention), [], [], []
    states = iter(_states(pages, places))
    for i, (kind, p) in enumerate(zip(spec.kinds, params["layers"], strict=True)):
        if paged_one.fits(spec, kind, p, tokens_bt.size, way):
            attend = functools.partial(
                _local, held=next(held), window=kind.window, **how
            )
            x, mine = paged_one.layer(spec, p, x, angles, attend)
            new.append(mine)
            continue  # a piece with images has more tokens than one
        y_btd, inject = streams.enter(p[streams.names(spec)[0]], x, spec, rules)
        if kind.mixer == "attention":
            y_btd, mine = mix(
                p["attention"], y_btd, *angles, next(held), window=kind.window
            )
            new.append(mine)
        else:
            y_btd, state = delta_lib.mix(
                p["delta"],
                y_btd,
                real_bt,
                next(states),
                spec=spec,
                rules=rules,
                keep=trial,
            )
            inputs.append(state.pop("inputs", None))
            after.append(state)
        x = streams.leave(x, y_btd, inject)
        x, _ = decoder.feed_forward(p, x, real_bt, spec, rules, kind)
        if i < len(deep):
            x = _put_in(x, deep[i], shown.index_bt, rules, add=True)
    x = streams.end(params, x, spec, rules)
    pages = pages.replace(attention=new)
    if trial:
        return x, pages, inputs
    return x, _put(pages, after, real_bt, places)


def _put_in(x_btd, features_fd, index_bt, rules, *, add: bool):
    """Features in the place of tokens, or added to them; text as it was."""

    def run(x_btd, features_fd, index_bt):
        new_btd = features_fd[jnp.maximum(index_bt, 0)].astype(x_btd.dtype)
        new_btd = x_btd + new_btd if add else new_btd
        return jnp.where((index_bt >= 0)[..., None], new_btd, x_btd)

    lies = rules.pspec("batch", None, None)
    index = rules.pspec("batch", None)
    return mesh.local(run, inputs=(lies, jax.P(None, None), index), out=lies)(
        x_btd, features_fd, index_bt
    )


def angles_of(spec, places, t: int):
    """(cos and sin of t tokens of each row, the places without a shift)."""
    at_bt = places.length_b[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
    if places.shift_b is not None:
        at_bt = at_bt + places.shift_b[:, None]
    return rope.angles(spec, at_bt), places.replace(shift_b=None)


def settled(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    pages: Pages,
    inputs: list[dict[str, jax.Array]],
    real_bt: jax.Array,
    places: Places,
    rules: mesh.Rules,
) -> Pages:
    """The pages after a trial of which the tokens of `real_bt` stay, the first ones of
    each row: the linear layers' rule is run again over these. Keys and values of others
    are behind the end of their row, where nothing looks and the next are written."""
    layers = [params["layers"][i]["delta"] for i in spec.layers_with("delta")]
    parts = zip(layers, inputs, _states(pages, places), strict=True)
    after = [delta_lib.run(*part[:2], real_bt, part[2], rules)[1] for part in parts]
    return _put(pages, after, real_bt, places)


def _states(pages, places):
    """What each linear layer keeps of the rows of a call."""
    (take, _), tail = by_slot(), {"segments_bj": _tail(pages, places)}
    return [
        {k: take(s, places.slot_b) for k, s in state_r.items()} | tail
        for state_r in pages.delta
    ]


def _tail(pages, places):
    """Segments of the filters' last inputs; none at the beginning of a row."""
    tail_bj = by_slot()[0](pages.tail_rj, places.slot_b)
    return jnp.where((places.length_b > 0)[:, None], tail_bj, 0)


def _put(pages, after, real_bt, places):
    """The pages with new states of the rows of a call."""
    if not after:
        return pages
    put = by_slot()[1]
    tail_bj = delta_lib.tail_segments(_tail(pages, places), real_bt)
    delta = [
        {k: put(s, places.slot_b, new[k]) for k, s in state_r.items()}
        for state_r, new in zip(pages.delta, after, strict=True)
    ]
    tail_rj = put(pages.tail_rj, places.slot_b, tail_bj)
    return pages.replace(delta=delta, tail_rj=tail_rj)


def by_slot():
    """Two functions of states, one a slot, and the slots of rows: (states of the rows
    of a call, the states with theirs in)."""

    def lies_of(x):
        return jax.typeof(x).sharding.spec if mesh.active() else None

    def take(x_r, slot_b):
        spec = lies_of(x_r)
        run = mesh.local(lambda x, i: x[i], inputs=(spec, jax.P(None)), out=spec)
        return run(x_r, slot_b)

    def put(x_r, slot_b, new_b):
        spec = lies_of(x_r)
        run = mesh.local(
            lambda x, i, new: x.at[i].set(new.astype(x.dtype)),
            inputs=(spec, jax.P(None), spec),
            out=spec,
        )
        return run(x_r, slot_b, new_b)

    return take, put


def attention(
    p,
    x_btd,
    cos_btk,
    sin_btk,
    held,
    *,
    real_bt,
    places,
    spec,
    rules,
    way,
    window,
    trial=False,
):
    """One layer over new tokens and the pages of their rows: (y_btd, the pools)."""
    q_btnk, k_bthk, v_bthk = attn.project(p, x_btd, cos_btk, sin_btk, spec, rules)
    heads = rules.pspec(None, None, "heads", None)
    kv_heads = rules.pspec(None, None, "kv_heads", None)
    pools = dict.fromkeys(held, rules.pspec(None, "kv_heads", None, None))
    where = Places(jax.P(None, None), jax.P(None), jax.P(None))
    run = mesh.local(
        functools.partial(_local, way=way, window=window, trial=trial),
        inputs=(heads, kv_heads, kv_heads, pools, jax.P(None, None), where),
        out=(heads, pools),
        checked=way != "kernel",  # a kernel does not say which axes it varies on
    )
    out_btnk, held = run(q_btnk, k_bthk, v_bthk, held, real_bt, places)
    return attn.merge(p, out_btnk, x_btd, spec, rules), held


def _local(q_btnk, k_bthk, v_bthk, held, real_bt, places, *, way, window, trial):
    held = written(held, k_bthk, v_bthk, real_bt, places, trial)
    over = page_ways.WAYS[way]
    return over(q_btnk, held, real_bt, places, window), held


def written(held, k_bthk, v_bthk, real_bt, places, trial):
    """The pools with new tokens in; with `trial` they may begin inside a page."""
    (b, t), c = real_bt.shape, held["v_nhck"].shape[2]
    first_b = places.length_b // c
    rows = jnp.arange(b)
    if t == 1 or trial:
        at_bt = places.length_b[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        page_bt = jnp.take_along_axis(places.table_bp, at_bt // c, 1, mode="clip")
        page_bt = jnp.where(real_bt > 0, page_bt, 0)
        flat = (x.reshape(b * t, *x.shape[2:]) for x in (k_bthk, v_bthk))
        return _one_each(held, *flat, page_bt.reshape(-1), (at_bt % c).reshape(-1))
    count = t // c
    index_bj = first_b[:, None] + jnp.arange(count)[None]
    page_bj = places.table_bp[rows[:, None], index_bj]
    # A page of padding alone is nobody's.
    page_bj = jnp.where(real_bt[:, ::c] > 0, page_bj, 0)
    k = k_bthk.reshape(b, count, c, *k_bthk.shape[2:]).transpose(0, 1, 3, 4, 2)
    v = v_bthk.reshape(b, count, c, *v_bthk.shape[2:]).transpose(0, 1, 3, 2, 4)
    k_nhkc, v_nhck = held["k_nhkc"], held["v_nhck"]
    return {
        "k_nhkc": k_nhkc.at[page_bj].set(k.astype(k_nhkc.dtype)),
        "v_nhck": v_nhck.at[page_bj].set(v.astype(v_nhck.dtype)),
    }


def _one_each(held, k_bhk, v_bhk, page_b, at_b):
    """One token of each row into its page."""
    k_nhkc, v_nhck = held["k_nhkc"], held["v_nhck"]
    k_bhk, v_bhk = k_bhk.astype(k_nhkc.dtype), v_bhk.astype(v_nhck.dtype)
    if mesh.platform() != "cpu":
        return {
            "k_nhkc": k_nhkc.at[page_b, :, :, at_b].set(k_bhk),
            "v_nhck": v_nhck.at[page_b, :, at_b].set(v_bhk),
        }
    # A CPU would scatter into a copy of the pool; slices are written where they go.
    for i in range(len(page_b)):
        zero = jnp.zeros((), page_b.dtype)
        k_nhkc = jax.lax.dynamic_update_slice(
            k_nhkc, k_bhk[i][None, :, :, None], (page_b[i], zero, zero, at_b[i])
        )
        v_nhck = jax.lax.dynamic_update_slice(
            v_nhck, v_bhk[i][None, :, None], (page_b[i], zero, at_b[i], zero)
        )
    return {"k_nhkc": k_nhkc, "v_nhck": v_nhck}


def state_units(spec: spec_lib.Spec, page_tokens: int) -> int:
    """Consecutive pages that hold one row's states of all linear layers; 0 without, or
    where they cannot."""
    layers, delta = [kind.mixer for kind in spec.kinds], spec.delta
    if "delta" not in layers or spec.compute_dtype == "float16":
        return 0
    if page_tokens < delta.conv_taps - 1:
        return 0
    inputs = 2 * delta.key_heads * delta.key_width
    inputs += delta.value_heads * delta.value_width
    matrix = delta.value_heads * delta.key_width * delta.value_width
    one = matrix * (3 if spec.compute_dtype == "bfloat16" else 1)
    one += (delta.conv_taps - 1) * inputs
    item = jnp.dtype(spec.compute_dtype).itemsize
    return -(-layers.count("delta") * one * item // page_bytes(spec, page_tokens))


def saved(pages: Pages, slot: jax.Array, first: jax.Array, units: int) -> Pages:
    """The states of a slot written into pages `first` .. `first + units - 1`, as they
    are: what a row needs to go on from where it is lies beside its keys and values."""

    def run(attention, delta, slot, first):
        parts = [x[slot] for x in jax.tree.leaves(delta)]
        dtype = attention[0]["v_nhck"].dtype
        flat = jnp.concatenate([_parts(x, dtype).reshape(-1) for x in parts])
        shapes = [x.shape[1:] for x in jax.tree.leaves(attention)]
        sizes = [math.prod(shape) for shape in shapes]
        flat = jnp.pad(flat, (0, units * sum(sizes) - flat.size))
        flat_ue, leaves, at = flat.reshape(units, -1), [], 0
        for x, shape, size in zip(
            jax.tree.leaves(attention), shapes, sizes, strict=True
        ):
            part = flat_ue[:, at : at + size].reshape(units, *shape)
            leaves.append(jax.lax.dynamic_update_slice_in_dim(x, part, first, axis=0))
            at += size
        return jax.tree.unflatten(jax.tree.structure(attention), leaves)

    lies = _lies(pages.attention)
    run = mesh.local(
        run,
        inputs=(lies, _lies(pages.delta), jax.P(), jax.P()),
        out=lies,
    )
    return pages.replace(attention=run(pages.attention, pages.delta, slot, first))


def restored(pages: Pages, slot: jax.Array, first: jax.Array, units: int) -> Pages:
    """The states of a slot as `saved` wrote them into pages from `first` on."""

    def run(attention, delta, slot, first):
        held = [
            jax.lax.dynamic_slice_in_dim(x, first, units, axis=0).reshape(units, -1)
            for x in jax.tree.leaves(attention)
        ]
        flat, leaves, at = jnp.concatenate(held, axis=1).reshape(-1), [], 0
        for x in jax.tree.leaves(delta):
            like = jax.eval_shape(lambda x: _parts(x[0], flat.dtype), x)
            part = flat[at : at + like.size].reshape(like.shape)
            leaves.append(x.at[slot].set(_sum(part, x.dtype)))
            at += like.size
        return jax.tree.unflatten(jax.tree.structure(delta), leaves)

    lies = _lies(pages.delta)
    run = mesh.local(
        run,
        inputs=(_lies(pages.attention), lies, jax.P(), jax.P()),
        out=lies,
    )
    delta = run(pages.attention, pages.delta, slot, first)
    # Behind a whole page all inputs of the filters are the row's own.
    tail_rj = pages.tail_rj.at[slot].set(1)
    return pages.replace(delta=delta, tail_rj=tail_rj)


def _lies(tree):
    """How the arrays of a tree lie on the mesh."""
    if not mesh.active():
        return jax.tree.map(lambda x: jax.P(), tree)
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def _parts(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Numbers of a pool's dtype whose sums are x, side by side in a last dim.

    float32 as three of bfloat16 is exact down to 1e-33. Bits would be fewer numbers,
    but half of a float32 may look like a NaN, and NaNs do not keep their bits.
    """
    if x.dtype == dtype:
        return x[..., None]
    parts = []
    for _ in range(3):
        # Not a cast there and back, which compilers leave out.
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return jnp.stack(parts, axis=-1).astype(dtype)


def _sum(parts: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x of its `_parts`."""
    return jnp.sum(parts.astype(dtype), axis=-1)
