# SPDX-License-Identifier: Apache-2.0
"""SwiGLU experts over tokens that chose them: grouped matrix products, nothing dropped.

y_m = sum over the a choices of token m of weight_ma * expert_{choice_ma}(x_m), with
expert_e(x) = (silu(x Wg_e) * (x Wu_e)) Wd_e.

Shapes: x_md, choice_ma int32 (an id of `num_experts` or more is nobody's: it gets zero,
which is how the experts of other devices are left out), weight_ma; gate_edf, up_edf,
down_efd; result y_md and the number of choices dropped, float32 scalar.
Backends, chosen by `impl`:
- "ragged": choices sorted by expert, three `jax.lax.ragged_dot`. TPU and GPU.
- "blocks": choices sorted by expert, a loop over blocks of rows of one expert, whose
  bounds are data: the work is that of the rows that are there, rounded up to blocks.
  Rows are taken inside the loop. CPU, where XLA would expand `ragged_dot`
  into a product of every row with every expert.
- "capacity": a batched einsum over a fixed number of rows for each expert
  (`capacity_factor` times the mean); what does not fit is dropped and counted.
- "tokamax": as "ragged", with the grouped product of that package.
`reference` is the plain twin: every expert on every token, weighed afterwards.
Raises: config.InputError for a backend that is not installed; ValueError for shapes.
"""

import math

import jax
import jax.numpy as jnp

from qwen_jax import config, mesh


def reference(x_md, choice_ma, weight_ma, gate_edf, up_edf, down_efd):
    """The plain twin: [m, e, f] in the open."""
    experts = gate_edf.shape[0]
    hit_mae = choice_ma[..., None] == jnp.arange(experts)[None, None]
    weight_me = jnp.sum(jnp.where(hit_mae, weight_ma[..., None], 0.0), axis=1)
    gate_mef = jnp.einsum("md,edf->mef", x_md, gate_edf)
    up_mef = jnp.einsum("md,edf->mef", x_md, up_edf)
    y_med = jnp.einsum("mef,efd->med", jax.nn.silu(gate_mef) * up_mef, down_efd)
    return jnp.einsum("med,me->md", y_med, weight_me.astype(y_med.dtype))


def apply(
    x_md: jax.Array,
    choice_ma: jax.Array,
    weight_ma: jax.Array,
    gate_edf: jax.Array,
    up_edf: jax.Array,
    down_efd: jax.Array,
    *,
    impl: str = "auto",
    capacity_factor: float = 1.25,
) -> tuple[jax.Array, jax.Array]:
    """(y_md, choices dropped); see the module docstring. One device's tokens."""
    if gate_edf.shape != up_edf.shape or down_efd.shape != (
        gate_edf.shape[0],
        gate_edf.shape[2],
        gate_edf.shape[1],
    ):
        raise ValueError(
            f"expert shapes do not fit: gate {gate_edf.shape}, up {up_edf.shape}, "
            f"down {down_efd.shape}"
        )
    if impl == "auto":
        impl = "blocks" if mesh.platform() == "cpu" else "ragged"
    # Results differ along every axis along which an input does; so do the cotangents of
    # all inputs, and what an input did not differ along is summed where it came from.
    inputs = (x_md, choice_ma, weight_ma, gate_edf, up_edf, down_efd)
    near = frozenset().union(*(mesh.varying(x) for x in inputs))
    x_md, choice_ma, weight_ma, *weights = (mesh.vary(x, near) for x in inputs)
    zero = mesh.vary(jnp.zeros((), jnp.float32), near)
    if impl == "capacity":
        return _capacity(x_md, choice_ma, weight_ma, weights, capacity_factor)
    if impl == "blocks":
        return _blocks(x_md, choice_ma, weight_ma, *weights), zero
    return _ragged(x_md, choice_ma, weight_ma, weights, impl), zero


def _sorted(choice_ma: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """(choices in the order of experts, as flat indices; choices of each expert)."""
    flat = choice_ma.reshape(-1)
    choices = flat.size
    if (experts + 1) * choices < 2**31:
        # One number for both: a sort of one array is three times as fast on a CPU, and
        # takes a TPU's compiler half as long.
        both = jnp.minimum(flat, experts) * choices + jnp.arange(choices)
        order = jax.lax.sort(both, is_stable=False) % choices
    else:
        order = jnp.argsort(flat, stable=True)
    sizes = jnp.zeros((experts + 1,), jnp.int32)
    sizes = sizes.at[jnp.minimum(flat, experts)].add(1)[:experts]
    return order, sizes


# ---- ragged_dot


def _ragged(x_md, choice_ma, weight_ma, weights, impl):
    product = _product(impl)
    a = choice_ma.shape[1]
    order, sizes = _sorted(choice_ma, weights[0].shape[0])
    x = x_md[order // a]
    hidden = jax.nn.silu(product(x, weights[0], sizes)) * product(x, weights[1], sizes)
    return _combined(product(hidden, weights[2], sizes), order, sizes, weight_ma)


def _product(impl: str):
    if impl == "ragged":
        return jax.lax.ragged_dot
    try:
        import tokamax
    except ImportError as error:
        raise config.InputError(
            "moe.impl=tokamax needs the package: pip install tokamax"
        ) from error
    return tokamax.ragged_dot


# ---- fixed capacity


def _capacity(x_md, choice_ma, weight_ma, weights, factor):
    (m, a), experts = choice_ma.shape, weights[0].shape[0]
    rows = max(1, min(m, math.ceil(m * a / experts * factor)))
    flat = choice_ma.reshape(-1)
    slot, kept = slots(flat, experts, rows)
    x = jnp.zeros((experts * rows + 1, x_md.shape[1]), x_md.dtype)
    x = x.at[slot].set(jnp.repeat(x_md, a, axis=0))[:-1]
    x = x.reshape(experts, rows, -1)
    hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", x, weights[0]))
    hidden = hidden * jnp.einsum("ecd,edf->ecf", x, weights[1])
    y = jnp.einsum("ecf,efd->ecd", hidden, weights[2]).reshape(experts * rows, -1)
    y = y[jnp.minimum(slot, experts * rows - 1)]
    y = jnp.where(kept[:, None], y, 0) * weight_ma.reshape(-1, 1).astype(y.dtype)
    dropped = jnp.sum((flat < experts) & ~kept).astype(jnp.float32)
    return jnp.sum(y.reshape(m, a, -1), axis=1), dropped


def slots(to: jax.Array, boxes: int, room: int) -> tuple[jax.Array, jax.Array]:
    """A place in one of `boxes` of `room` for each item, first come, first served.

    (box * room + place, whether there is one); without one the slot is boxes * room.
    An item whose box `to` is none of them gets none.
    """
    hit = to[:, None] == jnp.arange(boxes)[None]
    place = jnp.sum(jnp.where(hit, jnp.cumsum(hit, axis=0) - 1, 0), axis=1)
    kept = (to < boxes) & (place < room)
    return jnp.where(kept, to * room + place, boxes * room), kept


# ---- blocks of rows of one expert


def _block_rows(choices: int, experts: int) -> int:
    """A quarter of an expert's mean rows, so that an eighth of the work is rounding."""
    mean = max(1, choices // experts)
    return min(256, max(16, 1 << round(math.log2(max(mean / 4, 1)))))


@jax.custom_vjp
def _blocks(x_md, choice_ma, weight_ma, gate_edf, up_edf, down_efd):
    weights = (gate_edf, up_edf, down_efd)
    return _blocks_forward(x_md, choice_ma, weight_ma, weights, keep=False)[0]


def _blocks_fwd(x_md, choice_ma, weight_ma, *weights):
    y, kept = _blocks_forward(x_md, choice_ma, weight_ma, weights, keep=True)
    return y, (x_md, choice_ma, weight_ma, weights, kept)


def _plan(choice_ma, experts):
    """(order padded by a block, rows of each expert, rows of a block)."""
    order, sizes = _sorted(choice_ma, experts)
    block = _block_rows(order.size, experts)
    return jnp.pad(order, (0, block)), sizes, block


def _each(plan, body, carry):
    """carry <- body(carry, e, start, rows, mine) for every block of every expert.

    `rows` are flat indices of choices; a last block reaches into rows of the next
    expert (`mine` is False there), which are written again when its turn comes.
    """
    order, sizes, block = plan
    ends = jnp.cumsum(sizes)
    starts = ends - sizes

    def expert(e, carry):
        def one(j, carry):
            start = starts[e] + j * block
            rows = jax.lax.dynamic_slice_in_dim(order, start, block)
            return body(carry, e, start, rows, start + jnp.arange(block) < ends[e])

        return jax.lax.fori_loop(0, -(-sizes[e] // block), one, carry)

    return jax.lax.fori_loop(0, starts.shape[0], expert, carry)


def _zeros(shape, dtype, like):
    """Zeros that vary over the mesh axes of `like`, for a loop's carry."""
    return mesh.vary(jnp.zeros(shape, dtype), mesh.varying(like))


def _put(x, rows, start):
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, axis=0)


def _dot(x, w, dims):
    """Product of two matrices over the given dims, summed in float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    out = jax.lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=wide)
    return out.astype(x.dtype)


def _blocks_forward(x_md, choice_ma, weight_ma, weights, *, keep):
    """(y_md, what the backward pass needs: gate and up of every choice, or None)."""
    (m, a), (experts, d, f) = choice_ma.shape, weights[0].shape
    plan = _plan(choice_ma, experts)
    order, sizes, block = plan
    carry = [_zeros((m * a + block, d), x_md.dtype, x_md)]
    if keep:
        carry += [_zeros((m * a + block, f), x_md.dtype, x_md) for _ in range(2)]

    def body(carry, e, start, rows, mine):
        x = x_md[rows // a]
        gate = _dot(x, weights[0][e], ((1,), (0,)))
        up = _dot(x, weights[1][e], ((1,), (0,)))
        y = _dot(jax.nn.silu(gate) * up, weights[2][e], ((1,), (0,)))
        parts = (y, gate, up) if keep else (y,)
        return [
            _put(whole, part, start) for whole, part in zip(carry, parts, strict=True)
        ]

    y, *kept = _each(plan, body, carry)
    y_md = _combined(y, order, sizes, weight_ma)
    return y_md, (tuple(kept) if keep else None)


def _combined(rows_of, order, sizes, weight_ma):
    """Sum over each token's choices of its rows, weighed: [rows, d] -> [m, d].

    Rows behind the last expert's are nobody's and may hold anything.
    """
    m, a = weight_ma.shape
    back = jnp.zeros((m * a,), order.dtype)
    back = back.at[order[: m * a]].set(jnp.arange(m * a, dtype=order.dtype))
    mine = (back < jnp.sum(sizes)).reshape(m, a)
    weight_ma = jnp.where(mine, weight_ma, 0).astype(rows_of.dtype)
    parts = rows_of[back.reshape(m, a)]
    parts = jnp.where(mine[..., None], parts, 0)
    return jnp.einsum("mad,ma->md", parts, weight_ma)


def _blocks_bwd(kept, dy_md):
    """Gradients, block by block: <dy, h Wd> is <dy Wd^T, h>, so y is not kept."""
    x_md, choice_ma, weight_ma, weights, (gate_rf, up_rf) = kept
    (m, a), (experts, d, _) = choice_ma.shape, weights[0].shape
    plan = _plan(choice_ma, experts)
    order, sizes, block = plan
    flat_weight = weight_ma.reshape(-1)
    carry = [
        _zeros((m * a + block, d), x_md.dtype, x_md),
        _zeros((m * a + block,), weight_ma.dtype, x_md),
        *(_zeros(w.shape, w.dtype, x_md) for w in weights),
    ]

    def body(carry, e, start, rows, mine):
        dx, dweight, *grads = carry
        gate_w, up_w, down_w = (w[e] for w in weights)
        x = x_md[rows // a]
        dy = jnp.where(mine[:, None], dy_md[rows // a], 0).astype(x.dtype)
        weight = flat_weight[rows][:, None].astype(x.dtype)
        gate = jax.lax.dynamic_slice_in_dim(gate_rf, start, block)
        up = jax.lax.dynamic_slice_in_dim(up_rf, start, block)
        sigmoid = jax.nn.sigmoid(gate)
        hidden = gate * sigmoid * up
        slope = _dot(dy, down_w, ((1,), (1,)))
        dweight = _put(dweight, jnp.sum(slope * hidden, axis=1), start)
        dhidden = slope * weight
        dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        dup = dhidden * gate * sigmoid
        new = _dot(dgate, gate_w, ((1,), (1,))) + _dot(dup, up_w, ((1,), (1,)))
        parts = (
            _dot(x, dgate, ((0,), (0,))),
            _dot(x, dup, ((0,), (0,))),
            _dot(hidden * weight, dy, ((0,), (0,))),
        )
        grads = [g.at[e].add(part) for g, part in zip(grads, parts, strict=True)]
        return [_put(dx, new, start), dweight, *grads]

    dx, dweight, *grads = _each(plan, body, carry)
    dx_md = _combined(dx, order, sizes, jnp.ones_like(weight_ma))
    mine = jnp.arange(m * a) < jnp.sum(sizes)
    dweight_ma = jnp.zeros((m * a,), weight_ma.dtype)
    dweight_ma = dweight_ma.at[order[: m * a]].set(jnp.where(mine, dweight[: m * a], 0))
    return dx_md, None, dweight_ma.reshape(m, a), *grads


_blocks.defvjp(_blocks_fwd, _blocks_bwd)
