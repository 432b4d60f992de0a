# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a Hugging Face folder is which weight: one table, read both ways.

A `Tensor` is a name there and the weights of ours that it holds, each with an einops
pattern from theirs to ours. Some hold several: then `view` (einops, "" for as it is)
brings out the dim `dim` along which they follow each other.

Formats: a linear layer there is [out, in], heads joined (head-major) in one dim; here
dims are split and the input comes first. `{i}` in a name is the layer, `{e}` the
expert, `{s}` a part of the rows; patterns leave out the dims that these stand for.
Letters as in `dims`, with the sizes of the layer's part: `k` is the head width of
attention, in `delta` of its keys; `x` are the two halves of an attention head, `r` the
dims of each.
Invariants: a weight has one entry in a table; with experts there are three layouts,
each expert by itself or all fused, outputs or inputs first, and the one that a folder
has is read.
"""

import dataclasses
import math
import re

from qwen_jax.models import names_vision, qwen4
from qwen_jax.models import spec as spec_lib

_LAYER = "model.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_DELTA = _LAYER + "linear_attn."
_MLP = _LAYER + "mlp."


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor there: its name, the weights it holds and how; see the module."""

    name: str
    parts: tuple[tuple[str, str], ...]
    view: str = ""
    dim: int = 0


def _one(name: str, key: str, pattern: str) -> Tensor:
    return Tensor(name, ((key, pattern),))


def _swiglu(name: str, key: str) -> tuple[Tensor, ...]:
    return (
        _one(name + "gate_proj.weight", key + "gate_ldf", "f d -> d f"),
        _one(name + "up_proj.weight", key + "up_ldf", "f d -> d f"),
        _one(name + "down_proj.weight", key + "down_lfd", "d f -> f d"),
    )


_MTP = (
    _one("mtp.pre_fc_norm_embedding.weight", "mtp.embedding_norm_d", "d -> d"),
    _one("mtp.pre_fc_norm_hidden.weight", "mtp.hidden_norm_d", "d -> d"),
    _one("mtp.norm.weight", "mtp.norm_d", "d -> d"),
    Tensor(
        "mtp.fc.weight",
        (("mtp.embedding_dd", "o d -> d o"), ("mtp.hidden_dd", "o d -> d o")),
        dim=1,
    ),
)
_SCORES = (
    _one("score.weight", "score_yd", "y d -> y d"),
    _one("score.bias", "score_bias_y", "y -> y"),
)
# Two linear layers with a ReLU between them.
_REWARDS = (
    _one("score.0.weight", "score_in_dd", "o d -> d o"),
    _one("score.0.bias", "score_in_bias_d", "o -> o"),
    _one("score.2.weight", "score_yd", "y d -> y d"),
    _one("score.2.bias", "score_bias_y", "y -> y"),
)
_A = "layers.attention."
_BASE = (
    _one("model.embed_tokens.weight", "embed_vd", "v d -> v d"),
    _one("model.norm.weight", "norm_d", "d -> d"),
    _one("lm_head.weight", "head_vd", "v d -> v d"),
    _one(_LAYER + "input_layernorm.weight", "layers.attention_norm_ld", "d -> d"),
    _one(_LAYER + "post_attention_layernorm.weight", "layers.mlp_norm_ld", "d -> d"),
    _one(_ATTENTION + "k_proj.weight", _A + "k_ldhk", "(h k) d -> d h k"),
    _one(_ATTENTION + "v_proj.weight", _A + "v_ldhk", "(h k) d -> d h k"),
    _one(_ATTENTION + "o_proj.weight", _A + "o_lnkd", "d (n k) -> n k d"),
    _one(_ATTENTION + "q_proj.bias", _A + "q_bias_lnk", "(n k) -> n k"),
    _one(_ATTENTION + "k_proj.bias", _A + "k_bias_lhk", "(h k) -> h k"),
    _one(_ATTENTION + "v_proj.bias", _A + "v_bias_lhk", "(h k) -> h k"),
    _one(_ATTENTION + "q_norm.weight", _A + "q_norm_lk", "k -> k"),
    _one(_ATTENTION + "k_norm.weight", _A + "k_norm_lk", "k -> k"),
    *_swiglu(_MLP, "layers.mlp."),
    _one(_MLP + "gate.weight", "layers.moe.router_lde", "e d -> d e"),
    *_swiglu(_MLP + "shared_expert.", "layers.moe.shared."),
    _one(_MLP + "shared_expert_gate.weight", "layers.moe.shared_gate_ld", "1 d -> d"),
)
_PLAIN_QUERY = (_one(_ATTENTION + "q_proj.weight", _A + "q_ldnk", "(n k) d -> d n k"),)
# For each head its query, then its gate.
_GATED_QUERY = (
    Tensor(
        _ATTENTION + "q_proj.weight",
        ((_A + "q_ldnk", "n k d -> d n k"), (_A + "gate_ldnk", "n k d -> d n k")),
        view="(n c) d -> n c d",
        dim=1,
    ),
)
_M = "layers.moe."
_EXPERTS_APART = (
    _one(_MLP + "experts.{e}.gate_proj.weight", _M + "gate_ledf", "f d -> d f"),
    _one(_MLP + "experts.{e}.up_proj.weight", _M + "up_ledf", "f d -> d f"),
    _one(_MLP + "experts.{e}.down_proj.weight", _M + "down_lefd", "d f -> f d"),
)
_EXPERTS_FUSED = (
    Tensor(
        _MLP + "experts.gate_up_proj",
        ((_M + "gate_ledf", "e f d -> e d f"), (_M + "up_ledf", "e f d -> e d f")),
        dim=1,
    ),
    _one(_MLP + "experts.down_proj", _M + "down_lefd", "e d f -> e f d"),
)
# Qwen3-VL is published with its experts' inputs first.
_EXPERTS_TURNED = (
    Tensor(
        _MLP + "experts.gate_up_proj",
        ((_M + "gate_ledf", "e d f -> e d f"), (_M + "up_ledf", "e d f -> e d f")),
        dim=2,
    ),
    _one(_MLP + "experts.down_proj", _M + "down_lefd", "e f d -> e f d"),
)
_D = "layers.delta."
_DELTA_BASE = (
    Tensor(
        _DELTA + "conv1d.weight",
        (
            (_D + "conv_q_ljhk", "(h k) 1 j -> j h k"),
            (_D + "conv_k_ljhk", "(h k) 1 j -> j h k"),
            (_D + "conv_v_ljnu", "(n u) 1 j -> j n u"),
        ),
    ),
    _one(_DELTA + "A_log", _D + "a_log_ln", "n -> n"),
    _one(_DELTA + "dt_bias", _D + "dt_bias_ln", "n -> n"),
    _one(_DELTA + "norm.weight", _D + "norm_lu", "u -> u"),
    _one(_DELTA + "out_proj.weight", _D + "o_lnud", "d (n u) -> n u d"),
)
# For each key head: its query, key, and the values and gates of its g value heads.
_DELTA_GROUPED = (
    Tensor(
        _DELTA + "in_proj_qkvz.weight",
        (
            (_D + "q_ldhk", "h k d -> d h k"),
            (_D + "k_ldhk", "h k d -> d h k"),
            (_D + "v_ldnu", "h (g u) d -> d (h g) u"),
            (_D + "z_ldnu", "h (g u) d -> d (h g) u"),
        ),
        view="(h c) d -> h c d",
        dim=1,
    ),
    Tensor(
        _DELTA + "in_proj_ba.weight",
        ((_D + "b_ldn", "h g d -> d (h g)"), (_D + "a_ldn", "h g d -> d (h g)")),
        view="(h c) d -> h c d",
        dim=1,
    ),
)
_DELTA_APART = (
    Tensor(
        _DELTA + "in_proj_qkv.weight",
        (
            (_D + "q_ldhk", "(h k) d -> d h k"),
            (_D + "k_ldhk", "(h k) d -> d h k"),
            (_D + "v_ldnu", "(n u) d -> d n u"),
        ),
    ),
    _one(_DELTA + "in_proj_z.weight", _D + "z_ldnu", "(n u) d -> d n u"),
    _one(_DELTA + "in_proj_b.weight", _D + "b_ldn", "n d -> d n"),
    _one(_DELTA + "in_proj_a.weight", _D + "a_ldn", "n d -> d n"),
)


def turns(spec: spec_lib.Spec) -> bool:
    """Whether a folder of this model is written with its experts' inputs first.

    Readers of both forms go by the shape of each tensor, so where gates and up
    projections make a square, the form of transformers 5 must be written.
    """
    turned = spec.family == "qwen3_vl_moe"
    return turned and spec.width != 2 * spec.moe.ffn_width


def table(
    spec: spec_lib.Spec,
    *,
    fused: bool,
    turned: bool = False,
    mtp_fused: bool | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    """{path in our tree: the tensor that holds it} for a model of this kind.

    fused: all experts of a layer are one tensor. turned: with their inputs first.
    mtp_fused: in the layers of the head for further tokens, where that differs.
    whole: each table of n-grams is one tensor.
    """
    query = _GATED_QUERY if spec.output_gate else _PLAIN_QUERY
    experts = _EXPERTS_FUSED if fused else _EXPERTS_APART
    tensors = (
        *_BASE,
        *query,
        *(_EXPERTS_TURNED if turned else experts),
        *_DELTA_BASE,
        *(_DELTA_GROUPED if spec.family == "qwen3_next" else _DELTA_APART),
        *(_REWARDS if spec.head == "reward" else _SCORES),
        *(Tensor(*entry) for entry in names_vision.table(spec)),
        *(Tensor(name, parts) for name, parts in qwen4.tensors(whole=whole)),
    )
    if spec.mtp_layers:
        mtp_fused = fused if mtp_fused is None else mtp_fused
        experts = _EXPERTS_FUSED if mtp_fused else _EXPERTS_APART
        layer = [x for x in (*_BASE, *query, *experts) if x.name.startswith(_LAYER)]
        tensors += (*_MTP, *map(_in_mtp, layer))
    return {key: tensor for tensor in tensors for key, _ in tensor.parts}


def _in_mtp(tensor: Tensor) -> Tensor:
    """The tensor of the head for further tokens that is like one of a layer."""
    name = tensor.name.replace("model.", "mtp.", 1)
    parts = tuple((f"mtp.{key}", pattern) for key, pattern in tensor.parts)
    return dataclasses.replace(tensor, name=name, parts=parts)


def sizes(spec: spec_lib.Spec, key: str) -> dict[str, int]:
    """What the letters of the patterns of a weight stand for."""
    if key.startswith("vision."):
        return names_vision.sizes(spec, key)
    key = key.removeprefix("mtp.")
    out = {"d": spec.width, "v": spec.vocab_size, "f": spec.ffn_width}
    out |= {"o": spec.width, "y": spec.num_classes}
    own = qwen4.sizes(spec, key)
    if own is not None:
        return out | own
    if key.startswith(_D):
        delta = spec.delta
        return out | {
            "h": delta.key_heads,
            "n": delta.value_heads,
            "g": delta.value_heads // delta.key_heads,
            "k": delta.key_width,
            "u": delta.value_width,
            "j": delta.conv_taps,
        }
    if key.startswith(_M):
        width = spec.moe.shared_width if ".shared." in key else spec.moe.ffn_width
        return out | {"e": spec.moe.num_experts, "f": width}
    heads = {"n": spec.num_heads, "h": spec.num_kv_heads, "k": spec.head_width}
    return out | heads | {"r": spec.head_width // 2, "x": 2}


def _dims(side: str) -> list[list[str]]:
    """ "(h k) 1 j" -> [["h", "k"], ["1"], ["j"]]."""
    found = re.findall(r"\(([^)]*)\)|(\w+)", side)
    return [(group or single).split() for group, single in found]


def _shape(side: str, known: dict[str, int]) -> list[int]:
    return [
        math.prod(int(x) if x.isdigit() else known[x] for x in group)
        for group in _dims(side)
    ]


def axes(pattern: str, known: dict[str, int]) -> dict[str, int]:
    """The sizes that einops needs to be told for a pattern; not the rows of a table,
    of which a tensor may hold a part."""
    used = {x for group in _dims(pattern.partition(" -> ")[0]) for x in group} - {"v"}
    return {k: v for k, v in known.items() if k in used}


def cuts(tensor: Tensor, spec: spec_lib.Spec) -> dict[str, slice]:
    """{weight: its stretch of `tensor.dim`}."""
    out, start = {}, 0
    for key, pattern in tensor.parts:
        length = _shape(pattern.partition(" -> ")[0], sizes(spec, key))[tensor.dim]
        out[key] = slice(start, start + length)
        start += length
    return out


def part(whole: tuple[int, ...], place: tuple) -> tuple[int, ...]:
    """The shape of a tensor that may hold some of the rows, by its place in ours."""
    if place and isinstance(place[-1], slice):
        return (place[-1].stop - place[-1].start, *whole[1:])
    return whole


def shape(tensor: Tensor, spec: spec_lib.Spec) -> tuple[int, ...]:
    """The shape of a tensor there."""
    there = view_shape(tensor, spec)
    if not tensor.view:
        return there
    left, _, right = tensor.view.partition(" -> ")
    letters = dict(zip(right.split(), there, strict=True))
    return tuple(_shape(left, letters))


def sides(tensor: Tensor, key: str) -> list[list[list[str]]]:
    """The letters of each dim of a weight's cut there, and of the weight of ours."""
    return [_dims(side) for side in dict(tensor.parts)[key].split(" -> ")]


def view_shape(tensor: Tensor, spec: spec_lib.Spec) -> tuple[int, ...]:
    """The shape of a tensor there in the form that its parts are cut from."""
    key, first = tensor.parts[0]
    there = _shape(first.partition(" -> ")[0], sizes(spec, key))
    there[tensor.dim] = max(cut.stop for cut in cuts(tensor, spec).values())
    return tuple(there)


def window(
    tensor: Tensor, key: str, spec: spec_lib.Spec
) -> tuple[tuple[int, int], ...]:
    """(start, stop) in each dim of what one tensor holds of a weight: all of it."""
    right = dict(tensor.parts)[key].partition(" -> ")[2]
    return tuple((0, size) for size in _shape(right, sizes(spec, key)))


def owners(key: str, spec: spec_lib.Spec) -> tuple[int, ...]:
    """The layers whose tensors a stacked weight is made of, in order."""
    if key.startswith("vision."):
        return names_vision.owners(spec, key)
    if key.startswith("mtp."):
        return tuple(range(spec.mtp_layers))
    stack = key.split(".")[1]
    if stack in spec_lib.STACKS:
        return spec.layers_with(stack)
    return tuple(range(spec.num_layers))


def places(tensor: Tensor, key: str, spec: spec_lib.Spec) -> list[tuple[str, tuple]]:
    """[(name there, index into the weight of ours)] of all tensors of a weight."""
    if "{i}" not in tensor.name:
        return [(tensor.name, ())]
    layers = list(enumerate(owners(key, spec)))
    if key == qwen4.TABLE:
        whole = "{s}" not in tensor.name
        return [
            (tensor.name.replace("{i}", str(i)).replace("{s}", str(n)), (row, part))
            for row, i in layers
            for n, part in enumerate(qwen4.shards(spec, row, whole=whole))
        ]
    if "{e}" not in tensor.name:
        return [(tensor.name.replace("{i}", str(i)), (row,)) for row, i in layers]
    return [
        (tensor.name.replace("{i}", str(i)).replace("{e}", str(e)), (row, e))
        for row, i in layers
        for e in range(spec.moe.num_experts)
    ]
