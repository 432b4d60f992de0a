# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention: weights, projections, and the choice of a kernel.

Source: GQA (arXiv 2305.13245); biases on q, k, v as in Qwen2, RMSNorm on each q and k
head before RoPE as in Qwen3.

From Qwen3-Next on, an output gate: heads * sigmoid(x Wgate), one number for each.
With `spec.indexed`, rows that are long enough see chosen keys only: see `indexed.py`.
With a cache, layers that have a window keep no more than that: see `ring.py`.
Where the tokens of a row are split over devices (context parallelism) whole rows go
through kernels/ring_attention.py instead of a backend.

Shapes: x_btd -> y_btd. Weights q_ldnk, k_ldhk, v_ldhk, o_lnkd, biases q_bias_lnk,
k_bias_lhk, v_bias_lhk, norms q_norm_lk, k_norm_lk, stacked by layer.
Invariants: packed rows equal separate rows on every backend. A backend that cannot keep
that for the batch at hand is refused by `check_backend`, never used with less.
Backends: "blockwise" runs everywhere and is always right; "cudnn" (GPU, bf16 or f16,
one segment a row) and "splash" (TPU, segments, head width a multiple of 64) are opt-in.
Raises: config.InputError from `check_backend`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import config, mesh
from qwen_jax.models import dual_chunk, indexed, norm, ring, rope
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import blockwise, ring_attention
from qwen_jax.params import Param, normal, ones, zeros


def attention_params(spec: spec_lib.Spec, layers: int) -> dict[str, Param]:
    """Weights of `layers` attention blocks, stacked."""
    d, n, h, k = (
        spec.width,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_width,
    )
    init = normal(spec.init_std)
    tree = {
        "q_ldnk": Param((layers, d, n, k), ("layers", "embed", "heads", None), init),
        "k_ldhk": Param((layers, d, h, k), ("layers", "embed", "kv_heads", None), init),
        "v_ldhk": Param((layers, d, h, k), ("layers", "embed", "kv_heads", None), init),
        "o_lnkd": Param((layers, n, k, d), ("layers", "heads", None, "embed"), init),
    }
    if spec.qkv_bias:
        tree |= {
            "q_bias_lnk": Param((layers, n, k), ("layers", "heads", None), zeros),
            "k_bias_lhk": Param((layers, h, k), ("layers", "kv_heads", None), zeros),
            "v_bias_lhk": Param((layers, h, k), ("layers", "kv_heads", None), zeros),
        }
    if spec.qk_norm:
        plain = zeros if spec.norm_offset else ones
        tree |= {
            "q_norm_lk": Param((layers, k), ("layers", None), plain),
            "k_norm_lk": Param((layers, k), ("layers", None), plain),
        }
    if spec.output_gate:
        tree["gate_ldnk"] = tree["q_ldnk"]
    if spec.indexed is not None:
        tree["indexer"] = indexed.indexed_params(spec, layers)
    return tree


def check_backend(spec: spec_lib.Spec, platform: str, *, packed: bool) -> None:
    """Refuse an attention backend that cannot do what the batch needs.

    Raises:
      config.InputError: naming the backend, what it lacks, and what to set instead.
    """
    instead = "; set --config.model.attention=blockwise"
    if spec.indexed is not None and spec.attention != "blockwise":
        raise config.InputError(
            f"attention {spec.attention!r} sees all keys, and this model's attention "
            f"chooses among them{instead}"
        )
    if spec.attention == "cudnn":
        if platform != "gpu":
            raise config.InputError(
                f"attention 'cudnn' needs a GPU, this is {platform}{instead}"
            )
        if packed:
            raise config.InputError(
                "attention 'cudnn' takes no segment ids, so packed documents would "
                f"see each other{instead}, or let them: "
                "--config.train.document_mask=false"
            )
        if spec.compute_dtype not in ("bfloat16", "float16"):
            raise config.InputError(
                f"attention 'cudnn' needs bfloat16 or float16, compute_dtype is "
                f"{spec.compute_dtype}{instead}"
            )
    if spec.attention == "splash":
        if platform != "tpu":
            raise config.InputError(
                f"attention 'splash' needs a TPU, this is {platform}{instead}"
            )
        if spec.head_width % 64:
            raise config.InputError(
                f"attention 'splash' needs a head width that is a multiple of 64, "
                f"this model has {spec.head_width}{instead}"
            )


def attention(
    p: dict[str, jax.Array],
    x_btd: jax.Array,
    cos_btk: jax.Array,
    sin_btk: jax.Array,
    segments_bt: jax.Array | None,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    window: int,
    chunked: jax.Array | None = None,
) -> jax.Array:
    """One layer's causal self-attention over whole rows (no cache).

    `chunked` has the positions, where dual chunks make a difference.
    """
    q_btnk, k_bshk, v_bshk = project(p, x_btd, cos_btk, sin_btk, spec, rules)
    if chunked is not None:
        out_btnk = dual_chunk.attention(
            q_btnk, k_bshk, v_bshk, chunked, segments_bt, spec=spec, rules=rules
        )
        return merge(p, out_btnk, x_btd, spec, rules)
    if indexed.chooses(spec, x_btd.shape[1]):
        out_btnk = indexed.attention(
            p["indexer"],
            x_btd,
            (q_btnk, k_bshk, v_bshk),
            cos_btk,
            sin_btk,
            segments_bt,
            spec=spec,
            rules=rules,
        )
        return merge(p, out_btnk, x_btd, spec, rules)
    if rules.split:
        how = {"axes": rules.split, "way": rules.context_attention}
        kernel = functools.partial(ring_attention.attention, **how, window=window)
    else:
        kernel = functools.partial(KERNELS[spec.attention], window=window)
    heads = rules.pspec("batch", "tokens", "heads", None)
    kv_heads = rules.pspec("batch", "tokens", "kv_heads", None)
    inputs, operands = (heads, kv_heads, kv_heads), (q_btnk, k_bshk, v_bshk)
    if segments_bt is not None:
        inputs += (rules.pspec("batch", "tokens"),)
        operands += (segments_bt,)
    checked = (
        spec.attention != "splash"
    )  # its outputs do not name the axes they vary on
    run = mesh.local(kernel, inputs=inputs, out=heads, checked=checked)
    out_btnk = run(*operands)
    return merge(p, out_btnk, x_btd, spec, rules)


def cached(
    p: dict[str, jax.Array],
    x_btd: jax.Array,
    cos_btk: jax.Array,
    sin_btk: jax.Array,
    held: dict[str, jax.Array],
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    length: jax.Array,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    chunked: tuple[jax.Array, jax.Array] | None = None,
    turned: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer without a window over new tokens and a cache: (y_btd, what is held with
    them in).

    `held` has k_bhks and v_bhsk, and with indexed attention the index's own keys,
    index_bsi; then `turned` has cos_bsk and sin_bsk of the slots. `segments_bs` already
    has the new tokens' segments; `length` is the slot of the first new token. `chunked`
    has the positions of new tokens and of all slots, where dual chunks make a
    difference.
    """
    q_btnk, k_bthk, v_bthk = project(p, x_btd, cos_btk, sin_btk, spec, rules)
    new = {"k_bhks": k_bthk, "v_bhsk": v_bthk}
    if spec.indexed is not None:
        q_btni, new["index_bsi"] = indexed.project(
            p["indexer"], x_btd, cos_btk, sin_btk, spec, rules
        )
    held = _written(held, new, length, rules)
    slots = held["k_bhks"], held["v_bhsk"]
    if indexed.chooses(spec, slots[1].shape[2]):
        out_btnk = indexed.local(spec, rules)(
            *(q_btnk, *slots, q_btni, held["index_bsi"], *turned),
            *(segments_bt, segments_bs, length, p["indexer"]["k_norm_li"]),
        )
        return merge(p, out_btnk, x_btd, spec, rules), held
    heads = queries = rules.pspec("batch", None, "heads", None)
    kv_heads = rules.pspec("batch", "kv_heads", None, None)
    rows = rules.pspec("batch", None)
    run = over_cache
    if chunked is not None:
        run = functools.partial(dual_chunk.over_cache, stride=spec.dual_chunk.stride)
        q_btnk = dual_chunk.turned(spec, q_btnk, chunked[0])
        queries = rules.pspec("batch", None, None, "heads", None)
    places = chunked or ()
    run = mesh.local(
        run,
        inputs=(
            *(queries, kv_heads, kv_heads, *(rows for _ in places)),
            *(rows, rows, jax.P()),
        ),
        out=heads,
    )
    out_btnk = run(q_btnk, *slots, *places, segments_bt, segments_bs, length)
    return merge(p, out_btnk, x_btd, spec, rules), held


def cached_in_window(
    p: dict[str, jax.Array],
    x_btd: jax.Array,
    cos_btk: jax.Array,
    sin_btk: jax.Array,
    held: dict[str, jax.Array],
    segments_bt: jax.Array,
    places: ring.Places,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    window: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer with a window over new tokens and its ring: (y_btd, the ring with them
    in). `places`: see `ring.py`."""
    q_btnk, k_bthk, v_bthk = project(p, x_btd, cos_btk, sin_btk, spec, rules)
    new = {"k_bhks": k_bthk, "v_bhsk": v_bthk}
    rows, heads = rules.pspec("batch", None), rules.pspec("batch", None, "heads", None)
    lies = dict.fromkeys(new, rules.pspec("batch", "kv_heads", None, None))
    come = dict.fromkeys(new, rules.pspec("batch", None, "kv_heads", None))
    run = mesh.local(
        functools.partial(over_ring, window=window),
        inputs=(heads, come, lies, rows, ring.Places(*(rows for _ in places))),
        out=(heads, lies),
    )
    out_btnk, held = run(q_btnk, new, held, segments_bt, places)
    return merge(p, out_btnk, x_btd, spec, rules), held


def over_ring(q_btnk, new, held, seg_bt, places, *, window, block=512):
    """Attention of new queries over a ring and their own keys: (out_btnk, the ring with
    these in)."""
    after = ring.put(held, new, places.slot_bt)
    if q_btnk.shape[1] == 1 or held["v_bhsk"].shape[2] < window:
        # No query wants what the new tokens take the place of: one token takes that of
        # the one w before it, and a ring below the window goes round never.
        k_bhks, v_bhsk = after["k_bhks"], after["v_bhsk"]
        seg_bs, rank_bs = places.segments_bw, places.rank_bw
    else:
        keys = held["k_bhks"], new["k_bhks"].transpose(0, 2, 3, 1)
        values = held["v_bhsk"], new["v_bhsk"].transpose(0, 2, 1, 3)
        k_bhks = jnp.concatenate(keys, axis=3)
        v_bhsk = jnp.concatenate(values, axis=2)
        seg_bs = jnp.concatenate([places.held_segments_bw, seg_bt], axis=1)
        rank_bs = jnp.concatenate([places.held_rank_bw, places.rank_bt], axis=1)
    out_btnk = over(
        *(q_btnk, k_bhks, v_bhsk, seg_bt, seg_bs, places.rank_bt, rank_bs),
        window=window,
        block=block,
    )
    return out_btnk, after


def _written(held, new, length, rules):
    """What a cache holds of one layer with that of new tokens in, from a slot on."""
    lies = dict.fromkeys(new, rules.pspec("batch", "kv_heads", None, None))
    come = dict.fromkeys(new, rules.pspec("batch", None, "kv_heads", None))
    if "index_bsi" in new:
        lies["index_bsi"] = come["index_bsi"] = rules.pspec("batch", None, None)

    def write(held, new, length):
        put = jax.lax.dynamic_update_slice_in_dim
        turn = {"k_bhks": (0, 2, 3, 1), "v_bhsk": (0, 2, 1, 3), "index_bsi": (0, 1, 2)}
        return {
            k: put(held[k], x.transpose(turn[k]), length, axis=turn[k].index(1))
            for k, x in new.items()
        }

    write = mesh.local(write, inputs=(lies, come, jax.P()), out=lies)
    return write(held, new, length)


def project(p, x_btd, cos_btk, sin_btk, spec, rules):
    """Rotated queries and keys, and values: q_btnk, k_bthk, v_bthk."""

    def one(name, heads):
        dtype = x_btd.dtype
        letter = "n" if heads == "heads" else "h"
        w = p[f"{name}_ld{letter}k"]
        how = {"dtype": dtype, "reduce_dtype": spec.reduce_dtype}
        w = mesh.gather(w, rules, "embed", heads, None, **how)
        out = rules.pspec("batch", "tokens", heads, None)
        y = mesh.product(x_btd, w, out=out)
        return turned(p, name, y, cos_btk, sin_btk, spec)

    return one("q", "heads"), one("k", "kv_heads"), one("v", "kv_heads")


def turned(p, name, y, cos_btk, sin_btk, spec):
    """Queries, keys or values (`name` q, k or v) of their product: with their bias, the
    first two normed and rotated."""
    if spec.qkv_bias:
        letter = "n" if name == "q" else "h"
        y = y + p[f"{name}_bias_l{letter}k"].astype(y.dtype)[None, None]
    y = checkpoint_name(y, name)
    if name == "v":
        return y

    # The backward pass computes this again from the product, which is kept anyway.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def turn(y, scale_k, cos_btk, sin_btk):
        if scale_k is not None:
            y = norm.rms_norm(y, scale_k, spec.norm_eps, spec.norm_offset)
        return rope.apply(y, cos_btk, sin_btk)

    scale_k = p[f"{name}_norm_lk"] if spec.qk_norm else None
    return turn(y, scale_k, cos_btk, sin_btk)


def merge(p, out_btnk, x_btd, spec, rules):
    """Heads, times the gate of x where the model has one, back to the width: y_btd."""
    how = {"dtype": out_btnk.dtype, "reduce_dtype": spec.reduce_dtype}
    if spec.output_gate:
        w_dnk = mesh.gather(p["gate_ldnk"], rules, "embed", "heads", None, **how)
        out = rules.pspec("batch", "tokens", "heads", None)
        gate_btnk = checkpoint_name(mesh.product(x_btd, w_dnk, out=out), "gate")
        out_btnk = out_btnk * jax.nn.sigmoid(gate_btnk)
    o_nkd = mesh.gather(p["o_lnkd"], rules, "heads", None, "embed", **how)
    out = rules.pspec("batch", "tokens", None)
    return mesh.product(out_btnk, o_nkd, inner=2, out=out)


def over_cache(q_btnk, k_bhks, v_bhsk, seg_bt, seg_bs, length, *, block=512):
    """Attention of new queries over cache slots; query i sits in slot length + i."""
    at_1t = length + jnp.arange(q_btnk.shape[1])[None]
    at_1s = jnp.arange(v_bhsk.shape[2])[None]
    return over(q_btnk, k_bhks, v_bhsk, seg_bt, seg_bs, at_1t, at_1s, block=block)


def over(q_btnk, k_bhks, v_bhsk, seg_bt, seg_bs, at_bt, at_bs, *, window=0, block=512):
    """Attention of queries at `at_bt` over keys of their own segment at `at_bs`, no
    later, and less than `window` before where there is one; places of one row hold for
    all. Those with windows count real tokens, so padding does not stretch them.

    Queries go in blocks, so that prefill holds [block, s] scores at a time.
    """
    b, t, n, k = q_btnk.shape
    h = v_bhsk.shape[1]
    wide = jnp.promote_types(q_btnk.dtype, jnp.float32)

    def rows(q_bqhgk, seg_bq, at_bq):
        # Turned before and after, the small arrays: XLA on a CPU would turn the slots.
        q_bhgqk = q_bqhgk.transpose(0, 2, 3, 1, 4)
        scores = jnp.einsum(
            "bhgqk,bhks->bhgqs", q_bhgqk, k_bhks, preferred_element_type=wide
        )
        seen = at_bq[:, :, None] >= at_bs[:, None, :]
        if window:
            seen = seen & (at_bq[:, :, None] - at_bs[:, None, :] < window)
        seen = seen & (seg_bq[:, :, None] == seg_bs[:, None, :])
        seen = seen & (seg_bq > 0)[:, :, None]
        seen = jnp.broadcast_to(seen[:, None, None], scores.shape)
        p = jax.nn.softmax(jnp.where(seen, scores, blockwise.NEG), axis=-1)
        p = jnp.where(seen, p, 0.0).astype(v_bhsk.dtype)
        out = jnp.einsum("bhgqs,bhsk->bhgqk", p, v_bhsk, preferred_element_type=wide)
        return out.transpose(0, 3, 1, 2, 4).astype(q_btnk.dtype)

    q = (q_btnk * k**-0.5).reshape(b, t, h, n // h, k)
    if t <= block:
        return rows(q, seg_bt, at_bt).reshape(b, t, n, k)
    blocks = -(-t // block)
    rest = [(0, 0), (0, blocks * block - t)]
    q = jnp.pad(q, [*rest, (0, 0), (0, 0), (0, 0)])
    seg_bt, at_bt = jnp.pad(seg_bt, rest), jnp.pad(at_bt, rest)

    def one(i):
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=i * block, slice_size=block
        )
        return rows(*(cut(x, axis=1) for x in (q, seg_bt, at_bt)))

    out = jax.lax.map(one, jnp.arange(blocks))
    out = jnp.moveaxis(out, 0, 1).reshape(b, blocks * block, n, k)
    return out[:, :t]


def _cudnn(q_btnk, k_bshk, v_bshk, segments_bt=None, *, window):
    """Fused attention of cuDNN; refused for packed rows by `check_backend`."""
    if segments_bt is not None:
        raise config.InputError(
            "attention 'cudnn' takes no segment ids; set attention=blockwise"
        )
    return jax.nn.dot_product_attention(
        q_btnk,
        k_bshk,
        v_bshk,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def _splash(q_btnk, k_bshk, v_bshk, segments_bt=None, *, window, interpret=False):
    """Splash attention of JAX's Pallas TPU ops, segments included."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    t, n, k = q_btnk.shape[1:]
    if window:
        mask = splash.LocalMask((t, t), (window - 1, 0), 0)
    else:
        mask = splash.CausalMask((t, t))
    size = next((s for s in (512, 256, 128) if t % s == 0), None)
    if size is None:
        raise config.InputError(
            f"attention 'splash' needs rows of a multiple of 128 tokens, got {t}; set "
            "--config.data.seq_tokens, or --config.model.attention=blockwise"
        )
    sizes = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * n), block_sizes=sizes, interpret=interpret
    )
    q = (q_btnk * k**-0.5).transpose(0, 2, 1, 3)
    keys, values = k_bshk.transpose(0, 2, 1, 3), v_bshk.transpose(0, 2, 1, 3)
    if segments_bt is None:
        out = jax.vmap(kernel)(q, keys, values)
    else:
        ids = splash.SegmentIds(q=segments_bt, kv=segments_bt)
        out = jax.vmap(kernel)(q, keys, values, ids)
    out = out.transpose(0, 2, 1, 3)
    if segments_bt is not None:
        out = jnp.where((segments_bt > 0)[:, :, None, None], out, 0)
    return out


KERNELS = {"blockwise": blockwise.attention, "cudnn": _cudnn, "splash": _splash}
