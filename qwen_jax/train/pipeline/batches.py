# SPDX-License-Identifier: Apache-2.0
"""Gradients of a batch through a pipeline: each device has a stretch of the layers.

    loss, grads = pipeline.value_and_grad(spec, params, batch, stages=4)

The mesh axis `stage` has the stages; one program runs on all of them. A loop goes
through the ticks of a table (see `ticks`), in which each stage does what 1F1B or
interleaved 1F1B has for it there (see `bubbles`): a forward pass of a micro-batch, a
backward pass, or nothing; then activations go to the next stage and cotangents to the
one before. A stage keeps what came in of a micro-batch until its backward pass, which
computes the stretch again: memory is that of the micro-batches between a forward and
its backward pass, however many there are.

Source: 1F1B is PipeDream-flush (arXiv 2006.09503), interleaved 1F1B that of Megatron-LM
(arXiv 2104.04473), eager 1F1B of arXiv 2211.05322. Deviations: stages go through ticks
together, as `ticks.Table.seconds` counts; the last stage computes nothing in its
forward passes, since its backward pass does. Embedding and head belong to the first and
the last stage; their weights lie on all, and their gradients are summed over `stage`
once, at the end.

Inside a stage rows, weights, heads and experts lie over the other axes, as without it;
stages then differ in what they do in a tick, so nothing in it may be a collective of
all devices: see `_check_axes`.

Shapes: a batch as of `train.step`, arrays [micro, rows, t] with rows by `batch`. Of
layers, `rules.layers` = "stage" lays each stage's part where it is used. With several
parts a device they are gathered and dealt out in a step, and their gradients back: the
order in which weights are stored is always that of the model.
Inside, a stack's leaf is [parts, layers of a stretch, ...] and slots are [slots, b, t,
d] of the residual.
Raises: config.InputError for what does not go into the stages evenly, and for models
and batches with parts that no stage takes.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import config as config_lib
from qwen_jax import mesh
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import bubbles, step
from qwen_jax.train.pipeline import share as share_lib
from qwen_jax.train.pipeline import stage as stage_lib
from qwen_jax.train.pipeline import ticks

ORDERS = ("1f1b", "interleaved", "eager")


def value_and_grad(
    spec: spec_lib.Spec,
    params: Any,
    batch: dict[str, jax.Array],
    *,
    stages: int,
    parts: int = 1,
    order: str = "1f1b",
    rules: mesh.Rules | None = None,
    config: step.StepConfig | None = None,
) -> tuple[jax.Array, Any]:
    """The mean cross-entropy over all targets of a batch, and the gradient of the loss
    of `train.step` (with `config`'s z-loss and the losses of routers, where the spec
    has coefficients for them).

    Args:
      spec: the model.
      params: its weights, stacked, in the order of the model.
      batch: arrays [micro, rows, t]; see `train.step`.
      stages: devices along `stage` of the mesh that is set; with none set a mesh of the
        first so many devices is made.
      parts: stretches of layers on each device; more than one for "interleaved".
      order: "1f1b", "interleaved", or "eager": twice the micro-batches under way, and
        no tick in which one stage goes forward while another goes backward.
      rules: dims -> mesh axes.
      config: as of `train.step`; default: layers keep nothing but their input.
    Returns:
      (scalar, a tree as params), float32 or wider.
    """
    config = config or step.StepConfig(remat="full")
    how = {"spec": spec, "rules": rules or mesh.Rules(), "config": config}
    with on_stages(stages):
        grads, sums = _jitted(params, batch, parts=parts, order=order, **how)
    return sums["nll"] / sums["targets"], grads


def on_stages(stages: int) -> Any:
    """A context with a mesh of so many stages: the one that is set, or a new one.

    Raises:
      config.InputError: the mesh has another number, or there are too few devices.
    """
    if stages < 1:
        raise config_lib.InputError(f"stages={stages}: wanted at least 1")
    if mesh.active():
        if (there := mesh.axis_size("stage")) != stages:
            raise config_lib.InputError(
                f"stages={stages}, and the mesh that is set has {there} along `stage`: "
                "set one of them"
            )
        return contextlib.nullcontext()
    devices = jax.devices()
    if len(devices) < stages:
        raise config_lib.InputError(
            f"stages={stages}: {len(devices)} devices are here; wanted one for each"
        )
    return jax.set_mesh(mesh.make(mesh.MeshConfig(1, stage=stages), devices[:stages]))


def gradients(
    params: Any,
    batch: dict[str, jax.Array],
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    config: step.StepConfig,
    parts: int = 1,
    order: str = "1f1b",
) -> tuple[Any, dict[str, jax.Array]]:
    """What `train.step.gradients` gives, of the same arguments, through the stages of
    the mesh that is set."""
    stages = mesh.axis_size("stage")
    _check(batch, spec, config)
    share = share_lib.share_of(spec, stages, parts)
    plan = table(len(batch["mask_bt"]), stages, parts, order)
    names = ("tokens_bt", "targets_bt", "mask_bt", "segments_bt", "positions_bt")
    batch = {name: batch[name] for name in names}
    whole = step.whole_of(batch, spec, config)

    def act(stage, row, x, d, acc):
        at = stage.at(row)
        forward = (row["kind"] == ticks.FORWARD) & ~at["last"]
        backward = row["kind"] == ticks.BACKWARD
        up = stage_lib.when(forward, lambda x: stage.forward(row, x), x)
        here = functools.partial(stage.backward, row, at, x)
        d, acc = stage_lib.when(backward, lambda c: here(*c), (d, acc))
        return up, d, acc

    def run(stage, rows):
        return stage_lib.through(stage, rows, plan.slots, stage.nothing(), act)

    how = {"spec": spec, "share": share, "rules": rules, "config": config}
    return on_each(run, params, batch, plan.rows, whole, parts=parts, **how)


_jitted = jax.jit(
    gradients, static_argnames=("spec", "rules", "config", "parts", "order")
)


def on_each(
    run, params, batch, rows, whole, *, parts, spec, share, rules, config
) -> tuple[Any, dict[str, jax.Array]]:
    """(gradients as the weights lie, sums) of what each stage adds up: `acc` of
    `run(stage, rows of its device)`."""
    of_stage = _stage_of(spec, share, rules, config)

    def one(layers, rest, batch, rows, whole):
        acc = run(*of_stage(layers, rest, batch, rows, whole))
        rest, sums = jax.lax.psum((acc["rest"], acc["sums"]), "stage")
        own = jax.tree.map(lambda x: x[:, None], (acc["layers"], acc["counts"]))
        return (own[0], rest), own[1], sums

    each, every = jax.P(None, "stage"), jax.P()
    grads, counts, sums = mesh.staged(
        one, inputs=INPUTS, out=((each, every), each, every)
    )(*_operands(spec, params, rules, parts, batch, rows), whole)
    grads = {"layers": share_lib.joined(grads[0])} | grads[1]
    zeros = jax.tree.map(jnp.zeros_like, params)
    grads = {name: grads.get(name, zeros[name]) for name in params}
    grads = jax.tree.map(
        lambda x, w: mesh.reshard(x, jax.typeof(w).sharding.spec), grads, params
    )
    return grads, sums | _counted(counts) | whole


def seen_by_each(
    run, params, batch, rows, whole, *, out, spec, share, rules, config
) -> Any:
    """What `run(stage, rows of its device)` gives, together as `out` says."""
    of_stage = _stage_of(spec, share, rules, config)

    def one(*operands):
        return run(*of_stage(*operands))

    fn = mesh.staged(one, inputs=INPUTS, out=out)
    return fn(*_operands(spec, params, rules, 1, batch, rows), whole)


# Of weights of layers and the rest, the batch, rows of a table, and `Stage.whole`.
INPUTS = (jax.P(None, "stage"), jax.P(), jax.P(), jax.P(None, "stage"), jax.P())


def _stage_of(spec, share, rules, config):
    """Makes (the stage, its rows) of what one device is given."""
    rules = dataclasses.replace(rules, layers=None)  # which the cut has laid out

    def stage(layers, rest, batch, rows, whole):
        layers, rows = (jax.tree.map(lambda x: x[:, 0], x) for x in (layers, rows))
        how = spec, share, rules, config, layers, rest, batch, whole
        return stage_lib.Stage(*how), rows

    return stage


def _operands(spec, params, rules, parts, batch, rows):
    """(weights of each stage's stretches, the rest, the batch, each device's column of
    the table), each where it belongs."""
    _check_axes(spec, rules)
    laid = share_lib.laid(spec, params, dataclasses.replace(rules, layers=None))
    layers = share_lib.cut(laid["layers"], mesh.axis_size("stage"), parts)
    rest = {name: w for name, w in laid.items() if name in stage_lib.ENDS}
    batch, rows = (
        jax.tree.map(lambda x, lies=lies: mesh.reshard(jnp.asarray(x), lies), part)
        for part, lies in (
            (batch, rules.pspec(None, "batch", None)),
            (rows, jax.P(None, "stage")),
        )
    )
    return layers, rest, batch, rows


def _check_axes(spec, rules):
    """Refuse axes whose order differs between arrays, and sums that are not made.

    What turns one order into the other is a permutation of devices, a collective of
    all. Inside a tick stages do different things, and would wait for each other there
    for ever; what groups of devices of one stage do is no such thing.
    """
    sizes = {axis: mesh.axis_size(axis) for axis in ("fsdp", "expert")}
    if min(sizes.values()) > 1:
        raise config_lib.InputError(
            f"mesh.fsdp={sizes['fsdp']} and mesh.expert={sizes['expert']} inside "
            "stages: one of them at a time; set --config.mesh.fsdp=1 or "
            "--config.mesh.expert=1"
        )
    if (ways := mesh.axis_size(rules.tokens)) > 1:
        raise config_lib.InputError(
            f"rules.tokens={rules.tokens!r} has {ways} devices: "
            "stages take whole rows; set --config.mesh.context=1"
        )
    if spec.reduce_dtype != "compute" and mesh.axis_size(rules.batch) > 1:
        raise config_lib.InputError(
            f"model.reduce_dtype={spec.reduce_dtype}: inside stages gradients of rows "
            "on several devices are summed in the dtype of compute; set "
            "--config.model.reduce_dtype=compute"
        )


def _counted(counts):
    """Of [parts, stages, ...]: counts of all layers, tokens that one of them saw."""
    if not counts:
        return {}
    every = jax.tree.map(lambda x: mesh.reshard(x, jax.P()), counts)
    counts_le = mesh.join_first(mesh.join_first(every["counts_le"]))
    return {"counts_le": counts_le, "routed": every["routed"][0, 0]}


def table(count: int, stages: int, parts: int, order: str) -> ticks.Table:
    """The ticks of `count` micro-batches.

    Raises:
      config.InputError: what the order does not know, or cannot deal out.
    """
    if order not in ORDERS:
        hint = config_lib.nearest(order, ORDERS)
        raise config_lib.InputError(
            f"order={order!r}: wanted one of {', '.join(ORDERS)}{hint}"
        )
    if count < 1:
        raise config_lib.InputError(f"{count} micro-batches: wanted at least 1")
    if order != "interleaved" and parts > 1:
        raise config_lib.InputError(
            f'parts={parts} with order="{order}", in which a device has one stretch of '
            'layers; set parts=1 or order="interleaved"'
        )
    micros = [bubbles.Micro(1.0)] * count
    if order == "1f1b":
        ops = bubbles.one_f_one_b(micros, stages)
    elif order == "eager":
        ops = bubbles.one_f_one_b(micros, stages, ahead=2)
        return ticks.table(micros, ops, turns=True)
    else:
        ops = bubbles.interleaved(count, stages, parts)
    return ticks.table(micros, ops, parts)


def _check(batch, spec, config):
    """Refuse what a step computes outside the layers of text."""
    for name in ("images", "videos"):
        if name in batch:
            raise config_lib.InputError(
                f"the batch has {name}, which no stage takes; train without a pipeline "
                "(mesh.stage=1)"
            )
    if config.depths(spec):
        raise config_lib.InputError(
            f"the model has {spec.mtp_layers} layers for further tokens, which no "
            "stage has; set --config.train.mtp_coef=0 to leave them untrained"
        )
