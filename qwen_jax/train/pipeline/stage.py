# SPDX-License-Identifier: Apache-2.0
"""What a stage of a pipeline computes in a tick, of a micro-batch by itself.

Here no axis but those inside a stage is known: what goes to other stages is handed on
by whoever goes through the ticks.

Shapes: x, d: the residual and its cotangent, [b, t, d]. row: the table's row of a tick
(see `ticks`), scalars. acc: what is added up: gradients of the layers [parts, layers of
a stretch, ...] and of the rest, sums of losses, counts of routers [parts, ...].
Raises: nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import decoder, moe, places, streams
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import losses, step

ENDS = ("embed_vd", "norm_d", "streams", "head_vd")  # weights that are no layers


def through(
    stage: "Stage", rows: Any, slots: dict[str, int], acc: Any, act, count: Any = None
) -> Any:
    """`acc` after all ticks.

    Args:
      stage: this one.
      rows: the table's, [ticks] each.
      slots: see `ticks.Table`.
      acc: before the first tick.
      act: (stage, row, x, d, acc) -> (what goes up, what goes down, acc); x is the
        residual before the stretch, d the cotangent of the one behind it.
      count: of ticks; None for all that the table has.
    """
    x = jax.eval_shape(lambda: stage.embedded(0))
    lies = stage.rules.pspec(None, "batch", *[None] * (len(x.shape) - 1))

    def zeros(count):
        return mesh.reshard(jnp.zeros((count, *x.shape), x.dtype), lies)

    def tick(i, carry):
        row = jax.tree.map(lambda x: x[i], rows)
        x_slots, d_slots, acc = carry
        x = jax.lax.dynamic_index_in_dim(x_slots, row["x_from"], keepdims=False)
        d = jax.lax.dynamic_index_in_dim(d_slots, row["d_from"], keepdims=False)
        begins = stage.at(row)["first"] & (row["kind"] != 0)
        x = when(begins, lambda _: stage.embedded(row["micro"]), x)
        up, down, acc = act(stage, row, x, d, acc)
        x_slots = put(x_slots, _handed(up, 1), row["x_into"])
        d_slots = put(d_slots, _handed(down, -1), row["d_into"])
        return x_slots, d_slots, acc

    carry = zeros(slots["x"] + 1), zeros(slots["d"] + 1), acc
    count = len(rows["kind"]) if count is None else count
    return jax.lax.fori_loop(0, count, tick, carry)[2]


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What a stage has: the model and that of a stretch, weights, the batch, and of the
    whole step what losses are divided by (of chunks also `ticks` and `d_stats`)."""

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
        """(cotangent of x, what is added up): the stretch again, then backward."""

        def run(layers, x):
            y, routed = self.through(row, layers, x)
            loss, more = self.routers(row, routed, acc["counts"])
            return (y, loss), more

        (y, loss), pull, more = jax.vjp(run, self.own(row), x, has_aux=True)
        acc, d = when(at["last"], lambda c: self.end(row, y, *c), (acc, d))
        d_layers, dx = pull((d, jnp.ones_like(loss)))
        acc = acc | {"layers": added_at(acc["layers"], row["part"], d_layers)}
        if more is not None:
            acc |= {"counts": added_at(acc["counts"], row["part"], more["counts"])}
            sums = {k: acc["sums"][k] + x for k, x in more["sums"].items()}
            acc |= {"sums": acc["sums"] | sums}
        acc = when(at["first"], lambda acc: self.start_back(row, dx, acc), acc)
        return dx, acc

    def end(self, row, y, acc, _):
        """(what is added up, with the head's part; cotangent of the residual)."""
        tied = self.spec.tie_embedding
        names = [k for k in ENDS if k in self.rest and (tied or k != "embed_vd")]
        mine = {k: self.rest[k] for k in names}

        def loss(mine, y):
            total, sums = self.cross_entropy(row, mine, y)
            return total / self.whole["targets"].astype(total.dtype), sums

        (_, sums), (d_mine, d) = jax.value_and_grad(loss, (0, 1), has_aux=True)(mine, y)
        sums = {k: acc["sums"][k] + sums[k] for k in ("nll", "z")}
        rest = acc["rest"] | _sum({k: acc["rest"][k] for k in names}, d_mine)
        return acc | {"rest": rest, "sums": acc["sums"] | sums}, d

    def cross_entropy(self, row, rest, y):
        """`losses.of_rows` of the residual behind the last layer."""
        hidden_btd = streams.end(rest, y, self.spec, self.rules)
        how = {"z_coef": self.config.z_loss, "rules": self.rules}
        return losses.of_rows(
            self.spec, rest, hidden_btd, self.micro(row["micro"]), **how
        )

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
        if "d_stats" in self.whole:
            d = self.d_stats()
            return sum(jnp.sum(x * routed[name]) for name, x in d.items()), None
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

    def d_stats(self):
        """Cotangents of what the stretch's routers count, where those of all are known
        (see `chunkflow.gradients.d_stats`); None for models without routers."""
        if self.spec.moe is None:
            return None
        count = len(self.share.layers_with("moe"))
        first = jax.lax.axis_index("stage") * count
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, count),
            self.whole["d_stats"],
        )

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


def when(wanted: jax.Array, fn: Callable, carry: Any) -> Any:
    """`fn(carry)` where it is wanted, else the carry. A loop of one turn or none: a
    branch would copy what it hands through."""
    turns = jnp.where(wanted, 1, 0)
    return jax.lax.fori_loop(0, turns, lambda _, carry: fn(carry), carry)


def _handed(x, step):
    """What the stage before (1) or behind (-1) made, round the ring."""
    stages = mesh.axis_size("stage")
    ring = [(p, (p + step) % stages) for p in range(stages)]
    return jax.lax.ppermute(x, "stage", ring)


def put(slots: jax.Array, x: jax.Array, at: jax.Array) -> jax.Array:
    """The slots with x in one of them."""
    return jax.lax.dynamic_update_index_in_dim(slots, x.astype(slots.dtype), at, 0)


def _sum(tree, more):
    return jax.tree.map(lambda x, d: x + d.astype(x.dtype), tree, more)


def added_at(tree, part, more):
    def one(x, d):
        here = jax.lax.dynamic_index_in_dim(x, part, keepdims=False)
        return put(x, here + d.astype(x.dtype), part)

    return jax.tree.map(one, tree, more)
