# SPDX-License-Identifier: Apache-2.0
"""Images and videos among the tokens: checks, positions, embeddings in their places.

A prompt has one placeholder token for each merged square of patches; the tower's
embeddings take their places in order. Positions are threefold (M-RoPE, arXiv
2409.12191): a text token advances all three by one; a block of visual tokens counts
frames, rows and columns from where it starts, and what follows it starts
max(rows, columns) later. Qwen2.5-VL counts the frames of a video in
`tokens_per_second`; from Qwen3-VL on each frame is a block of its own.

Deviation: as in transformers 5 a video of more frames than rows or columns advances
what follows by its rows or columns, not by its frames (earlier releases did by all
three). Blocks are told apart by their sizes, so two images may touch.

Shapes: images = {"pixels": float32 [p, y], "grid_thw": int32 [i, 3]}, the images of all
rows in the order of their placeholders; or {"pixels": [b, p, y], "grid_thw":
[b, i, 3]}, those of each row by itself, which a mesh computes apart. Videos likewise,
and may have "seconds_per_grid" [i] or [b, i]: seconds between two of a video's grids,
1 where not given. Grids of zeros and patches behind the last image fill up shapes.
Invariants: NumPy arrays in give NumPy positions out, on the host; everything else is
traceable. A placeholder beyond the features of a traced batch gets NaN, not silence.
Raises: config.InputError from `check`: images for a model without vision, pixels or
grids of a wrong shape, another number of placeholders than of features (where the
values are known, that is outside of jit).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.models import spec as spec_lib
from qwen_jax.models import vision

Part = dict[str, Any]


def _parts(spec: spec_lib.Spec, images: Part | None, videos: Part | None):
    """(name, its arrays, the placeholder's id) of what is given."""
    named = (("images", images, "image_id"), ("videos", videos, "video_id"))
    for name, part, key in named:
        if part is not None:
            yield name, part, getattr(spec.vision, key)


def check(
    spec: spec_lib.Spec,
    tokens_bt: Any,
    segments_bt: Any = None,
    *,
    images: Part | None = None,
    videos: Part | None = None,
) -> None:
    """Compare images and videos with the model and the tokens.

    Raises:
      config.InputError: see the module docstring.
    """
    if images is None and videos is None:
        return
    if spec.vision is None:
        given = [n for n, x in (("images", images), ("videos", videos)) if x]
        raise config.InputError(
            f"{' and '.join(given)} given to a {spec.family} model without vision; "
            "load a vision-language folder with all its parts"
        )
    if images and videos and images["pixels"].ndim != videos["pixels"].ndim:
        raise config.InputError(
            f"pixels of images have shape {images['pixels'].shape}, of videos "
            f"{videos['pixels'].shape}: give both by rows, or neither"
        )
    for name, part, token in _parts(spec, images, videos):
        missing = {"pixels", "grid_thw"} - set(part)
        if missing:
            raise config.InputError(
                f"{name} lack {', '.join(sorted(missing))}: wanted pixels and grid_thw"
            )
        pixels, grid = part["pixels"], part["grid_thw"]
        _check_shapes(spec.vision, name, pixels, grid, len(tokens_bt))
        if isinstance(grid, jax.core.Tracer):
            continue
        wanted = _embeddings(spec.vision, name, pixels, np.asarray(grid))
        if not any(isinstance(x, jax.core.Tracer) for x in (tokens_bt, segments_bt)):
            _check_counts(name, token, wanted, tokens_bt, segments_bt)


def _check_shapes(v, name, pixels, grid, rows):
    patches, numbers = pixels.shape[-2:] if pixels.ndim > 1 else (0, 0)
    apart = pixels.ndim == 3
    if numbers != v.patch_numbers or pixels.ndim not in (2, 3):
        raise config.InputError(
            f"pixels of {name} have shape {tuple(pixels.shape)}, wanted [patches, "
            f"{v.patch_numbers}]: {v.channels} channels x {v.temporal_patch} frames x "
            f"{v.patch} x {v.patch} pixels"
        )
    if patches % v.merge**2:
        raise config.InputError(
            f"{name} have {patches} patches, wanted a multiple of {v.merge**2}: "
            f"{v.merge} x {v.merge} become one token"
        )
    if grid.shape[-1] != 3 or grid.ndim != pixels.ndim:
        raise config.InputError(
            f"grid_thw of {name} has shape {tuple(grid.shape)} beside pixels of "
            f"{tuple(pixels.shape)}: wanted {'[rows, ' if apart else '['}{name}, 3]"
        )
    if apart and not len(pixels) == len(grid) == rows:
        raise config.InputError(
            f"{name} of {len(pixels)} rows with grids of {len(grid)} beside tokens of "
            f"{rows} rows"
        )


def _embeddings(v, name, pixels, grid):
    """How many tokens images give, in each row where they come by rows."""
    wrong = (grid < 0).any(-1) | (grid[..., 1:] % v.merge).any(-1)
    if wrong.any():
        first = grid[wrong][0].tolist()
        raise config.InputError(
            f"grid_thw of {name} has {first}: rows {first[1]} and columns {first[2]} "
            f"must be multiples of {v.merge}"
        )
    patches = np.prod(grid, axis=-1).sum(-1)
    if np.max(patches) > pixels.shape[-2]:
        raise config.InputError(
            f"grid_thw of {name} counts {np.max(patches)} patches, pixels have "
            f"{pixels.shape[-2]}"
        )
    return patches // v.merge**2


def _check_counts(name, token, wanted, tokens_bt, segments_bt):
    here_bt = np.asarray(tokens_bt) == token
    if segments_bt is not None:
        here_bt &= np.asarray(segments_bt) > 0
    apart = np.ndim(wanted) == 1
    found = here_bt.sum(-1) if apart else here_bt.sum()
    if np.any(found != wanted):
        row = int(np.argmax(np.atleast_1d(found != wanted)))
        of = f" of row {row}" if apart else ""
        raise config.InputError(
            f"tokens{of} have {np.atleast_1d(found)[row]} placeholders (id {token}), "
            f"{name} give {np.atleast_1d(wanted)[row]} embeddings"
        )


def _running_max(x, xp):
    if xp is np:
        return np.maximum.accumulate(x, axis=1)
    return jax.lax.cummax(x, axis=1)


def _ordinals(mask_bt, apart, xp):
    """How many placeholders stand before each, in its row or in all rows."""
    if apart:
        return xp.cumsum(mask_bt, axis=1) - 1
    return (xp.cumsum(mask_bt.reshape(-1)) - 1).reshape(mask_bt.shape)


def positions(
    spec: spec_lib.Spec,
    tokens_bt: Any,
    segments_bt: Any = None,
    *,
    images: Part | None = None,
    videos: Part | None = None,
    start_b: Any = None,
) -> Any:
    """Temporal, row and column positions: int32 [3, b, t], 0 where padding is.

    Args:
      spec: the model.
      tokens_bt: int32 [b, t]; NumPy for NumPy out.
      segments_bt: int32 [b, t]; positions start anew with each segment; 0 = padding.
      images: see the module docstring; only "grid_thw" is read.
      videos: likewise, and "seconds_per_grid".
      start_b: position of the first token of each row, default 0.
    """
    given = (tokens_bt, segments_bt, start_b)
    given += tuple(p[k] for p in (images, videos) if p for k in p if k != "pixels")
    xp = jnp if any(isinstance(x, jax.Array) for x in given) else np
    tokens_bt = xp.asarray(tokens_bt)
    real_bt = xp.ones(tokens_bt.shape, bool)
    if segments_bt is not None:
        real_bt = xp.asarray(segments_bt) > 0
    advance_bt = real_bt.astype(np.int32)
    inside_3bt = xp.zeros((3, *tokens_bt.shape), np.int32)
    inner_bt = xp.zeros(tokens_bt.shape, bool)  # visual, and not the first of its block
    for name, part, token in _parts(spec, images, videos):
        mask_bt = (tokens_bt == token) & real_bt
        one_3bt, first_bt, step_bt = _blocks(
            spec.vision, mask_bt, part, name == "videos", xp
        )
        advance_bt = xp.where(mask_bt, xp.where(first_bt, step_bt, 0), advance_bt)
        inside_3bt = xp.where(mask_bt[None], one_3bt, inside_3bt)
        inner_bt = inner_bt | (mask_bt & ~first_bt)
    before_bt = xp.cumsum(advance_bt, axis=1) - advance_bt
    # Sums never fall, so the largest so far is the latest that counts.
    block_bt = _running_max(xp.where(inner_bt, 0, before_bt), xp)
    if segments_bt is not None:
        segments_bt = xp.asarray(segments_bt)
        last_bt = xp.pad(segments_bt, [(0, 0), (1, 0)])[:, :-1]
        began_bt = xp.where(segments_bt != last_bt, before_bt, 0)
        block_bt = block_bt - _running_max(began_bt, xp)
    if start_b is not None:
        block_bt = block_bt + xp.asarray(start_b)[:, None]
    out_3bt = xp.where(real_bt[None], block_bt[None] + inside_3bt, 0)
    return out_3bt.astype(np.int32)


def _blocks(v, mask_bt, part, video, xp):
    """Of each placeholder: its place in its block [3, b, t], whether it is the block's
    first, and how far the block advances what follows."""
    grid = xp.asarray(part["grid_thw"]).astype(np.int32)
    apart = grid.ndim == 3
    sizes = xp.prod(grid, axis=-1) // v.merge**2
    order_bt = _ordinals(mask_bt, apart, xp)
    if apart:
        rows_b = xp.sum(sizes, axis=1)
        order_bt = order_bt + (xp.cumsum(rows_b) - rows_b)[:, None]
    grid, sizes = grid.reshape(-1, 3), sizes.reshape(-1)
    ends = xp.cumsum(sizes)
    which_bt = xp.searchsorted(ends, order_bt.reshape(-1), side="right")
    which_bt = xp.minimum(which_bt, len(grid) - 1).reshape(mask_bt.shape)
    within_bt = order_bt - (ends - sizes)[which_bt]
    rows_bt = xp.maximum(grid[which_bt, 1] // v.merge, 1)
    columns_bt = xp.maximum(grid[which_bt, 2] // v.merge, 1)
    frame_bt = within_bt // (rows_bt * columns_bt)
    within_bt = within_bt % (rows_bt * columns_bt)
    first_bt = mask_bt & (within_bt == 0)
    if video and v.frame_blocks:
        frame_bt = frame_bt * 0
    else:
        first_bt = first_bt & (frame_bt == 0)
    if video and v.tokens_per_second:
        seconds = part.get("seconds_per_grid")
        step = xp.full(len(grid), v.tokens_per_second, np.float32)
        if seconds is not None:
            step = step * xp.asarray(seconds).reshape(-1).astype(np.float32)
        frame_bt = xp.floor(frame_bt.astype(np.float32) * step[which_bt])
        frame_bt = frame_bt.astype(np.int32)
    place = (frame_bt, within_bt // columns_bt, within_bt % columns_bt)
    return xp.stack(place), first_bt, xp.maximum(rows_bt, columns_bt)


def placed_positions(spec, tokens_bt, segments_bt, images, videos, start_b, rules):
    """`positions` inside a program, laid out with the batch."""
    parts = {}
    for name, part in (("images", images), ("videos", videos)):
        if part is not None:
            parts[name] = {k: x for k, x in part.items() if k != "pixels"}
    held = {"tokens_bt": tokens_bt, "segments_bt": segments_bt, "start_b": start_b}
    held = jax.tree.map(jnp.asarray, held | parts)
    held = jax.tree.map(lambda x: mesh.reshard(x, jax.P(*[None] * x.ndim)), held)
    run = mesh.local(
        lambda held: positions(spec, **held), inputs=jax.P(), out=jax.P(None)
    )
    return mesh.reshard(run(held), rules.pspec(None, "batch", None))


def embed(
    spec: spec_lib.Spec,
    p: dict[str, Any],
    x_btd: jax.Array,
    tokens_bt: jax.Array,
    segments_bt: jax.Array | None,
    *,
    images: Part | None,
    videos: Part | None,
    rules: mesh.Rules,
    saved: tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """(x_btd with the tower's embeddings at the placeholders, what DeepStack adds
    behind each of the first layers: [l, b, t, d], zero elsewhere, or None)."""
    parts = list(_parts(spec, images, videos))
    rows = "batch" if parts[0][1]["pixels"].ndim == 3 else None
    packs = []
    for _, part, _ in parts:
        pixels, grid = jnp.asarray(part["pixels"]), jnp.asarray(part["grid_thw"])
        if rows is None:
            pixels, grid = pixels[None], grid[None]
        pixels = mesh.reshard(pixels, rules.pspec(rows, None, None))
        grid = mesh.reshard(grid.astype(jnp.int32), rules.pspec(rows, None, None))
        packs.append((pixels, grid))
    with jax.named_scope("vision"):
        outs = vision.tower(spec, p, packs, rules=rules, rows=rows, saved=saved)
    deep_lbtd = None
    for (_, _, token), (_, grid), (out, deep) in zip(parts, packs, outs, strict=True):
        mask_bt = tokens_bt == token
        if segments_bt is not None:
            mask_bt = mask_bt & (segments_bt > 0)
        count = jnp.sum(jnp.prod(grid, axis=-1), axis=-1) // spec.vision.merge**2
        here = (mask_bt, count)
        x_btd = _put(x_btd, out, *here, rules=rules, rows=rows)
        if deep is None:
            continue
        if deep_lbtd is None:
            deep_lbtd = [jnp.zeros_like(x_btd)] * len(deep)
        deep_lbtd = [
            _put(x, out, *here, rules=rules, rows=rows)
            for x, out in zip(deep_lbtd, deep, strict=True)
        ]
    return x_btd, None if deep_lbtd is None else jnp.stack(deep_lbtd)


def _put(x_btd, out_rmd, mask_bt, count_r, *, rules, rows):
    """The embeddings in order at the places of the mask."""
    whole = jax.P(None, None)
    order_bt = _ordinals(mask_bt, True, jnp)
    if rows is None:  # placeholders of earlier rows come first
        seen_bt = mesh.reshard(mask_bt, whole)
        before_b = jnp.cumsum(jnp.sum(seen_bt, axis=1)) - jnp.sum(seen_bt, axis=1)
        order_bt = order_bt + mesh.reshard(before_b, rules.pspec("batch"))[:, None]

    def put(x_btd, out_rmd, mask_bt, order_bt, count_r):
        known_bt = order_bt < count_r[:, None]
        # Rows share one pack, or have one each.
        pack_b1 = jnp.arange(len(x_btd))[:, None] * (len(out_rmd) > 1)
        order_bt = jnp.clip(order_bt, 0, out_rmd.shape[1] - 1)
        new_btd = out_rmd[pack_b1, order_bt].astype(x_btd.dtype)
        new_btd = jnp.where(known_bt[..., None], new_btd, jnp.nan)
        return jnp.where(mask_bt[..., None], new_btd, x_btd)

    batch, packs = rules.pspec("batch", None), rules.pspec(rows, None, None)
    three = rules.pspec("batch", None, None)
    run = mesh.local(
        put,
        inputs=(three, packs, batch, batch, rules.pspec(rows)),
        out=three,
    )
    return run(x_btd, out_rmd, mask_bt, order_bt, count_r)
