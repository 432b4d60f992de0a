# SPDX-License-Identifier: Apache-2.0
"""Judged texts -> a trained head: labels of tokens, AdamW, and nothing else.

Source: Qwen3Guard (arXiv 2510.14276, section 4): from the first token of what is not
safe on, every token of the text has the text's level and (first) category; those before
it are safe. `guard_head.loss` is added up over prompts and answers.

Shapes: `Labels` are [rows, tokens] with 0 for padding; rows longer than `max_tokens`
are cut at their end and counted in `cut`. `train` has the small trunk of `guard_trunk`
under the heads; `train_heads` takes the hidden states [b, t, d] of another model.
Units: learning rate a step; loss in nats a judged token.
Invariants: the same rows, settings and seed give the same weights on one machine.
Raises: config.InputError for settings that cannot be.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwen_jax import config, rng
from qwen_jax import params as params_lib
from qwen_jax.serve import guard_data, guard_head, guard_text, guard_trunk

ROLE_IDS = {guard_head.QUERY: 1, guard_head.RESPONSE: 2}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of training; steps of `batch_rows` rows drawn anew."""

    steps: int = 300
    batch_rows: int = 32
    lr_peak: float = 1e-2
    weight_decay: float = 1e-3
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_rows", "max_tokens"):
            if getattr(self, name) < 1:
                raise config.InputError(
                    f"{name}={getattr(self, name)}: wanted at least 1"
                )
        if not 0 < self.lr_peak < 1:
            raise config.InputError(f"lr_peak={self.lr_peak}: wanted 0 to 1")


@dataclasses.dataclass(frozen=True)
class Labels:
    """int32 [rows, tokens] each: ids, whose head judges (ROLE_IDS, 0 for none), index
    into RISKS, index into the categories of that head."""

    ids_bt: np.ndarray
    role_bt: np.ndarray
    risk_bt: np.ndarray
    category_bt: np.ndarray
    cut: int = 0


def labels(rows: Sequence[guard_data.Row], vocab: int, max_tokens: int = 256) -> Labels:
    """Token labels of judged texts."""
    made = [_tokens(row, vocab) for row in rows]
    cut = sum(len(one) > max_tokens for one in made)
    longest = min(max(map(len, made)), max_tokens)
    width = -(-longest // 32) * 32
    filled = np.zeros((4, len(rows), width), np.int32)
    for i, one in enumerate(made):
        one = one[:max_tokens]
        filled[:, i, : len(one)] = np.array(one, np.int32).T
    return Labels(*filled, cut=cut)


def _tokens(row: guard_data.Row, vocab: int) -> list[tuple[int, int, int, int]]:
    """(id, role, risk, category) of a conversation."""
    made = []
    last = len(row.messages) - 1
    for i, message in enumerate(row.messages):
        made.append((guard_trunk.mark(str(message.get("role"))), 0, 0, 0))
        role = guard_head.QUERY if i == last else ""  # what came before is context
        level, names = row.prompt_level, row.prompt_categories
        made += _text(message["content"], role, level, names, row.prompt_start, vocab)
    if row.response is not None:
        made.append((guard_trunk.mark("assistant"), 0, 0, 0))
        level, names = row.response_level, row.response_categories
        role, start = guard_head.RESPONSE, row.response_start
        made += _text(row.response, role, level, names, start, vocab)
    return made


def _text(text, role, level, names, start, vocab) -> list[tuple[int, int, int, int]]:
    folded = guard_text.fold(text)
    spans, _ = guard_text.pieces(folded.low)
    ids = guard_trunk.ids_of(folded.low, spans, vocab)
    if not role:
        return [(x, 0, 0, 0) for x in ids]
    risk = guard_head.RISKS.index(level)
    category = guard_head.CATEGORIES[role].index(names[0]) if names else 0
    risky = [folded.origin[b - 1] >= start for _, b in spans]
    return [
        (x, ROLE_IDS[role], risk if on else 0, category if on else 0)
        for x, on in zip(ids, risky, strict=True)
    ]


def loss(p: dict[str, Any], batch: Labels) -> jax.Array:
    """Mean over judged tokens, of both heads."""

    def one(h_bd, ids_b):
        h_bd = guard_trunk.step(p, h_bd, ids_b)
        return h_bd, h_bd

    width = p["embed_vd"].shape[1]
    start = jnp.zeros((batch.ids_bt.shape[0], width))
    _, hidden_tbd = jax.lax.scan(one, start, jnp.swapaxes(batch.ids_bt, 0, 1))
    hidden_btd = jnp.swapaxes(hidden_tbd, 0, 1)
    return heads_loss(p["head"], hidden_btd, batch)


def heads_loss(p: dict[str, Any], hidden_btd: jax.Array, batch: Labels) -> jax.Array:
    """Mean over judged tokens, of both heads, on hidden states of any model."""
    total, count = 0.0, 0.0
    for role, number in ROLE_IDS.items():
        mask_bt = batch.role_bt == number
        # A category index of the other head may lie outside of this one's.
        category_bt = jnp.where(mask_bt, batch.category_bt, 0)
        some = guard_head.loss(p[role], hidden_btd, batch.risk_bt, category_bt, mask_bt)
        total, count = total + some[0], count + some[1]
    return total / jnp.maximum(count, 1)


def train(
    rows: Sequence[guard_data.Row],
    sizes: guard_trunk.Sizes,
    settings: Settings,
    say: Callable[[int, float], None] = lambda step, loss: None,
) -> guard_trunk.Model:
    """A trained head.

    Args:
      rows: judged texts.
      sizes: of the model.
      settings: of training.
      say: told (step, loss) every 50 steps and at the end.
    """
    made = labels(rows, sizes.vocab, settings.max_tokens)
    p = guard_trunk.init(sizes, settings.seed)
    arrays = (made.ids_bt, made.role_bt, made.risk_bt, made.category_bt)

    def of_batch(p, arrays):
        return loss(p, Labels(*arrays))

    p, value = _fitted(of_batch, p, arrays, settings, say)
    trained_on = {
        "rows": len(rows),
        "cut": made.cut,
        "loss": value,
        **config.thaw(settings),
    }
    return guard_trunk.Model(sizes, p, trained_on)


def train_heads(
    hidden_btd: np.ndarray,
    made: Labels,
    inner: int,
    settings: Settings,
    say: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Heads (see `guard_head.declare`) on hidden states of any model.

    Args:
      hidden_btd: the states of the tokens that `made` labels.
      made: labels; its ids do not matter.
      inner: width of the heads.
      settings: of training.
      say: as in `train`.
    """
    key = rng.key_for(settings.seed, "guard heads")
    declared = guard_head.declare(hidden_btd.shape[-1], inner)
    p = params_lib.init(declared, key, jnp.float32)
    arrays = (hidden_btd, made.role_bt, made.risk_bt, made.category_bt)

    def of_batch(p, arrays):
        return heads_loss(p, arrays[0], Labels(*arrays))

    return _fitted(of_batch, p, arrays, settings, say)[0]


def _fitted(of_batch, p, arrays, settings, say) -> tuple[Any, float]:
    """(weights after all steps, loss of the last) of a loss of (weights, arrays)."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.lr_peak, max(settings.steps // 20, 1), settings.steps + 1
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=settings.weight_decay),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(p, state, arrays):
        value, grads = jax.value_and_grad(of_batch)(p, arrays)
        changes, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, changes), state, value

    state = optimizer.init(p)
    for i in range(settings.steps):
        drawn = np.random.default_rng(rng.seed_for(settings.seed, f"guard/{i}"))
        picked = drawn.integers(0, len(arrays[0]), settings.batch_rows)
        p, state, value = update(p, state, tuple(a[picked] for a in arrays))
        if (i + 1) % 50 == 0 or i + 1 == settings.steps:
            say(i + 1, float(value))
    return p, float(value)
