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
(arXiv 2104.04473). Deviations: stages go through ticks together, as `ticks.seconds`
counts; the last stage computes nothing in its forward passes, since its backward pass
follows at once and does. Embedding and head belong to the first and the last stage;
their weights lie on all, and their gradients are summed over `stage` once, at the end.

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
from qwen_jax import params as params_lib
from qwen_jax.models import decoder, moe, places, streams
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import bubbles, losses, step, ticks

ORDERS = ("1f1b", "interleaved")


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
      order: "1f1b" or "interleaved".
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
    share = share_of(spec, stages, parts)
    plan = table(len(batch["mask_bt"]), stages, parts, order)
    names = ("tokens_bt", "targets_bt", "mask_bt", "segments_bt", "positions_bt")
    batch = {name: batch[name] for name in names}
    whole = step.whole_of(batch, spec, config)
    laid = _laid(spec, params, rules)
    rest = {name: w for name, w in laid.items() if name in ENDS}
    run = functools.partial(
        _run, spec=spec, share=share, rules=rules, config=config, plan=plan
    )
    each, all_of = jax.P(None, "stage"), jax.P()
    grads, counts, sums = mesh.staged(
        run,
        inputs=(each, all_of, all_of, each, all_of),
        out=((each, all_of), each, all_of),
    )(cut(laid["layers"], stages, parts), rest, batch, plan.rows, whole)
    grads = {"layers": joined(grads[0])} | grads[1]
    zeros = jax.tree.map(jnp.zeros_like, params)
    grads = {name: grads.get(name, zeros[name]) for name in params}
    grads = jax.tree.map(
        lambda x, w: mesh.reshard(x, jax.typeof(w).sharding.spec), grads, params
    )
    return grads, sums | _counted(counts) | whole


_jitted = jax.jit(
    gradients, static_argnames=("spec", "rules", "config", "parts", "order")
)
ENDS = ("embed_vd", "norm_d", "streams", "head_vd")  # weights that are no layers


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
    if order == "1f1b" and parts > 1:
        raise config_lib.InputError(
            f'parts={parts} with order="1f1b", in which a device has one stretch of '
            'layers; set parts=1 or order="interleaved"'
        )
    micros = [bubbles.Micro(1.0)] * count
    if order == "1f1b":
        ops = bubbles.one_f_one_b(micros, stages)
    else:
        ops = bubbles.interleaved(count, stages, parts)
    return ticks.table(micros, ops, parts, again=True)


def share_of(spec: spec_lib.Spec, stages: int, parts: int) -> spec_lib.Spec:
    """The model whose layers are those of one stretch.

    Raises:
      config.InputError: stretches would differ in their number of layers or in kinds.
    """
    if parts < 1:
        raise config_lib.InputError(f"parts={parts}: wanted at least 1")
    ways, layers = stages * parts, spec.num_layers
    if layers % ways:
        raise config_lib.InputError(
            f"{layers} layers on {stages} stages x {parts} parts: wanted a multiple of "
            f"{ways}; choose stages x parts that divides {layers}"
        )
    if spec.ngram is not None:
        raise config_lib.InputError(
            "this model has layers of n-grams, whose ids no stage hands on; train it "
            "without a pipeline (mesh.stage=1)"
        )
    each = layers // ways
    share = dataclasses.replace(
        spec,
        num_layers=each,
        full_layers=min(spec.full_layers, each),
        dense_layers=tuple(i for i in spec.dense_layers if i < each),
        vision=None,
    )
    for s in range(ways):
        here = spec.kinds[s * each : (s + 1) * each]
        if here != share.kinds:
            at = s * each + next(
                i
                for i, (a, b) in enumerate(zip(here, share.kinds, strict=True))
                if a != b
            )
            raise config_lib.InputError(
                f"{layers} layers on {stages} stages x {parts} parts: layer {at} is "
                f"{_said(spec.kinds[at])}, and layer {at % each}, which has its place "
                f"in the first stretch, {_said(spec.kinds[at % each])}; choose stages "
                "x parts so that each stretch is whole repeats of the model's pattern"
            )
    return share


def _said(kind: spec_lib.Kind) -> str:
    words = [kind.mixer, "experts" if kind.sparse else "mlp"]
    return "/".join(words + ([f"window {kind.window}"] if kind.window else []))


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


# ---- layers, dealt out and gathered


def _laid(spec, params, rules):
    """The weights as rules lay them, but for the dim of layers, which stays as it is:
    gradients of blocks (`mesh.local`) lie so."""

    def one(p, w):
        if p.dims[0] != "layers":
            return mesh.reshard(w, rules.pspec(*p.dims))
        first = jax.typeof(w).sharding.spec[0]
        return mesh.reshard(w, jax.P(first, *rules.pspec(None, *p.dims[1:])[1:]))

    tree = decoder.decoder_params(spec)
    tree = {name: tree[name] for name in params}
    return jax.tree.map(one, tree, params, is_leaf=params_lib.is_param)


def cut(layers: Any, stages: int, parts: int) -> Any:
    """Stacks [layers, ...] -> [parts, stages, layers of a stretch, ...]: stretch
    part * stages + stage. Stages by `stage`."""

    def one(w):
        shape = (parts, stages, w.shape[0] // (stages * parts), *w.shape[1:])
        rest = jax.typeof(w).sharding.spec[1:]
        if parts == 1:
            w = mesh.reshard(w, jax.P("stage", *rest))
            lies = jax.P(None, "stage", None, *rest)
            return jax.lax.reshape(w, shape, out_sharding=lies)
        w = mesh.split_first(mesh.reshard(w, jax.P(None, *rest)), *shape[:3])
        return mesh.reshard(w, jax.P(None, "stage", None, *rest))

    return jax.tree.map(one, layers)


def joined(layers: Any) -> Any:
    """What `cut` made, in the order of the model: by `stage`, or whole."""

    def one(x):
        rest = jax.typeof(x).sharding.spec[3:]
        if x.shape[0] == 1:
            shape = (x.shape[1] * x.shape[2], *x.shape[3:])
            return jax.lax.reshape(x, shape, out_sharding=jax.P("stage", *rest))
        x = mesh.reshard(x, jax.P(None, None, None, *rest))
        return mesh.join_first(mesh.join_first(x))

    return jax.tree.map(one, layers)


# ---- the program of a stage


def _run(layers, rest, batch, rows, whole, *, spec, share, rules, config, plan):
    """All ticks of one stage: (gradients of its layers and of the rest, what routers
    counted, sums)."""
    vary = functools.partial(jax.tree.map, lambda x: mesh.vary(x, ("stage",)))
    layers = jax.tree.map(lambda x: x[:, 0], layers)
    layers, rest, batch, whole = (vary(x) for x in (layers, rest, batch, whole))
    stage = Stage(spec, share, rules, config, layers, rest, batch, whole)
    x = jax.eval_shape(lambda: stage.embedded(0))
    lies = rules.pspec("batch", *[None] * (len(x.shape) - 1))

    def zeros(*lead, dtype=x.dtype):
        made = jnp.zeros((*lead, *x.shape), dtype)
        return vary(mesh.reshard(made, jax.P(*[None] * len(lead), *lies)))

    def tick(carry, row):
        x_slots, d_slots, acc = carry
        row = {name: x[0] for name, x in row.items()}
        at = stage.at(row)
        x = jax.lax.dynamic_index_in_dim(x_slots, row["x_from"], keepdims=False)
        d = jax.lax.dynamic_index_in_dim(d_slots, row["d_from"], keepdims=False)
        x = _if(at["first"] & (row["kind"] != ticks.IDLE), stage.entered(row), x)
        forward = row["kind"] == ticks.KINDS.index(bubbles.FORWARD_PASS)
        backward = row["kind"] == ticks.KINDS.index(bubbles.BACKWARD_PASS)
        up = _if(forward & ~at["last"], lambda x: stage.forward(row, x), x)
        _, d, acc = _if(backward, lambda c: stage.backward(row, at, *c), (x, d, acc))
        x_slots = _put(x_slots, _handed(up, 1), row["x_into"])
        d_slots = _put(d_slots, _handed(d, -1), row["d_into"])
        return (x_slots, d_slots, acc), None

    carry = zeros(plan.x_slots + 1), zeros(plan.d_slots + 1), vary(stage.nothing())
    (_, _, acc), _ = jax.lax.scan(tick, carry, rows)
    rest, sums = jax.lax.psum((acc["rest"], acc["sums"]), "stage")
    own = jax.tree.map(lambda x: x[:, None], (acc["layers"], acc["counts"]))
    return (own[0], rest), own[1], sums


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What a stage has: the model and that of a stretch, weights, the batch, and what
    losses are divided by."""

    spec: spec_lib.Spec
    share: spec_lib.Spec
    rules: mesh.Rules
    config: step.StepConfig
    layers: Any
    rest: Any
    batch: dict[str, jax.Array]
    whole: dict[str, jax.Array]

    def at(self, row):
        """Whether an operation is that of the first stage, of the last one."""
        p, parts = jax.lax.axis_index("stage"), len(jax.tree.leaves(self.layers)[0])
        last = (p == mesh.axis_size("stage") - 1) & (row["part"] == parts - 1)
        return {"first": (p == 0) & (row["part"] == 0), "last": last}

    def micro(self, i):
        """Arrays [rows, t] of a micro-batch."""
        return {
            k: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
            for k, x in self.batch.items()
        }

    def embedded(self, i, table_vd=None):
        """The residual before the first layer."""
        here = self.micro(i)
        rest = self.rest | ({} if table_vd is None else {"embed_vd": table_vd})
        see = {"images": None, "videos": None, "rules": self.rules, "saved": None}
        tokens = here["tokens_bt"], here["segments_bt"]
        return decoder.embed_tokens(self.spec, rest, *tokens, **see)[0]

    def entered(self, row):
        return lambda _: self.embedded(row["micro"])

    def through(self, row, layers, x):
        """The residual behind the stretch, and what routers counted or None."""
        here = self.micro(row["micro"])
        known = self.config.document_mask
        segments = here["segments_bt"] if known else None
        positions = step.positions_of(here, self.spec, self.config)
        rows = (*x.shape[:2], positions, segments, self.rules)
        angles, chunked = places.of_rows(self.spec, *rows)
        return decoder.through(
            *(self.share, {"layers": layers}, x, here["tokens_bt"], angles, chunked),
            segments=segments,
            rules=self.rules,
            loop=self.config.loop,
            remat=self.config.remat,
        )

    def own(self, row):
        """The weights of the operation's stretch."""
        part = row["part"]
        return jax.tree.map(
            lambda w: jax.lax.dynamic_index_in_dim(w, part, keepdims=False), self.layers
        )

    def forward(self, row, x):
        """The residual behind the stretch."""
        return self.through(row, self.own(row), x)[0]

    def backward(self, row, at, x, d, acc):
        """(x, its cotangent, what is added up): the stretch again, then backward."""

        def run(layers, x):
            y, routed = self.through(row, layers, x)
            loss, more = self.routers(row, routed, acc["counts"])
            return (y, loss), more

        (y, loss), pull, more = jax.vjp(run, self.own(row), x, has_aux=True)
        acc, d = _if(at["last"], lambda c: self.end(row, y, *c), (acc, d))
        d_layers, dx = pull((d, jnp.ones_like(loss)))
        acc = acc | {"layers": _added_at(acc["layers"], row["part"], d_layers)}
        if more is not None:
            acc |= {"counts": _added_at(acc["counts"], row["part"], more["counts"])}
            sums = {k: acc["sums"][k] + x for k, x in more["sums"].items()}
            acc |= {"sums": acc["sums"] | sums}
        acc = _if(at["first"], lambda acc: self.start_back(row, dx, acc), acc)
        return x, dx, acc

    def end(self, row, y, acc, _):
        """(what is added up, with the head's part; cotangent of the residual)."""
        here = self.micro(row["micro"])
        tied = self.spec.tie_embedding
        names = [k for k in ENDS if k in self.rest and (tied or k != "embed_vd")]
        mine = {k: self.rest[k] for k in names}

        def loss(mine, y):
            hidden_btd = streams.end(mine, y, self.spec, self.rules)
            total, sums = losses.cross_entropy(
                hidden_btd,
                decoder.head_vd(self.spec, mine),
                here["targets_bt"],
                here["mask_bt"],
                z_coef=self.config.z_loss,
                rules=self.rules,
            )
            return total / self.whole["targets"].astype(total.dtype), sums

        (_, sums), (d_mine, d) = jax.value_and_grad(loss, (0, 1), has_aux=True)(mine, y)
        sums = {k: acc["sums"][k] + sums[k] for k in ("nll", "z")}
        rest = acc["rest"] | _sum({k: acc["rest"][k] for k in names}, d_mine)
        return acc | {"rest": rest, "sums": acc["sums"] | sums}, d

    def start_back(self, row, dx, acc):
        """What is added up, with the embedding's part."""
        embed = functools.partial(self.embedded, row["micro"])
        _, pull = jax.vjp(embed, self.rest["embed_vd"])
        table = acc["rest"]["embed_vd"]
        table = table + pull(dx)[0].astype(table.dtype)
        return acc | {"rest": acc["rest"] | {"embed_vd": table}}

    def routers(self, row, routed, counts):
        """(what routers add to the loss, counts and sums of it), 0 and None without;
        of a stretch, so that all stretches sum to what `step.loss_fn` has."""
        if routed is None:
            return jnp.zeros(()), None
        before = jax.tree.map(lambda x: x[row["part"]], counts)
        routers, tokens = self.spec.moe, self.whole["tokens"]
        seen = before["routed"] + routed["tokens"][0]
        counts_le = before["counts_le"] + routed["counts_e"]
        balance = moe.balance_loss(counts_le, seen, routed["probs_e"], tokens)
        router_z = jnp.mean(routed["z"]) / tokens
        part = len(counts_le) / len(self.spec.layers_with("moe"))
        sums = {"balance": balance * part, "router_z": router_z * part}
        loss = routers.balance_coef * sums["balance"]
        loss += routers.z_coef * sums["router_z"]
        new = {"counts_le": routed["counts_e"], "routed": routed["tokens"][0]}
        sums["dropped"] = jnp.sum(routed["dropped"])
        return loss, {"counts": new, "sums": sums}

    def nothing(self):
        """What is added up, before the first operation."""

        def wide(w):
            return jnp.zeros_like(w, dtype=jnp.promote_types(w.dtype, jnp.float32))

        dtype = jnp.promote_types(self.spec.compute_dtype, jnp.float32)
        names, counts = ["nll", "z"], {}
        if self.spec.moe is not None:
            names += ["balance", "router_z", "dropped"]
            parts = len(jax.tree.leaves(self.layers)[0])
            each = len(self.share.layers_with("moe")), self.spec.moe.num_experts
            counts = {
                "counts_le": jnp.zeros((parts, *each), jnp.float32),
                "routed": jnp.zeros((parts,), jnp.float32),
            }
        return {
            "layers": jax.tree.map(wide, self.layers),
            "rest": jax.tree.map(wide, self.rest),
            "sums": {name: jnp.zeros((), dtype) for name in names},
            "counts": counts,
        }


def _counted(counts):
    """Of [parts, stages, ...]: counts of all layers, tokens that one of them saw."""
    if not counts:
        return {}
    every = jax.tree.map(lambda x: mesh.reshard(x, jax.P()), counts)
    counts_le = mesh.join_first(mesh.join_first(every["counts_le"]))
    return {"counts_le": counts_le, "routed": every["routed"][0, 0]}


def _if(wanted, fn, carry):
    """`fn(carry)` where it is wanted, else the carry. A loop of one turn or none: a
    branch would copy what it hands through."""
    turns = jnp.where(wanted, 1, 0)
    return jax.lax.fori_loop(0, turns, lambda _, carry: fn(carry), carry)


def _handed(x, step):
    """What the stage before (1) or behind (-1) made, round the ring."""
    stages = mesh.axis_size("stage")
    ring = [(p, (p + step) % stages) for p in range(stages)]
    return jax.lax.ppermute(x, "stage", ring)


def _put(slots, x, at):
    return jax.lax.dynamic_update_index_in_dim(slots, x.astype(slots.dtype), at, 0)


def _sum(tree, more):
    return jax.tree.map(lambda x, d: x + d.astype(x.dtype), tree, more)


def _added_at(tree, part, more):
    def one(x, d):
        here = jax.lax.dynamic_index_in_dim(x, part, keepdims=False)
        return _put(x, here + d.astype(x.dtype), part)

    return jax.tree.map(one, tree, more)
