# SPDX-License-Identifier: Apache-2.0
"""Counts from a spec: parameters, active parameters, FLOPs, KV bytes.

Source: every matrix product costs 2 FLOPs a weight and token; attention over a prefix
of average length s costs 4 * n * k * s a layer and token (scores and weighted values).
The gated delta rule costs 6 * k * u a value head: its state is read, written and read.
With experts only the picked ones count, with indexed attention the chosen keys and the
scores of the index, 2 * n * i for each block. The backward pass costs twice the
forward. The vision tower is left out: it meets patches, not tokens. Norms, RoPE,
softmax are left out (below 1 %). The embedding lookup is no product; the head is, tied
or not.

Units: FLOPs, bytes; `causal=True` counts only what a causal mask leaves, (t + 1) / 2
keys on average; False counts t, the convention of published MFU figures.
"""

import dataclasses

from qwen_jax import params
from qwen_jax.models import decoder, indexed, ngram, vision
from qwen_jax.models import spec as spec_lib


def num_params(spec: spec_lib.Spec) -> int:
    """All weights, the embedding once."""
    return params.count(decoder.decoder_params(spec))


def num_vision(spec: spec_lib.Spec) -> int:
    """Weights of the tower in front, which tokens of text do not meet."""
    return 0 if spec.vision is None else params.count(vision.vision_params(spec))


def num_non_embedding(spec: spec_lib.Spec) -> int:
    """Weights without the embedding table and the head (as reports count them)."""
    tables = 1 if spec.tie_embedding else 2
    return num_params(spec) - tables * spec.vocab_size * spec.width


def num_active(spec: spec_lib.Spec) -> int:
    """Weights that one token meets: of the experts only those that it picks, of the
    tables of n-grams only the rows that it looks up."""
    idle = 0
    if spec.moe is not None:
        moe = spec.moe
        idle = moe.num_experts - moe.experts_per_token
        layers = len(spec.layers_with("moe")) + spec.mtp_layers
        idle *= layers * 3 * spec.width * moe.ffn_width
    if spec.ngram is not None:
        idle += num_ngram(spec) - len(spec.ngram.layers) * spec.ngram.width
    return num_params(spec) - idle


def num_ngram(spec: spec_lib.Spec) -> int:
    """Weights of the tables of n-grams."""
    if spec.ngram is None:
        return 0
    tree = decoder.decoder_params(spec)["layers"]["ngram"]
    return params.count(tree["table_lvk"])


def _keys_seen(tokens: int, window: int, causal: bool) -> float:
    """Average number of keys a query meets in a row of `tokens`."""
    if not causal:
        return min(window, tokens) if window else tokens
    if not window or window >= tokens:
        return (tokens + 1) / 2
    return window - window * (window - 1) / (2 * tokens)


def forward_per_token(
    spec: spec_lib.Spec, seq_tokens: int, *, causal: bool = False
) -> float:
    """FLOPs of the forward pass for one token of a row of `seq_tokens`."""
    spec = dataclasses.replace(spec, mtp_layers=0)  # it only trains and drafts
    idle = num_params(spec) - num_active(spec) + num_vision(spec)
    weights = num_non_embedding(spec) - idle + spec.vocab_size * spec.width
    if spec.ngram is not None:  # rows that are looked up are no product
        weights -= len(spec.ngram.layers) * spec.ngram.width
    heads = spec.num_heads * spec.head_width
    mixing = 0.0
    for kind in spec.kinds:
        if kind.mixer == "attention":
            seen = _keys_seen(seq_tokens, kind.window, causal)
            if indexed.chooses(spec, seq_tokens):
                index = spec.indexed
                mixing += 2 * index.heads * index.width * seen / index.ratio
                # On average half a block stands after the last complete one.
                seen = min(seen, index.budget + (index.ratio - 1) / 2)
            mixing += 4 * heads * seen
        else:
            delta = spec.delta
            mixing += 6 * delta.value_heads * delta.key_width * delta.value_width
    return 2 * weights + mixing


def train_per_token(
    spec: spec_lib.Spec, seq_tokens: int, *, causal: bool = False
) -> float:
    """FLOPs of forward and backward for one token (no recomputation counted), with
    the head for further tokens, where there is one, and its logits."""
    plain = dataclasses.replace(spec, mtp_layers=0)
    weights = num_active(spec) - num_active(plain)
    keys = _keys_seen(seq_tokens, 0, causal)
    each = (
        2 * spec.vocab_size * spec.width + 4 * spec.num_heads * spec.head_width * keys
    )
    further = 2 * weights + spec.mtp_layers * each
    return 3 * (forward_per_token(plain, seq_tokens, causal=causal) + further)


def kv_bytes_per_token(spec: spec_lib.Spec, itemsize: int = 2) -> int:
    """Bytes of keys and values one token keeps in a cache, and of its key in an index
    where the model has one. Layers with a window are not counted: they keep no more
    than the window, see `state_bytes`."""
    layers = len(_attending(spec, window=False))
    index = spec.indexed.width if spec.indexed is not None else 0
    return layers * (2 * spec.num_kv_heads * spec.head_width + index) * itemsize


def _attending(spec: spec_lib.Spec, *, window: bool) -> list[spec_lib.Kind]:
    """The layers of attention with a window, or those without."""
    attending = [kind for kind in spec.kinds if kind.mixer == "attention"]
    return [kind for kind in attending if bool(kind.window) == window]


def state_bytes(spec: spec_lib.Spec, itemsize: int = 2) -> int:
    """Bytes that the linear layers keep of a row, however long it is: float32 matrices
    and the convolution's last inputs; those of convolutions over n-grams; and the keys
    and values of layers with a window, of rows that are longer than that."""
    delta = spec.delta
    seen = sum(kind.window for kind in _attending(spec, window=True))
    kept = seen * 2 * spec.num_kv_heads * spec.head_width * itemsize
    if spec.ngram is not None:
        width = spec.streams.count * spec.width * itemsize
        kept += len(spec.ngram.layers) * ngram.reach(spec.ngram) * width
    if delta is None:
        return kept
    keys, values = delta.key_heads * delta.key_width, delta.value_heads
    matrices = 4 * values * delta.key_width * delta.value_width
    tails = (delta.conv_taps - 1) * (2 * keys + values * delta.value_width) * itemsize
    return len(spec.layers_with("delta")) * (matrices + tails) + kept
