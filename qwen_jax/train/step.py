# SPDX-License-Identifier: Apache-2.0
"""One training step: gradients of one global batch, one update, its metrics.

Source: AdamW/Muon through optax; a step with a non-finite loss or gradient changes
nothing but the counters (all processes alike, since the test is on global values).

Shapes: each array of `batch` is [micro, rows, t] with rows laid out by `batch`; the
gradient is accumulated over `micro` in float32, each micro-batch divided by the global
count of targets, so the result equals that of one large batch. Between devices the
parts of a layer's gradient are summed in the compute dtype, before they are widened,
or in float32 with model.reduce_dtype (see mesh.gather).
Metrics (float32 scalars): loss (nats a token), bits (sum of nll in bits), bytes,
targets, z_loss, grad_norm, lr is the caller's, skipped (0 or 1), places for tokens and
those of padding;
with experts those of `router_metrics`; mtp_loss (nats a token, mean over the layers of
the MTP head) where that is trained.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_jax import mesh
from qwen_jax.models import decoder, moe, mtp
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import losses
from qwen_jax.train import state as state_lib

ROUTER_METRICS = (
    *("balance_loss", "router_z_loss"),
    *("expert_load_max", "expert_load_min", "dropped_choices"),
)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step computes and how; see experiment.TrainConfig."""

    z_loss: float = 0.0
    document_mask: bool = True
    loop: str = "scan"
    remat: str = "none"
    mtp_coef: float = 0.0

    def depths(self, spec: spec_lib.Spec) -> int:
        """Layers of the MTP head that are trained."""
        return spec.mtp_layers if self.mtp_coef else 0


def loss_fn(
    params: Any,
    batch: dict[str, jax.Array],
    whole: dict[str, jax.Array],
    before: dict[str, jax.Array],
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    config: StepConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What one micro-batch adds to the loss of the step, and its sums.

    (sum of nll + z_loss * lse^2) / targets, the losses of routers: see `moe`, and
    mtp_coef times that of further tokens: see `mtp`.

    Args:
      whole: targets and tokens of the global batch.
      before: sums over the step's earlier micro-batches.
    """
    see = {key: batch[key] for key in ("images", "videos") if key in batch}
    # With images positions follow from tokens and grids: see models.vl.
    hidden_btd, routed = decoder.hidden(
        spec,
        params,
        batch["tokens_bt"],
        positions=None if see else positions_of(batch, spec, config),
        segments=batch["segments_bt"] if config.document_mask else None,
        **see,
        rules=rules,
        loop=config.loop,
        remat=config.remat,
    )
    total, parts = losses.of_rows(
        spec, params, hidden_btd, batch, z_coef=config.z_loss, rules=rules
    )
    loss = total / whole["targets"]
    if config.depths(spec):
        parts["mtp"], also = _further(
            params, hidden_btd, batch, whole, spec=spec, rules=rules, config=config
        )
        loss += config.mtp_coef * parts["mtp"]
        if routed is not None:
            routed = jax.tree.map(lambda *xs: jnp.concatenate(xs), routed, also)
    if routed is None:
        return loss, parts
    share = {
        "balance": moe.balance_loss(
            before["counts_le"] + routed["counts_e"],
            before["routed"] + routed["tokens"][0],
            routed["probs_e"],
            whole["tokens"],
        ),
        "router_z": jnp.mean(routed["z"]) / whole["tokens"],
    }
    loss += spec.moe.balance_coef * share["balance"]
    loss += spec.moe.z_coef * share["router_z"]
    parts |= share | {
        "counts_le": routed["counts_e"],
        "routed": routed["tokens"][0],
        "dropped": jnp.sum(routed["dropped"]),
    }
    return loss, parts


def positions_of(batch, spec, config) -> jax.Array | None:
    """Those of the batch, which dual chunks count themselves from its segments."""
    known = config.document_mask and spec.dual_chunk is None
    return batch["positions_bt"] if known else None


def _further(params, hidden_btd, batch, whole, *, spec, rules, config):
    """(mean over depths of the cross-entropy of further tokens, what their routers
    counted or None)."""
    hiddens, routed = mtp.hidden(
        spec,
        params,
        hidden_btd,
        batch["tokens_bt"],
        positions=positions_of(batch, spec, config),
        segments=batch["segments_bt"] if config.document_mask else None,
        rules=rules,
        remat=config.remat,
    )
    loss = 0.0
    for depth, x_btd in enumerate(hiddens):
        targets_bt, mask_bt = mtp.targets(batch, depth)
        total, _ = losses.cross_entropy(
            x_btd,
            decoder.head_vd(spec, params),
            targets_bt,
            mask_bt,
            z_coef=0.0,
            rules=rules,
        )
        loss += total / whole["mtp_targets"][depth] / len(hiddens)
    return loss, routed


def gradients(
    params: Any, batch: dict[str, jax.Array], *, spec, rules, config
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of the mean loss of a global batch [micro, rows, t], and its sums."""
    whole, depths = whole_of(batch, spec, config), config.depths(spec)
    if depths:
        counts = [jnp.sum(mtp.targets(batch, depth)[1]) for depth in range(depths)]
        whole["mtp_targets"] = jnp.maximum(jnp.stack(counts), 1.0)
    grad_fn = jax.grad(
        functools.partial(loss_fn, spec=spec, rules=rules, config=config), has_aux=True
    )
    zero = no_sums(spec, depths)
    micro = batch["mask_bt"].shape[0]
    if micro == 1:
        part = jax.tree.map(lambda x: x[0], batch)
        grads, parts = grad_fn(params, part, whole, zero)
        return grads, parts | whole

    def body(carry, part):
        grads, sums = grad_fn(params, part, whole, carry[1])
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    zeros = (jax.tree.map(jnp.zeros_like, params), zero)
    (grads, parts), _ = jax.lax.scan(body, zeros, batch)
    return grads, parts | whole


def whole_of(batch, spec, config) -> dict[str, jax.Array]:
    """Targets of a global batch, and with routers its tokens: what losses are divided
    by."""
    whole = {"targets": jnp.maximum(jnp.sum(batch["mask_bt"]), 1.0)}
    if spec.moe is not None:
        real = jnp.sum(batch["segments_bt"] > 0).astype(jnp.float32)
        every = jnp.float32(batch["segments_bt"].size)
        whole["tokens"] = jnp.maximum(real, 1.0) if config.document_mask else every
    return whole


def no_sums(spec: spec_lib.Spec, depths: int = 0) -> dict[str, jax.Array]:
    """The sums of a step before its first micro-batch, with so many layers of the MTP
    head trained."""
    names = ["nll", "z", *(["mtp"] if depths else [])]
    if spec.moe is None:
        return {name: jnp.zeros(()) for name in names}
    names += ["balance", "router_z", "routed", "dropped"]
    shape = (len(spec.layers_with("moe")) + depths, spec.moe.num_experts)
    return {name: jnp.zeros(()) for name in names} | {"counts_le": jnp.zeros(shape)}


def router_metrics(
    spec: spec_lib.Spec, parts: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """How evenly the experts were picked: 1 is even, the largest num_experts / a."""
    mean = parts["tokens"] * spec.moe.experts_per_token / spec.moe.num_experts
    load_le = parts["counts_le"] / jnp.maximum(mean, 1e-9)
    return {
        "balance_loss": parts["balance"],
        "router_z_loss": parts["router_z"],
        "expert_load_max": jnp.max(load_le),
        "expert_load_min": jnp.min(load_le),
        "dropped_choices": parts["dropped"],
    }


def train_step(
    state: state_lib.State,
    batch: dict[str, jax.Array],
    *,
    spec: spec_lib.Spec,
    tx: optax.GradientTransformation,
    rules: mesh.Rules,
    config: StepConfig,
    bytes_v: jax.Array | None = None,
    gradients_of: Callable | None = None,
) -> tuple[state_lib.State, dict[str, jax.Array]]:
    """One update: whatever changes comes in and goes out; `gradients_of`: something
    else that gives what `gradients` does."""
    run = gradients_of or gradients
    grads, parts = run(state.params, batch, spec=spec, rules=rules, config=config)
    state, metrics = updated(state, grads, parts, spec=spec, tx=tx, config=config)
    metrics["padding"] = jnp.sum(batch["segments_bt"] == 0)
    metrics["places"] = batch["segments_bt"].size
    if bytes_v is not None:
        metrics["bytes"] = count_bytes(batch, bytes_v)
    return state, metrics


def updated(
    state: state_lib.State,
    grads: Any,
    parts: dict[str, jax.Array],
    *,
    spec: spec_lib.Spec,
    tx: optax.GradientTransformation,
    config: StepConfig,
) -> tuple[state_lib.State, dict[str, jax.Array]]:
    """The state with one update in, and metrics of it; arguments as `gradients` gives
    them."""
    grad_norm = optax.tree.norm(grads)
    loss = parts["nll"] / parts["targets"]
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def apply(params, opt, grads):
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    # A branch, not a select of results: that would keep both versions of the moments
    # (measured: 470 MB more traffic a step for 29M weights).
    params, opt = jax.lax.cond(
        finite, apply, lambda p, o, g: (p, o), state.params, state.opt, grads
    )
    skipped = jnp.where(finite, 0, 1)
    metrics = {
        "loss": loss,
        "z_loss": config.z_loss * parts["z"] / parts["targets"],
        "grad_norm": grad_norm,
        "targets": parts["targets"],
        "bits": parts["nll"] / math.log(2),
        "skipped": skipped,
    }
    if "mtp" in parts:
        metrics["mtp_loss"] = parts["mtp"]
    if spec.moe is not None:
        metrics |= router_metrics(spec, parts)
    return state_lib.State(
        state.step + 1, params, opt, state.skipped + skipped
    ), metrics


def count_bytes(batch: dict[str, jax.Array], bytes_v: jax.Array) -> jax.Array:
    """UTF-8 bytes of the counted targets (float32 sum, global)."""
    spec = jax.typeof(batch["targets_bt"]).sharding.spec if mesh.active() else None
    lengths = bytes_v.at[batch["targets_bt"]].get(out_sharding=spec)
    return jnp.sum(lengths * batch["mask_bt"])


def compile_step(
    spec: spec_lib.Spec,
    tx: optax.GradientTransformation,
    rules: mesh.Rules,
    config: StepConfig,
    gradients_of: Callable | None = None,
) -> Callable:
    """`step(state, batch, bytes_v) -> (state, metrics)`, jitted, state donated."""
    how = {"spec": spec, "tx": tx, "rules": rules, "config": config}
    fn = functools.partial(train_step, **how, gradients_of=gradients_of)
    return jax.jit(
        lambda state, batch, bytes_v: fn(state, batch, bytes_v=bytes_v),
        donate_argnums=0,
    )
