# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a run, from its record: clip, AdamW or Muon, decay, learning rate.

    g <- g * min(1, clip_norm / |g|)                       over the whole tree
    u  = adam(g)  or, for the matrices of Muon,  muon(g)
    p <- p - lr(step) * (u + weight_decay * p)              decay only where labelled

Source: AdamW, Loshchilov and Hutter (arXiv 1711.05101), decay multiplied by lr as in
optax and PyTorch; Muon, see `muon.py`. Which weight is what is told by a tree of
labels: "matrix" (decays; Muon's if Muon is chosen), "vector" (norms and biases: AdamW,
never decays), "embedding" (anything with a vocabulary dim, the output head too: AdamW;
decays only with `decay_embedding`, since without it embeddings keep their norm, OLMo 2,
arXiv 2501.00656).

Shapes: any tree; layers may be stacked, see `label_tree` for how names tell the dims.
Invariants: state and arithmetic are float32 whatever the weights are; a step is a pure
function of (gradients, state, weights); nothing here accumulates gradients.
Raises: config.InputError for unknown names, for a leaf whose name does not tell its
dims.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_jax import config
from qwen_jax.optim import muon, schedules

NAMES = ("adamw", "muon")
STACKED = "le"  # dims that stack matrices: layers, experts
# Heads and their width, streams and theirs: two dims that are one side of a matrix.
HEADS = ("nk", "hk", "nu", "ni", "rd")
LABELS = ("matrix", "vector", "embedding")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """What a run asks of its optimizer; 0 for lr_peak and -1 for steps leave it open.

    Open fields are filled by `derive.derive`, which prints the reasons.
    """

    name: str = "adamw"
    lr_peak: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = -1
    decay_steps: int = -1
    lr_end_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embedding: bool = False
    clip_norm: float = 1.0  # 0 does not clip
    muon_beta: float = 0.95
    muon_iters: int = 5
    muon_rms: float = 0.2

    def __post_init__(self):
        for field, names in (("name", NAMES), ("schedule", schedules.NAMES)):
            value = getattr(self, field)
            if value not in names:
                raise ValueError(
                    f"{field}={value!r} is not known{config.nearest(value, names)}"
                )
        for field in ("lr_peak", "weight_decay", "clip_norm", "eps", "muon_rms"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{field}={value}: wanted a number of at least 0")
        for field in ("b1", "b2", "muon_beta"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: wanted 0 <= it < 1")
        if not 0 <= self.lr_end_ratio <= 1:
            raise ValueError(f"lr_end_ratio={self.lr_end_ratio}: wanted 0 to 1")
        if self.warmup_steps < -1 or self.decay_steps < -1:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}: "
                "wanted a number of steps, or -1 to derive it"
            )


def build(
    optim: OptimConfig,
    num_steps: int,
    labels: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """The whole update as one optax transformation.

    Args:
      optim: the record, with nothing left open.
      num_steps: length of the run, for the schedule.
      labels: tree of "matrix" | "vector" | "embedding" like the weights', or a function
        from the weights to it; by default `label_tree`.
    Returns:
      A transformation whose update is to be added to the weights
      (`optax.apply_updates`).
    """
    labels = label_tree if labels is None else labels
    decayed = {"matrix": True, "vector": False, "embedding": optim.decay_embedding}
    adam = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)
    if optim.name == "muon":
        matrix = muon.scale_by_muon(
            optim.muon_beta, optim.muon_iters, optim.muon_rms, split=matrix_split
        )
        rule = optax.partition(
            {"matrix": matrix, "other": adam},
            lambda tree: _map_labels(
                labels, tree, lambda x: "matrix" if x == "matrix" else "other"
            ),
        )
    else:
        rule = adam
    parts = [_clip(optim.clip_norm or float("inf")), rule]
    if optim.weight_decay > 0:
        parts.append(
            optax.add_decayed_weights(
                optim.weight_decay, lambda tree: _map_labels(labels, tree, decayed.get)
            )
        )
    parts.append(optax.scale_by_learning_rate(schedules.make(optim, num_steps)))
    return _in_float32(optax.chain(*parts))


def label_tree(params: Any) -> Any:
    """A label for every weight, read from its name.

    Names end in one letter per dim (`q_ldnk`, `norm_d`, `embed_vd`): a `v` makes an
    embedding; otherwise two sides that are not stacked (l, e) make a matrix, fewer make
    a vector. Heads and their width (`nk`, `hk`) are one side.
    """

    def one(path, leaf) -> str:
        name, dims = _named_dims(path)
        where = jax.tree_util.keystr(path)
        if len(dims) != len(leaf.shape) or "_" not in name:
            raise config.InputError(
                f"{where} has shape {tuple(leaf.shape)}, which its name does not "
                "tell: end the name in one letter per dim, or pass labels"
            )
        if "v" in dims:
            return "embedding"
        own = _sides(dims)
        if len(own) > 2:
            raise config.InputError(
                f"{where}: {own!r} is more than a matrix; fold it to two dims, or pass "
                "labels"
            )
        return "matrix" if len(own) == 2 else "vector"

    return jax.tree_util.tree_map_with_path(one, params)


def _named_dims(path: Any) -> tuple[str, str]:
    """A leaf's own name and the letters it ends in."""
    name = str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1])))
    return name, name.rpartition("_")[2]


def _sides(dims: str) -> list[str]:
    """ "ldnk" -> ["d", "nk"]: the sides of one matrix, without what stacks matrices."""
    own, sides = dims.lstrip(STACKED), []
    while own:
        size = 2 if own[:2] in HEADS else 1
        sides.append(own[:size])
        own = own[size:]
    return sides


def matrix_split(path: Any, leaf: Any) -> tuple[int, int]:
    """(stacked dims, dims of the rows) of a weight labelled "matrix"."""
    dims = _named_dims(path)[1]
    sides = _sides(dims) if len(dims) == leaf.ndim else ["m", "n"]
    return leaf.ndim - sum(map(len, sides)), len(sides[0])


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Gradients times min(1, max_norm / norm), norm as `optax.tree.norm` gives it.

    optax's own divides each gradient; XLA on CPU does not repeat a division in the two
    places that read the result, and writes all clipped gradients out instead: measured
    on 29M weights, 117 MB more and an update of 120 ms against 45 ms. The same happens
    to the squares that a logged norm shares with Adam, so the scale stands there (with
    max_norm infinite: one) even where nothing is clipped.
    """

    def update(grads, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _map_labels(labels: Any, tree: Any, fn: Callable[[str], Any]) -> Any:
    """fn of each leaf's label, as a tree like `tree`."""
    named = labels(tree) if callable(labels) else labels
    for path, label in jax.tree_util.tree_leaves_with_path(named):
        if label not in LABELS:
            raise config.InputError(
                f"label {label!r} of {jax.tree_util.keystr(path)}: wanted one of "
                f"{', '.join(LABELS)}"
            )
    return jax.tree.map(fn, named)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on float32 copies of whatever comes; no copy where it is float32 already."""

    def widen(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(grads, state, params=None):
        return tx.update(widen(grads), state, None if params is None else widen(params))

    return optax.GradientTransformation(lambda p: tx.init(widen(p)), update)
