# SPDX-License-Identifier: Apache-2.0
"""What a model says of a document besides its next token: a vector, scores, yes or no.

`embed`: the final hidden state of a document's last token, at length 1
(Qwen3-Embedding, arXiv 2506.05176; fewer dims are the first ones, again at length 1, as
it was trained, arXiv 2205.13147). `score`: one matrix on that state ("classes") or on
every state ("token_classes"), or two with a ReLU between them on every state ("reward",
of Qwen2.5-Math-RM and -PRM). `yes_no`: the chance of one id against another as the next
token (Qwen3-Reranker). The texts that these models were trained on come from `query`
and `pair`; an embedding model's tokenizer ends a text with its end id, whose state is
the one that is taken.

Shapes: tokens_bt int32, segments int32 with 0 for padding on either side; without
`documents` the real tokens of a row are one document: results [b, ...]. In packed rows
the segments 1 .. documents are documents: results [b, documents, ...], zeros where a
row has no such segment. Results are float32 (float64 where the model computes in it).
Deviation: transformers finds the last token by the id of padding, this by segments.
Raises: config.InputError for a model without the head, or dims outside of its width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import config, mesh
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib

INSTRUCTION = (
    "Given a web search query, retrieve relevant passages that answer the query"
)


def query(text: str, instruction: str = INSTRUCTION) -> str:
    """A query as Qwen3-Embedding reads it; documents are read as they are."""
    return f"Instruct: {instruction}\nQuery:{text}"


def pair(text: str, document: str, instruction: str = INSTRUCTION) -> str:
    """A query and a document as Qwen3-Reranker reads them; "yes" or "no" follows."""
    return (
        "<|im_start|>system\nJudge whether the Document meets the requirements based "
        "on the Query and the Instruct provided. Note that the answer can only be "
        '"yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {instruction}\n<Query>: {text}\n<Document>: {document}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def embed(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    segments: jax.Array | None = None,
    *,
    documents: int | None = None,
    dims: int | None = None,
    rules: mesh.Rules | None = None,
) -> jax.Array:
    """Vectors of length 1, [b, dims] or [b, documents, dims].

    Args:
      spec: the model; its head does not matter.
      params: its weights.
      tokens_bt: int32 [b, t].
      segments: int32 [b, t]; None for rows without padding.
      documents: of a packed row; None for one document a row.
      dims: the first dims of the vector alone; None for all.
      rules: dims -> mesh axes.
    Raises:
      config.InputError: dims below 1 or above the width.
    """
    if dims is not None and not 1 <= dims <= spec.width:
        raise config.InputError(f"dims={dims}: wanted 1 to the width, {spec.width}")
    x, found = _last(spec, params, tokens_bt, segments, documents, rules)
    x = x[..., :dims]
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
    return jnp.where(found[..., None], x, 0)


def score(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    segments: jax.Array | None = None,
    *,
    documents: int | None = None,
    rules: mesh.Rules | None = None,
) -> jax.Array:
    """Scores of classes before any softmax; arguments as in `embed`.

    Returns:
      With head "classes" [b, y] or [b, documents, y], with "token_classes" and "reward"
      [b, t, y] of every token: the reward of a document is that of its last.
    Raises:
      config.InputError: a model whose head has no classes.
    """
    if spec.head in ("tokens", "none"):
        raise config.InputError(
            f"this model scores no classes (head={spec.head!r}): use "
            + ("models.forward" if spec.head == "tokens" else "models.embed")
        )
    if spec.head == "classes":
        x, found = _last(spec, params, tokens_bt, segments, documents, rules)
        return jnp.where(found[..., None], _scores(spec, params, x), 0)
    x_btd, _ = decoder.hidden(
        spec,
        params,
        tokens_bt,
        segments=_known(tokens_bt, segments, rules),
        rules=(rules or mesh.Rules()).whole,
    )
    return _scores(spec, params, _wide(x_btd))


def yes_no(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    segments: jax.Array | None = None,
    *,
    yes_id: int,
    no_id: int,
    documents: int | None = None,
    rules: mesh.Rules | None = None,
) -> jax.Array:
    """The chance of yes_id where only it and no_id may come next, as in `embed`.

    p = exp(l_yes) / (exp(l_yes) + exp(l_no)); the other logits are not computed. The
    result is [b] or [b, documents].
    """
    for name, number in (("yes_id", yes_id), ("no_id", no_id)):
        if not 0 <= number < spec.vocab_size:
            raise config.InputError(
                f"{name}={number}: wanted an id of the model, 0 to "
                f"{spec.vocab_size - 1}"
            )
    x, found = _last(spec, params, tokens_bt, segments, documents, rules)
    where = {"out_sharding": jax.P(None, None)} if mesh.active() else {}
    both = jnp.array([yes_id, no_id])
    pair_vd = decoder.head_vd(spec, params).at[both].get(**where)
    yes, no = jnp.moveaxis(x @ pair_vd.astype(x.dtype).T, -1, 0)
    return jnp.where(found, jax.nn.sigmoid(yes - no), 0)


def _known(tokens_bt, segments, rules):
    if segments is not None:
        return jnp.asarray(segments)
    rows = (rules or mesh.Rules()).pspec("batch", None)
    return mesh.reshard(jnp.ones(tokens_bt.shape, jnp.int32), rows)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _last(spec, params, tokens_bt, segments, documents, rules):
    """(hidden state of each document's last token, which documents there are)."""
    segments, rules = _known(tokens_bt, segments, rules), (rules or mesh.Rules()).whole
    x_btd, _ = decoder.hidden(spec, params, tokens_bt, segments=segments, rules=rules)
    x_btd = mesh.reshard(x_btd, jax.P(None, None, None))
    segments = mesh.reshard(segments, jax.P(None, None))
    if documents is None:
        mine_bct = (segments > 0)[:, None]
    else:
        numbers = jnp.arange(1, documents + 1)
        mine_bct = segments[:, None, :] == numbers[None, :, None]
    t = tokens_bt.shape[1]
    last_bc = t - 1 - jnp.argmax(jnp.flip(mine_bct, axis=2), axis=2)
    x_bcd = jnp.take_along_axis(x_btd, last_bc[..., None], axis=1)
    x_bcd, found_bc = _wide(x_bcd), jnp.any(mine_bct, axis=2)
    return (x_bcd, found_bc) if documents is not None else (x_bcd[:, 0], found_bc[:, 0])


def _scores(spec, params, x):
    """[..., d] -> [..., y], in x's dtype."""

    def weight(name):
        w = params[name].astype(x.dtype)
        return mesh.reshard(w, jax.P(*(None for _ in w.shape)))

    if spec.head == "reward":
        bias_d = weight("score_in_bias_d")
        x = jax.nn.relu(x @ weight("score_in_dd") + _like(bias_d, x))
    y = x @ weight("score_yd").T
    return y + _like(weight("score_bias_y"), y) if "score_bias_y" in params else y


def _like(bias, x):
    """A bias with as many dims as x."""
    return bias.reshape((1,) * (x.ndim - 1) + bias.shape)
