# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: a router, the experts it picks, and one that every token meets.

    p = softmax(x Wr) in float32 over all experts; the a largest are picked;
    y = sum_a w_a expert_a(x) + sigmoid(x Wg) shared(x), w = p, or p / sum(p) when
    `norm_topk`

Source: Qwen2-MoE, Qwen3 (arXiv 2505.09388); the balance loss over the global batch is
that of arXiv 2501.11873: for each layer e * sum_e f_e p_e, with f_e the share of tokens
that picked expert e (the f_e sum to a) and p_e the mean probability, both over all real
tokens of all devices; the mean over layers is the loss. f is a count, so no gradient
goes through it. With micro-batches f is of those seen so far in the step, as there.
Deviation: transformers' own auxiliary loss takes f and p over all layers at once.

Experts lie on the mesh axis `expert`, over which the batch is split, too. `exchange`:
- "gather": every device takes the tokens of its whole expert group, computes what its
  own experts were picked for, and the parts are summed where the tokens came from.
  Nothing is ever dropped; traffic is (devices - 1) * m * d each way.
- "all_to_all": each choice goes to its expert's device and comes back; traffic is about
  a * m * d each way. Buffers hold `capacity_factor` times an even share of the choices
  for each device; what does not fit is dropped and counted.
`pieces`: the tokens of a device go through the exchange and the experts in that many
parts (or the nearest number below that divides them), one after another; the backward
pass computes each again. Rows of one part are in memory at a time; of all they are
`experts_per_token` times the tokens of a whole group, most of a step's memory.

Shapes: x_btd -> y_btd and a dict of float32: counts_e (choices of each expert),
probs_e (sum of probabilities, differentiable), z (sum of lse^2 of the router), tokens,
dropped. All are sums over real tokens of all devices.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import mesh
from qwen_jax.models import mlp as mlp_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import experts
from qwen_jax.params import Param, normal


def moe_params(spec: spec_lib.Spec, layers: int) -> dict[str, Param]:
    """Weights of `layers` blocks of experts, stacked."""
    moe, d, init = spec.moe, spec.width, normal(spec.init_std)
    e, f = moe.num_experts, moe.ffn_width
    into = ("layers", "experts", "embed", "ffn")
    tree = {
        "router_lde": Param((layers, d, e), ("layers", "embed", None), init),
        "gate_ledf": Param((layers, e, d, f), into, init),
        "up_ledf": Param((layers, e, d, f), into, init),
        "down_lefd": Param(
            (layers, e, f, d), ("layers", "experts", "ffn", "embed"), init
        ),
    }
    if moe.shared_width:
        tree["shared"] = mlp_lib.mlp_params(spec, layers, moe.shared_width)
        tree["shared_gate_ld"] = Param((layers, d), ("layers", "embed"), init)
    return tree


def moe(
    p: dict, x_btd: jax.Array, segments_bt: jax.Array | None, spec, rules
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer's experts; `p` has one layer's weights. See the module docstring."""
    if segments_bt is None:
        ones_bt = jnp.ones(x_btd.shape[:2], jnp.int32)
        segments_bt = mesh.reshard(ones_bt, rules.pspec("batch", "tokens"))
    into, back = ("experts", "embed", "ffn"), ("experts", "ffn", "embed")
    batch = rules.spread if mesh.active() else ()
    tensor = mesh.names(rules.ffn) if mesh.active() else ()
    split = mesh.names(rules.experts) if mesh.axis_size(rules.experts) > 1 else ()
    known = not mesh.nested()  # over which axes what differs

    def run(x_btd, segments_bt, router_de, gate_edf, up_edf, down_efd):
        x_md = x_btd.reshape(-1, x_btd.shape[-1])
        real_m = segments_bt.reshape(-1) > 0
        router_de = _whole(router_de, ("embed", None), batch, x_md, spec, rules)
        stats, choice_ma, weight_ma = route(x_md, real_m, router_de, spec.moe)
        weights = [
            _whole(w, dims, batch, x_md, spec, rules)
            for w, dims in ((gate_edf, into), (up_edf, into), (down_efd, back))
        ]
        run_experts = _through(split, spec.moe) if split else _here
        x_md = mesh.vary(x_md, tensor)  # each computes a part of the hidden dim
        y_md, dropped = _in_pieces(run_experts)(
            x_md, choice_ma, weight_ma, weights, spec.moe
        )
        stats["dropped"] = dropped
        if mesh.active():
            y_md = jax.lax.psum(y_md, tensor)
            over = {k: mesh.varying(v) if known else batch for k, v in stats.items()}
            # A count that differs along `tensor` is the same along it.
            stats = {
                k: jax.lax.psum(v, tuple(over[k]))
                / mesh.axis_size(tuple(a for a in over[k] if a not in batch) or None)
                for k, v in stats.items()
            }
        return y_md.reshape(x_btd.shape), stats

    names = ("counts_e", "probs_e", "z", "tokens", "dropped")
    y_btd, stats = mesh.local(
        run,
        inputs=(
            rules.pspec("batch", "tokens", None),
            rules.pspec("batch", "tokens"),
            rules.pspec("embed", None),
            rules.pspec(*into),
            rules.pspec(*into),
            rules.pspec(*back),
        ),
        out=(rules.pspec("batch", "tokens", None), dict.fromkeys(names, jax.P())),
    )(
        x_btd,
        segments_bt,
        p["router_lde"],
        p["gate_ledf"],
        p["up_ledf"],
        p["down_lefd"],
    )
    y_btd = checkpoint_name(y_btd, "experts")
    if spec.moe.shared_width:
        how = {"dtype": x_btd.dtype, "reduce_dtype": spec.reduce_dtype}
        gate_d = mesh.gather(p["shared_gate_ld"], rules, "embed", **how)
        out = rules.pspec("batch", "tokens", None)
        gate_bt1 = mesh.product(x_btd, gate_d[:, None], out=out)
        y_btd = y_btd + jax.nn.sigmoid(gate_bt1) * mlp_lib.mlp(
            p["shared"], x_btd, spec, rules
        )
    return y_btd, stats


def route(x_md, real_m, router_de, moe: spec_lib.MoE):
    """(sums for the metrics and the balance loss, choices [m, a], their weights)."""
    wide = jnp.promote_types(x_md.dtype, jnp.float32)
    # Without it a TPU would multiply in bfloat16, whatever the dtypes.
    logits_me = jnp.matmul(
        x_md.astype(wide), router_de.astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    probs_me = jax.nn.softmax(logits_me, axis=-1)
    weight_ma, choice_ma = jax.lax.top_k(probs_me, moe.experts_per_token)
    if moe.norm_topk:
        weight_ma = weight_ma / jnp.sum(weight_ma, axis=-1, keepdims=True)
    choice_ma = jnp.where(real_m[:, None], choice_ma, moe.num_experts)
    counts_e = jnp.zeros((moe.num_experts + 1,), jnp.float32)
    counts_e = counts_e.at[choice_ma.reshape(-1)].add(1.0)[:-1]
    lse_m = jax.nn.logsumexp(logits_me, axis=-1)
    stats = {
        "counts_e": counts_e,
        "probs_e": jnp.sum(jnp.where(real_m[:, None], probs_me, 0), axis=0),
        "z": jnp.sum(jnp.where(real_m, jnp.square(lse_m), 0)),
        "tokens": jnp.sum(real_m).astype(jnp.float32),
    }
    return stats, choice_ma, weight_ma.astype(x_md.dtype)


def balance_loss(counts_le, seen, probs_le, tokens) -> jax.Array:
    """Mean over layers of e * sum_e f_e p_e; the count of picks when all are even.

    `counts_le` are of `seen` tokens, `probs_le` of some of the step's `tokens`.
    """
    f_le = jax.lax.stop_gradient(counts_le).astype(probs_le.dtype)
    f_le = f_le / jnp.maximum(seen, 1.0)
    p_le = probs_le / tokens
    return counts_le.shape[-1] * jnp.mean(jnp.sum(f_le * p_le, axis=-1))


def _whole(w, dims, batch, x, spec, rules):
    """A weight inside `mesh.local` as it is used: `embed` gathered, x's dtype.

    As in `mesh.gather`: marked as varying before it is gathered, so that its gradient
    is scattered over `embed` and summed over the rest of the batch, except over the
    axis that its experts lie on.
    """
    if not mesh.active():
        return w.astype(x.dtype)
    own = mesh.names(rules.experts) if "experts" in dims else ()
    if spec.reduce_dtype == "compute":
        w = w.astype(x.dtype)
    w = mesh.vary(w, tuple(a for a in batch if a not in own))
    for axis in reversed(mesh.names(rules.embed)):
        if mesh.axis_size(axis) > 1:
            w = jax.lax.all_gather(w, axis, axis=dims.index("embed"), tiled=True)
    return w.astype(x.dtype)


def _here(x_md, choice_ma, weight_ma, weights, moe):
    return experts.apply(
        x_md,
        choice_ma,
        weight_ma,
        *weights,
        impl=moe.impl,
        capacity_factor=moe.capacity_factor,
    )


def _in_pieces(run):
    def run_all(x_md, choice_ma, weight_ma, weights, moe):
        pieces = next(n for n in range(moe.pieces, 0, -1) if x_md.shape[0] % n == 0)
        if pieces == 1:
            return run(x_md, choice_ma, weight_ma, weights, moe)
        tokens = (x_md, choice_ma, weight_ma)
        # Of a piece nothing but its tokens is kept for the backward pass.
        one = jax.checkpoint(lambda piece: run(*piece, weights, moe))
        y_pmd, dropped_p = jax.lax.map(
            one, tuple(x.reshape(pieces, -1, x.shape[-1]) for x in tokens)
        )
        return y_pmd.reshape(x_md.shape), jnp.sum(dropped_p)

    return run_all


def _through(axes, moe):
    return _gathered(axes) if moe.exchange == "gather" else _sent(axes)


def _gathered(axes):
    def run(x_md, choice_ma, weight_ma, weights, moe):
        mine = weights[0].shape[0]
        x_md, choice_ma, weight_ma = (
            jax.lax.all_gather(x, axes, axis=0, tiled=True)
            for x in (x_md, choice_ma, weight_ma)
        )
        choice_ma = choice_ma - mine * jax.lax.axis_index(axes)
        there = (choice_ma >= 0) & (choice_ma < mine)
        choice_ma = jnp.where(there, choice_ma, mine)
        y_md, dropped = _here(x_md, choice_ma, weight_ma, weights, moe)
        y_md = jax.lax.psum_scatter(y_md, axes, scatter_dimension=0, tiled=True)
        return y_md, dropped

    return run


def _sent(axes):
    def run(x_md, choice_ma, weight_ma, weights, moe):
        (m, a), mine = choice_ma.shape, weights[0].shape[0]
        ways = moe.num_experts // mine
        room = min(m * a, math.ceil(m * a / ways * moe.capacity_factor))
        flat = choice_ma.reshape(-1)
        real = flat < moe.num_experts
        to = jnp.where(real, flat // mine, ways)
        slot, kept = experts.slots(to, ways, room)

        def send(rows, empty):
            box = jnp.full((ways * room + 1, *rows.shape[1:]), empty, rows.dtype)
            box = mesh.vary(box, mesh.varying(rows) | mesh.varying(slot))
            box = box.at[slot].set(rows)[:-1].reshape(ways, room, *rows.shape[1:])
            got = jax.lax.all_to_all(box, axes, split_axis=0, concat_axis=0)
            return got.reshape(ways * room, *rows.shape[1:])

        x = send(jnp.repeat(x_md, a, axis=0), 0)
        chosen = send(flat % mine, mine)[:, None]
        one = jnp.ones_like(chosen, x.dtype)
        y, dropped = _here(x, chosen, one, weights, moe)
        y = y.reshape(ways, room, -1)
        y = jax.lax.all_to_all(y, axes, split_axis=0, concat_axis=0)
        y = y.reshape(ways * room, -1)[jnp.minimum(slot, ways * room - 1)]
        y = jnp.where(kept[:, None], y, 0).reshape(m, a, -1)
        lost = jnp.sum(real & ~kept).astype(jnp.float32)
        return jnp.einsum("mad,ma->md", y, weight_ma), dropped + lost

    return run
