# SPDX-License-Identifier: Apache-2.0
"""The vision tower: patches of images and videos in, embeddings of tokens out.

x = patches W; for each layer: x += attention(norm(x)); x += mlp(norm(x)); then each
square of `merge` x `merge` patches is joined, normed and mapped to the decoder's width.
Source: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923: windows, RMSNorm,
SwiGLU), Qwen3-VL (arXiv 2511.21631: learned positions, DeepStack); `spec.Vision` has
what differs. Patches attend inside their frame, and inside their window in the layers
of Qwen2.5-VL that are not listed as full; heads rotate by row and by column.

Shapes: pixels_rpy float, r packs of p patches of y numbers each, in the order of the
published processor (squares of `merge` x `merge` patches together, rows of squares,
frames), image after image; grid_ri3 int32 (frames, rows, columns of patches) of each
image. Patches behind the last image are padding: their results mean nothing and they
change no other. -> features_rmo, m = p / merge^2 tokens of decoder width o; and for
DeepStack deep_lrmo. Letters besides those of `dims`: r packs, i images, y numbers of a
patch, w width of merged patches, o width of the decoder.
Everything that depends on the grids is computed from arrays, so that one compiled
program serves all grids that fit p patches.
Raises: nothing here; `vl.check` has the checks.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import mesh
from qwen_jax.models import norm, rope
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import blockwise
from qwen_jax.params import Param, normal, ones, zeros

EPS = 1e-6


def vision_params(spec: spec_lib.Spec) -> dict[str, Any]:
    """The declaration tree of the tower."""
    tower, init = spec.vision, normal(spec.init_std)
    d, layers = tower.width, tower.num_layers
    tree = {
        "patch_yd": Param((tower.patch_numbers, d), (None, "embed"), init),
        "layers": {
            **_norm_params("attention_norm", tower, d, (layers,)),
            **_norm_params("mlp_norm", tower, d, (layers,)),
            "attention": _attention_params(tower, init),
            "mlp": _mlp_params(tower, init),
        },
        "merger": _norm_params("norm", tower, d) | _merger_params(spec, init),
    }
    if tower.patch_bias:
        tree["patch_bias_d"] = Param((d,), (None,), zeros)
    if tower.places:
        tree["place_vd"] = Param((tower.places, d), (None, "embed"), init)
    if tower.deepstack:
        count, w = len(tower.deepstack), d * tower.merge**2
        tree["deepstack"] = _norm_params("norm", tower, w, (count,), letter="w")
        tree["deepstack"] |= _merger_params(spec, init, (count,))
    return tree


def _norm_params(name, tower, width, layers=(), letter="d"):
    end, dims = "l" * len(layers) + letter, ("layers",) * len(layers) + (None,)
    tree = {f"{name}_{end}": Param((*layers, width), dims, ones)}
    if tower.norm == "layer":
        tree[f"{name}_bias_{end}"] = Param((*layers, width), dims, zeros)
    return tree


def _attention_params(tower, init):
    shape = (tower.num_layers, tower.width, tower.num_heads, tower.head_width)
    layers, d, n, k = shape
    tree = {
        "o_lnkd": Param((layers, n, k, d), ("layers", "heads", None, "embed"), init),
        "o_bias_ld": Param((layers, d), ("layers", None), zeros),
    }
    for name in "qkv":
        tree[f"{name}_ldnk"] = Param(shape, ("layers", "embed", "heads", None), init)
        bias = Param((layers, n, k), ("layers", "heads", None), zeros)
        tree[f"{name}_bias_lnk"] = bias
    return tree


def _mlp_params(tower, init):
    layers, d, f = tower.num_layers, tower.width, tower.ffn_width
    tree = {
        "down_lfd": Param((layers, f, d), ("layers", "ffn", "embed"), init),
        "down_bias_ld": Param((layers, d), ("layers", None), zeros),
    }
    for name in ("gate", "up") if tower.mlp == "swiglu" else ("up",):
        tree[f"{name}_ldf"] = Param((layers, d, f), ("layers", "embed", "ffn"), init)
        tree[f"{name}_bias_lf"] = Param((layers, f), ("layers", "ffn"), zeros)
    return tree


def _merger_params(spec, init, layers=()):
    w, o = spec.vision.width * spec.vision.merge**2, spec.width
    l, lies = "l" * len(layers), ("layers",) * len(layers)  # noqa: E741
    return {
        f"up_{l}wf": Param((*layers, w, w), (*lies, "embed", "ffn"), init),
        f"up_bias_{l}f": Param((*layers, w), (*lies, "ffn"), zeros),
        f"down_{l}fo": Param((*layers, w, o), (*lies, "ffn", "embed"), init),
        f"down_bias_{l}o": Param((*layers, o), (*lies, None), zeros),
    }


@struct.dataclass
class Layout:
    """Where the patches of one pack are: what the grids say.

    frame_p: number of the frame a patch belongs to, from 1, 0 for padding; row_p and
    column_p in it; height_p and width_p of it. With windows, order_p brings the patches
    of a window together, back_m merged patches back, window_p is frame_p of windows,
    after `order_p`.
    """

    frame_p: jax.Array
    row_p: jax.Array
    column_p: jax.Array
    height_p: jax.Array
    width_p: jax.Array
    order_p: jax.Array | None = None
    back_m: jax.Array | None = None
    window_p: jax.Array | None = None


def layout(tower: spec_lib.Vision, grid_i3: jax.Array, patches: int) -> Layout:
    """The layout of one pack of `patches` patches with these grids."""
    merge = tower.merge
    counts_i = jnp.prod(grid_i3, axis=-1)
    ends_i = jnp.cumsum(counts_i)
    index_p = jnp.arange(patches)
    real_p = index_p < ends_i[-1]
    image_p = jnp.searchsorted(ends_i, index_p, side="right")
    image_p = jnp.minimum(image_p, grid_i3.shape[0] - 1)
    within_p = index_p - (ends_i - counts_i)[image_p]
    height_p = jnp.maximum(grid_i3[image_p, 1], merge)
    width_p = jnp.maximum(grid_i3[image_p, 2], merge)
    frame_p = within_p // (height_p * width_p)
    rest_p = within_p % (height_p * width_p)
    # Squares of merge x merge patches stand together, in rows of squares.
    square_p, inside_p = rest_p // merge**2, rest_p % merge**2
    across_p = width_p // merge
    down_p, right_p = square_p // across_p, square_p % across_p
    frames_before_i = jnp.cumsum(grid_i3[:, 0]) - grid_i3[:, 0]
    number_p = frames_before_i[image_p] + frame_p + 1
    out = Layout(
        frame_p=jnp.where(real_p, number_p, 0).astype(jnp.int32),
        row_p=down_p * merge + inside_p // merge,
        column_p=right_p * merge + inside_p % merge,
        height_p=height_p,
        width_p=width_p,
    )
    if not tower.window:
        return out
    side = tower.window // merge // tower.patch
    wide_i = -(-(grid_i3[:, 2] // merge) // side)
    each_i = -(-(grid_i3[:, 1] // merge) // side) * wide_i
    before_i = jnp.cumsum(each_i * grid_i3[:, 0]) - each_i * grid_i3[:, 0]
    window_p = before_i[image_p] + frame_p * each_i[image_p]
    window_p += down_p // side * wide_i[image_p] + right_p // side + 1
    # Padding stays last: its number is above all others.
    window_p = jnp.where(real_p, window_p, patches + 1).astype(jnp.int32)
    order_m = jnp.argsort(window_p[:: merge**2], stable=True)
    order_p = order_m[:, None] * merge**2 + jnp.arange(merge**2)[None, :]
    order_p = order_p.reshape(patches)
    window_p = window_p[order_p]
    return out.replace(
        order_p=order_p,
        back_m=jnp.argsort(order_m),
        window_p=jnp.where(window_p > patches, 0, window_p),
    )


def layouts(
    tower: spec_lib.Vision, grids: Sequence[jax.Array], sizes: Sequence[int]
) -> Layout:
    """One layout of several packs behind one another, each with its own padding."""
    parts, frames, windows, start = [], 0, 0, 0
    for grid_i3, size in zip(grids, sizes, strict=True):
        one = layout(tower, grid_i3, size)
        more = {"frame_p": jnp.where(one.frame_p > 0, one.frame_p + frames, 0)}
        if tower.window:
            window_p = jnp.where(one.window_p > 0, one.window_p + windows, 0)
            more |= {"window_p": window_p, "order_p": one.order_p + start}
            more |= {"back_m": one.back_m + start // tower.merge**2}
        parts.append(one.replace(**more))
        frames = frames + jnp.sum(grid_i3[:, 0])
        windows, start = windows + size, start + size  # a window has a patch at least
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def angles(tower: spec_lib.Vision, row_p, column_p, dtype) -> tuple[Any, Any]:
    """cos, sin [..., head_width / 2]: one half of the pairs turns with the row, the
    other with the column."""
    half = tower.head_width // 2
    wide = jnp.promote_types(dtype, jnp.float32)
    inverse = tower.rope_theta ** -(jnp.arange(0, half, 2, dtype=wide) / half)
    inverse = inverse.reshape((1,) * row_p.ndim + inverse.shape)
    both = [x[..., None].astype(wide) * inverse for x in (row_p, column_p)]
    angle = jnp.concatenate(both, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def _taps(index_p, size_p, side, wide):
    """The two places that a row (or column) of patches lies between, and their shares,
    when `size` patches span the whole table of `side` places."""
    at_p = index_p.astype(wide) * (side - 1) / jnp.maximum(size_p - 1, 1).astype(wide)
    low_p = jnp.floor(at_p).astype(jnp.int32)
    share_p = at_p - low_p.astype(wide)
    return ((low_p, 1 - share_p), (jnp.minimum(low_p + 1, side - 1), share_p))


def placed(
    tower: spec_lib.Vision, table_vd: jax.Array, where: Layout, dtype: Any
) -> jax.Array:
    """Learned positions of the patches, bilinear between the places of the table."""
    side = int(tower.places**0.5 + 0.5)
    wide = jnp.promote_types(dtype, jnp.float32)
    total = 0.0
    for row_p, above_p in _taps(where.row_p, where.height_p, side, wide):
        for column_p, left_p in _taps(where.column_p, where.width_p, side, wide):
            share = (above_p * left_p)[..., None]
            total += table_vd[row_p * side + column_p].astype(wide) * share
    return total.astype(dtype)


def tower(
    spec: spec_lib.Spec,
    p: dict[str, Any],
    packs: Sequence[tuple[jax.Array, jax.Array]],
    *,
    rules: mesh.Rules,
    rows: str | None,
    saved: tuple[str, ...] | None = None,
) -> list[tuple[jax.Array, jax.Array | None]]:
    """Embeddings of merged patches, and those of DeepStack's layers or None, of images
    and of videos, which pass together.

    Args:
      spec: the model.
      p: the tower's weights.
      packs: (pixels_rpy, grid_ri3) of each; zeros fill up the grids.
      rules: dims -> mesh axes.
      rows: "batch" when packs lie with the rows of the batch, None when each device
        has them all.
      saved: names of activations kept for the backward pass, None for all.
    """
    v, dtype = spec.vision, jnp.dtype(spec.compute_dtype)
    local = functools.partial(_on_packs, rules=rules, rows=rows)
    sizes = [pixels.shape[1] for pixels, _ in packs]
    pixels_rpy = jnp.concatenate([pixels for pixels, _ in packs], axis=1)
    each = jax.vmap(lambda *grids: layouts(v, grids, sizes))
    where = local(each, *(grid for _, grid in packs))
    run = _Run(spec, rules, rows)
    x_rpd = _product(run, pixels_rpy.astype(dtype), p["patch_yd"], None, "embed")
    if v.patch_bias:
        x_rpd = x_rpd + p["patch_bias_d"].astype(dtype)[None, None]
    if v.places:
        table_vd = mesh.reshard(p["place_vd"], jax.P(None, None))
        place = mesh.local(
            lambda table, where: placed(v, table, where, dtype),
            inputs=(jax.P(None, None), rules.pspec(rows, None)),
            out=rules.pspec(rows, None, None),
        )
        x_rpd = x_rpd + place(table_vd, where.replace(order_p=None, back_m=None))
    segments_rp = windows_rp = where.frame_p
    row_rp, column_rp = where.row_p, where.column_p
    if v.window:
        take = functools.partial(local, _in_order)
        windows_rp = where.window_p
        x_rpd, segments_rp, row_rp, column_rp = (
            take(a, where.order_p) for a in (x_rpd, segments_rp, row_rp, column_rp)
        )
    turn = angles(v, row_rp, column_rp, dtype)
    x_rpd, deep = _layers(p, x_rpd, turn, (segments_rp, windows_rp), run, saved)
    features = _merge(p["merger"], x_rpd, run)
    if v.window:
        features = local(_in_order, features, where.back_m)
    deep_lrmo = jnp.stack(deep) if deep else None
    out, start = [], 0
    for size in sizes:
        stop = start + size // v.merge**2
        mine = None if deep_lrmo is None else deep_lrmo[:, :, start:stop]
        out.append((features[:, start:stop], mine))
        start = stop
    return out


def _in_order(x, order):
    return jax.vmap(lambda x, order: x[order])(x, order)


def _on_packs(fn, *args, rules, rows):
    """`fn` of arrays with packs in front, on each device's own packs."""
    lies = rules.pspec(rows)
    return mesh.local(fn, inputs=(lies,) * len(args), out=lies)(*args)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The model, and where its packs and weights lie."""

    spec: spec_lib.Spec
    rules: mesh.Rules
    rows: str | None


def _weight(run, w, *dims):
    dtype = jnp.dtype(run.spec.compute_dtype)
    if run.rows is None:  # all devices compute the same gradient: nothing to sum
        return mesh.reshard(w.astype(dtype), run.rules.gathered(*dims))
    how = {"dtype": dtype, "reduce_dtype": run.spec.reduce_dtype}
    return mesh.gather(w, run.rules, *dims, **how)


def _product(run, x, w, *dims, inner=1):
    """x [r, p, ...] times w; `dims` are those of w, its first `inner` summed over."""
    out = [None if dim == "embed" else dim for dim in dims[inner:]]
    out = run.rules.pspec(run.rows, None, *out)
    return mesh.product(x, _weight(run, w, *dims), inner=inner, out=out)


def _attend(run, q, k, v, segments_rp):
    heads = run.rules.pspec(run.rows, None, "heads", None)
    packs = run.rules.pspec(run.rows, None)
    kernel = functools.partial(blockwise.attention, causal=False)
    each = mesh.local(kernel, inputs=(heads, heads, heads, packs), out=heads)
    return each(q, k, v, segments_rp)


def _layers(p, x_rpd, turn, segments, run, saved):
    """All layers, in scans that end where DeepStack takes the state out."""
    v = run.spec.vision
    full_l = jnp.asarray([i in v.full_layers for i in range(v.num_layers)])

    def body(x_rpd, layer):
        p, full = layer
        segments_rp = segments[0]
        if v.window:
            segments_rp = jnp.where(full, segments[0], segments[1])
        return _layer(p, x_rpd, turn, segments_rp, run), None

    if saved is not None:
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    deep, start = [], 0
    for stop in sorted({i + 1 for i in v.deepstack} | {v.num_layers}):
        part = jax.tree.map(
            lambda x, a=start, b=stop: jax.lax.slice_in_dim(x, a, b), p["layers"]
        )
        x_rpd, _ = jax.lax.scan(body, x_rpd, (part, full_l[start:stop]))
        start = stop
        if stop - 1 in v.deepstack:
            i = v.deepstack.index(stop - 1)
            mine = {k.replace("_l", "_"): w[i] for k, w in p["deepstack"].items()}
            deep.append((i, _merge(mine, x_rpd, run, joined=True)))
    return x_rpd, [x for _, x in sorted(deep, key=lambda pair: pair[0])]


def _norm(p, name, x, v):
    weight = p[name]
    if v.norm == "rms":
        return norm.rms_norm(x, weight, EPS)
    stem, _, end = name.rpartition("_")
    return norm.layer_norm(x, weight, p[f"{stem}_bias_{end}"], EPS)


def _layer(p, x_rpd, turn, segments_rp, run):
    v, dtype = run.spec.vision, x_rpd.dtype
    y_rpd, a = _norm(p, "attention_norm_ld", x_rpd, v), p["attention"]
    heads = []
    for name in "qkv":
        y = _product(run, y_rpd, a[f"{name}_ldnk"], "embed", "heads", None)
        y = checkpoint_name(y + a[f"{name}_bias_lnk"].astype(dtype)[None, None], name)
        heads.append(rope.apply(y, *turn) if name != "v" else y)
    y = _attend(run, *heads, segments_rp)
    y = _product(run, y, a["o_lnkd"], "heads", None, "embed", inner=2)
    x_rpd = x_rpd + y + a["o_bias_ld"].astype(dtype)[None, None]

    y_rpd, m = _norm(p, "mlp_norm_ld", x_rpd, v), p["mlp"]

    def inner(name):
        y = _product(run, y_rpd, m[f"{name}_ldf"], "embed", "ffn")
        y = y + m[f"{name}_bias_lf"].astype(dtype)[None, None]
        return checkpoint_name(y, f"mlp_{name}")

    up = inner("up")
    if v.mlp == "swiglu":
        up = jax.nn.silu(inner("gate")) * up
    elif v.mlp == "quick_gelu":
        up = up * jax.nn.sigmoid(1.702 * up)
    else:
        up = jax.nn.gelu(up, approximate=True)
    y = _product(run, up, m["down_lfd"], "ffn", "embed")
    return x_rpd + y + m["down_bias_ld"].astype(dtype)[None, None]


def _merge(p, x_rpd, run, joined=False):
    """Squares of patches -> tokens of the decoder: norm, two products, gelu between.
    `joined`: the norm is of whole squares."""
    v, dtype = run.spec.vision, x_rpd.dtype
    if not joined:
        x_rpd = _norm(p, "norm_d", x_rpd, v)
    r, patches, d = x_rpd.shape
    shape = (r, patches // v.merge**2, d * v.merge**2)
    if mesh.active():
        out = run.rules.pspec(run.rows, None, None)
        x_rmw = jax.lax.reshape(x_rpd, shape, out_sharding=out)
    else:
        x_rmw = x_rpd.reshape(shape)
    if joined:
        x_rmw = _norm(p, "norm_w", x_rmw, v)
    y = _product(run, x_rmw, p["up_wf"], "embed", "ffn")
    y = jax.nn.gelu(y + p["up_bias_f"].astype(dtype)[None, None], approximate=False)
    y = _product(run, y, p["down_fo"], "ffn", "embed")
    return y + p["down_bias_o"].astype(dtype)[None, None]
