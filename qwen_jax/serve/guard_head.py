# SPDX-License-Identifier: Apache-2.0
"""A head that judges tokens: hidden states -> how risky, and of what category.

Source: Qwen3Guard-Stream (arXiv 2510.14276, section 4). On a hidden state h, for what
is asked ("query") and for what is answered ("response") with weights of their own:
z = LayerNorm(h W_pre), softmax(z W_risk + b) over RISKS, softmax(z W_category + b) over
CATEGORIES. The order of both is that of the published weights. Loss: cross-entropy of
the risk of every judged token, and of the category where it is not safe.
A text is flagged when two tokens in a row are not safe (debounce).

Deviations: of a controversial and an unsafe token in a row, in either order, the text
is flagged as controversial (the paper's evaluation asks for two equal ones); prompts
are judged likewise, and not by their last token alone. A token has one category.

Shapes: hidden [..., d]; results float32 [..., 3] and [..., y]; token labels risk_bt and
category_bt are indices, mask_bt has 1 for judged tokens. f is the head's inner width.
Format of a folder: see `guard_files`; its facts are width and inner.
Invariants: `head` is one small matmul, a norm and two smaller matmuls a token, whatever
the batch, so that it can stand at the end of a decoding step.
Raises: config.InputError from `load`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config
from qwen_jax import params as params_lib
from qwen_jax.models import norm
from qwen_jax.params import Param, ones, zeros
from qwen_jax.serve import guard_files, guard_verdict

QUERY, RESPONSE = "query", "response"
ROLES = (QUERY, RESPONSE)
RISKS = (guard_verdict.SAFE, guard_verdict.UNSAFE, guard_verdict.CONTROVERSIAL)
_SHARED = ("violent", "sexual", "self_harm", "political", "pii", "copyright")
_SHARED += ("illegal", "unethical")
CATEGORIES = {
    QUERY: tuple(guard_verdict.CATEGORIES[c] for c in (*_SHARED, "jailbreak")),
    RESPONSE: tuple(guard_verdict.CATEGORIES[c] for c in _SHARED),
}
# Index into RISKS -> index into guard_verdict.LEVELS, which are from good to bad.
SEVERITY = np.array([guard_verdict.LEVELS.index(risk) for risk in RISKS], np.int32)
EPS = 1e-5
FORMAT = "qwen_jax guard head"
MAX_SIZE = 1 << 16


def declare(width: int, inner: int) -> dict[str, Any]:
    """The weights of both heads for hidden states of a width, as `Param`s."""

    def one(role: str) -> dict[str, Param]:
        num_categories = len(CATEGORIES[role])
        near = params_lib.normal
        return {
            "pre_df": Param((width, inner), ("embed", None), near(width**-0.5)),
            "scale_f": Param((inner,), (None,), ones),
            "bias_f": Param((inner,), (None,), zeros),
            "risk_fy": Param((inner, 3), (None, None), near(inner**-0.5)),
            "risk_bias_y": Param((3,), (None,), zeros),
            "category_fy": Param(
                (inner, num_categories), (None, None), near(inner**-0.5)
            ),
            "category_bias_y": Param((num_categories,), (None,), zeros),
        }

    return {role: one(role) for role in ROLES}


def head(p: dict[str, jax.Array], hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logits of RISKS, logits of categories) of hidden states [..., d]; `p` is one
    role's part of the weights."""
    z = jnp.einsum("...d,df->...f", hidden.astype(p["pre_df"].dtype), p["pre_df"])
    z = norm.layer_norm(z.astype(jnp.float32), p["scale_f"], p["bias_f"], EPS)

    def scores(name: str) -> jax.Array:
        w_fy, bias_y = p[f"{name}_fy"], p[f"{name}_bias_y"]
        y = jnp.einsum("...f,fy->...y", z, w_fy.astype(jnp.float32))
        return y + bias_y.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))

    return scores("risk"), scores("category")


def loss(
    p: dict[str, jax.Array],
    hidden_btd: jax.Array,
    risk_bt: jax.Array,
    category_bt: jax.Array,
    mask_bt: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(sum over judged tokens of the loss, their number), so that batches add up.

    loss_t = -log softmax(risk)[r_t] - [r_t not safe] log softmax(category)[c_t]
    """
    risk_bty, category_bty = head(p, hidden_btd)

    def cross_entropy(logits_bty, index_bt):
        logs_bty = jax.nn.log_softmax(logits_bty)
        return -jnp.take_along_axis(logs_bty, index_bt[..., None], axis=-1)[..., 0]

    mask_bt = mask_bt.astype(jnp.float32)
    risky_bt = mask_bt * (risk_bt != RISKS.index(guard_verdict.SAFE))
    total = jnp.sum(cross_entropy(risk_bty, risk_bt) * mask_bt)
    total += jnp.sum(cross_entropy(category_bty, category_bt) * risky_bt)
    return total, jnp.sum(mask_bt)


def save(p: dict[str, Any], folder: str) -> None:
    """Write both heads; a folder that was there is replaced as a whole."""
    width, inner = p[QUERY]["pre_df"].shape
    guard_files.save(folder, FORMAT, {"width": width, "inner": inner}, p)


def load(folder: str) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
      config.InputError: see `guard_files`.
    """
    held = guard_files.facts_of(folder, FORMAT)
    sizes = [held.get(name) for name in ("width", "inner")]
    if not all(type(size) is int and 0 < size <= MAX_SIZE for size in sizes):
        raise config.InputError(
            f"{folder}: wanted width and inner of 1 to {MAX_SIZE:,}"
        )
    return guard_files.params_of(folder, declare(*sizes))


def severity(risk_logits: Any) -> Any:
    """Logits [..., 3] -> index into LEVELS of the likeliest; arrays of either kind."""
    array = jnp if isinstance(risk_logits, jax.Array) else np
    return array.asarray(SEVERITY)[array.argmax(risk_logits, axis=-1)]


def debounce(before: Any, now: Any) -> Any:
    """The level (index) at which a text is flagged by two tokens in a row; the next
    call's `before` is this one's `now`, and 0 at the beginning. Ints or arrays [b]."""
    array = jnp if isinstance(now, jax.Array) else np
    return array.minimum(before, now)
