# SPDX-License-Identifier: Apache-2.0
"""The MTP head over pages: what it keeps of a row, and the next token that it expects.

    m_i = head(x_{i+1}, h_i); logits of x_{i+2} from m_i

Source: `mtp.py`, whose first layer drafts here. Its keys and values lie in a pool of
their own under the pages of the row (`Pages.mtp`): entry i is of token i, and is known
once token i + 1 is. So the entry of a row's last token is always still to come; what it
will be made of, the hidden state, is kept for each slot (`Pages.hidden_rd`).

A last entry of a page depends on the token behind the page. Rows that share the page
share the entry, whoever wrote it last: that may change what the head expects, and so
how often it is right, never what an answer is.

Shapes: tokens_bt, hidden_btd [b, t, d] of the model after its last norm, real_bt as in
`paged.hidden`; known_b 1 where the slot's hidden state is of the row's last token.
Raises: nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import attention as attn
from qwen_jax.models import decoder, mtp, page_ways, paged, streams
from qwen_jax.models import spec as spec_lib


def followed(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    pages: paged.Pages,
    tokens_bt: jax.Array,
    hidden_btd: jax.Array,
    real_bt: jax.Array,
    known_b: jax.Array,
    places: paged.Places,
    *,
    rules: mesh.Rules,
    trial: bool = False,
) -> paged.Pages:
    """The pages with entries of all tokens but the last of each row, after the model
    has seen tokens and `places` are those before it has; as they are without a pool."""
    if pages.mtp is None:
        return pages
    take, put = paged.by_slot()
    known_b1 = (known_b * real_bt[:, 0] * (places.length_b > 0))[:, None]
    last_b1d = take(pages.hidden_rd, places.slot_b)[:, None]
    held = _entered(
        *(spec, params, pages.mtp, tokens_bt[:, :1], last_b1d, known_b1),
        *(_before(places), rules, trial),
    )
    if tokens_bt.shape[1] > 1:
        next_bt = jnp.pad(tokens_bt[:, 1:], [(0, 0), (0, 1)])
        some_bt = real_bt
        if trial:
            some_bt = jnp.pad(real_bt[:, 1:], [(0, 0), (0, 1)])
        # Whole pages are written; what is behind the last is there to be written over.
        held = _entered(
            spec, params, held, next_bt, hidden_btd, some_bt, places, rules, trial
        )
    end_b11 = jnp.maximum(jnp.sum(real_bt, axis=1) - 1, 0)[:, None, None]
    hidden_btd = mesh.reshard(hidden_btd, jax.P(None, None, None))
    last_bd = jnp.take_along_axis(hidden_btd, end_b11, axis=1)[:, 0]
    hidden_rd = put(pages.hidden_rd, places.slot_b, last_bd)
    return pages.replace(mtp=held, hidden_rd=hidden_rd)


def expected(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    held: dict[str, jax.Array],
    next_b: jax.Array,
    hidden_b1d: jax.Array,
    real_b: jax.Array,
    places: paged.Places,
    *,
    rules: mesh.Rules,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(m of the last token in the pages [b, 1, d], the head's pool with its entry),
    `next_b` being the one behind it and `hidden_b1d` what the model made of it."""
    kind, p = spec.mtp_kinds[0], _layer(params)
    angles, at = paged.angles_of(spec, _before(places), 1)
    x_btd = mtp.enter(spec, params, next_b[:, None], hidden_b1d, rules)
    y_btd, inject = streams.enter(p[streams.names(spec)[0]], x_btd, spec, rules)
    y_btd, held = paged.attention(
        p["attention"],
        y_btd,
        *angles,
        held,
        real_bt=real_b[:, None],
        places=at,
        spec=spec,
        rules=rules,
        way=page_ways.here(),
        window=kind.window,
    )
    x_btd = streams.leave(x_btd, y_btd, inject)
    x_btd, _ = decoder.feed_forward(p, x_btd, real_b[:, None], spec, rules, kind)
    m_b1d = mtp.leave(spec, params, x_btd)
    return mesh.reshard(m_b1d, jax.P(None, None, None)), held


def _layer(params):
    return jax.tree.map(lambda x: x[0], params["mtp"]["layers"])


def _before(places):
    """Places from the last token on that is in the pages already."""
    return places.replace(length_b=jnp.maximum(places.length_b - 1, 0))


def _entered(spec, params, held, next_bt, hidden_btd, real_bt, places, rules, trial):
    """The pool with the keys and values of tokens in, from the ones behind them."""
    p, t = _layer(params), next_bt.shape[1]
    angles, places = paged.angles_of(spec, places, t)
    x_btd = mtp.enter(spec, params, next_bt, hidden_btd, rules)
    y_btd, _ = streams.enter(p[streams.names(spec)[0]], x_btd, spec, rules)
    _, k_bthk, v_bthk = attn.project(p["attention"], y_btd, *angles, spec, rules)
    kv_heads = rules.pspec(None, None, "kv_heads", None)
    pools = dict.fromkeys(held, rules.pspec(None, "kv_heads", None, None))
    where = paged.Places(jax.P(None, None), jax.P(None), jax.P(None))

    def run(held, k_bthk, v_bthk, real_bt, places):
        return paged.written(held, k_bthk, v_bthk, real_bt, places, trial)

    run = mesh.local(
        run, inputs=(pools, kv_heads, kv_heads, jax.P(None, None), where), out=pools
    )
    return run(held, k_bthk, v_bthk, real_bt, places)
