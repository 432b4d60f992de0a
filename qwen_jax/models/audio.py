# SPDX-License-Identifier: Apache-2.0
"""The audio towers of Qwen2-Audio and Qwen2.5-Omni: mel features in, embeddings out.

    tower, heard = audio.load("DIR", dtype="float32")          # the tower
    spec, params = models.load("DIR", dtype="float32")         # the text model
    logits_btv = audio.forward(
        spec, params, tower, heard, tokens_bt, sounds=features.arrays
    )

x = gelu(conv(mels)); x = gelu(conv(x)) at half the rate; x += places; for each layer:
x += attention(norm(x)); x += mlp(norm(x)), both ways over the frames of the sound; then
means of pairs of frames, a norm, and a map to the decoder's width.
Source: Qwen2-Audio (arXiv 2407.10759), transformers 5.23 `Qwen2AudioEncoder`; the tower
is Whisper's encoder (arXiv 2212.04356) with the means before the last norm. The one of
Qwen2.5-Omni (arXiv 2503.20215, `Qwen2_5OmniAudioEncoder`) is the same on chunks of
frames, each by itself, with sines for places; its text model is not loaded here.
Not here: the tower of Qwen3-Omni, which begins with other convolutions.

Shapes: sounds = {"mels": float32 [n, z, t], "lengths": int32 [n]} as `data.audio`
gives, all rows' sounds in the order of their placeholders, t = 2 * places (any t
with chunks); -> features_nmo, of which the first `num_tokens(lengths)` of each sound
count.
Letters besides those of `dims`: n sounds, z mel bands, w input width, o width of the
decoder, r heads of the tower; t frames; j taps.
Raises: config.InputError for another tower, a missing or misshapen tensor, features of
a wrong shape, another number of placeholders than of features (where the values are
known, that is outside of jit). Inside jit a placeholder without a feature gets NaN.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from einops import EinopsError, rearrange

from qwen_jax import config
from qwen_jax import params as params_lib
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib
from qwen_jax.params import Param, normal, ones, zeros

EPS = 1e-5
TAPS = 3


@dataclasses.dataclass(frozen=True)
class Tower:
    """What the tower is; the defaults are those of Qwen2-Audio-7B.

    chunk: mel frames that are encoded together, 0 for all; with chunks places are sines
    and not learned.
    """

    bands: int = 128
    num_layers: int = 32
    width: int = 1280
    num_heads: int = 20
    ffn_width: int = 5120
    places: int = 1500  # frames after the convolutions, of a chunk where there are
    chunk: int = 0
    out_width: int = 4096
    audio_id: int = 151_646
    init_std: float = 0.02
    param_dtype: str = "float32"
    compute_dtype: str = "float32"

    def __post_init__(self):
        for name in ("bands", "num_layers", "width", "num_heads", "places"):
            if getattr(self, name) < 1:
                raise ValueError(f"audio.{name}={getattr(self, name)}: wanted above 0")
        if self.width % self.num_heads:
            raise ValueError(
                f"audio.width={self.width} is not divisible by "
                f"audio.num_heads={self.num_heads}"
            )
        if self.places % 2 or self.chunk not in (0, 2 * self.places):
            raise ValueError(
                f"audio.places={self.places}, audio.chunk={self.chunk}: wanted an even "
                "number, and twice that or 0"
            )
        if self.chunk and self.width % 2:
            raise ValueError(f"audio.width={self.width}: wanted an even number")


def tower_params(tower: Tower) -> dict[str, Any]:
    """The declaration tree of the tower."""
    init, layers, d = normal(tower.init_std), tower.num_layers, tower.width
    r, f, o = tower.num_heads, tower.ffn_width, tower.out_width
    k = d // r

    def stacked(shape, dims, how):
        return Param((layers, *shape), ("layers", *dims), how)

    tree: dict[str, Any] = {
        "conv1_jzd": Param((TAPS, tower.bands, d), (None, None, "embed"), init),
        "conv1_bias_d": Param((d,), (None,), zeros),
        "conv2_jwd": Param((TAPS, d, d), (None, None, "embed"), init),
        "conv2_bias_d": Param((d,), (None,), zeros),
        "norm_d": Param((d,), (None,), ones),
        "norm_bias_d": Param((d,), (None,), zeros),
        "project_do": Param((d, o), ("embed", None), init),
        "project_bias_o": Param((o,), (None,), zeros),
    }
    if not tower.chunk:
        tree["place_td"] = Param((tower.places, d), (None, "embed"), init)
    part = {
        "o_lrkd": stacked((r, k, d), ("heads", None, "embed"), init),
        "o_bias_ld": stacked((d,), (None,), zeros),
        "up_ldf": stacked((d, f), ("embed", "ffn"), init),
        "up_bias_lf": stacked((f,), ("ffn",), zeros),
        "down_lfd": stacked((f, d), ("ffn", "embed"), init),
        "down_bias_ld": stacked((d,), (None,), zeros),
    }
    for name in "qkv":
        part[f"{name}_ldrk"] = stacked((d, r, k), ("embed", "heads", None), init)
        if name != "k":  # a bias of all keys would shift all scores alike
            part[f"{name}_bias_lrk"] = stacked((r, k), ("heads", None), zeros)
    for name in ("attention_norm", "mlp_norm"):
        part[f"{name}_ld"] = stacked((d,), (None,), ones)
        part[f"{name}_bias_ld"] = stacked((d,), (None,), zeros)
    return tree | {"layers": part}


# --- from a folder ---

_LAYER = "audio_tower.layers.{i}."
# Our weight -> (the tensor there, the einops pattern from there to here)
NAMES = {
    "conv1_jzd": ("audio_tower.conv1.weight", "d z j -> j z d"),
    "conv1_bias_d": ("audio_tower.conv1.bias", "d -> d"),
    "conv2_jwd": ("audio_tower.conv2.weight", "d w j -> j w d"),
    "conv2_bias_d": ("audio_tower.conv2.bias", "d -> d"),
    "place_td": ("audio_tower.embed_positions.weight", "t d -> t d"),
    "norm_d": ("audio_tower.layer_norm.weight", "d -> d"),
    "norm_bias_d": ("audio_tower.layer_norm.bias", "d -> d"),
    "project_do": ("multi_modal_projector.linear.weight", "o d -> d o"),
    "project_bias_o": ("multi_modal_projector.linear.bias", "o -> o"),
    "layers.q_ldrk": (_LAYER + "self_attn.q_proj.weight", "(r k) d -> d r k"),
    "layers.k_ldrk": (_LAYER + "self_attn.k_proj.weight", "(r k) d -> d r k"),
    "layers.v_ldrk": (_LAYER + "self_attn.v_proj.weight", "(r k) d -> d r k"),
    "layers.q_bias_lrk": (_LAYER + "self_attn.q_proj.bias", "(r k) -> r k"),
    "layers.v_bias_lrk": (_LAYER + "self_attn.v_proj.bias", "(r k) -> r k"),
    "layers.o_lrkd": (_LAYER + "self_attn.out_proj.weight", "d (r k) -> r k d"),
    "layers.o_bias_ld": (_LAYER + "self_attn.out_proj.bias", "d -> d"),
    "layers.attention_norm_ld": (_LAYER + "self_attn_layer_norm.weight", "d -> d"),
    "layers.attention_norm_bias_ld": (_LAYER + "self_attn_layer_norm.bias", "d -> d"),
    "layers.mlp_norm_ld": (_LAYER + "final_layer_norm.weight", "d -> d"),
    "layers.mlp_norm_bias_ld": (_LAYER + "final_layer_norm.bias", "d -> d"),
    "layers.up_ldf": (_LAYER + "fc1.weight", "f d -> d f"),
    "layers.up_bias_lf": (_LAYER + "fc1.bias", "f -> f"),
    "layers.down_lfd": (_LAYER + "fc2.weight", "d f -> f d"),
    "layers.down_bias_ld": (_LAYER + "fc2.bias", "d -> d"),
}
# Where Qwen2.5-Omni calls them otherwise.
OMNI_NAMES = NAMES | {
    "norm_d": ("audio_tower.ln_post.weight", "d -> d"),
    "norm_bias_d": ("audio_tower.ln_post.bias", "d -> d"),
    "project_do": ("audio_tower.proj.weight", "o d -> d o"),
    "project_bias_o": ("audio_tower.proj.bias", "o -> o"),
}


def names(tower: Tower) -> dict[str, tuple[str, str]]:
    """Our weight -> (its name there, pattern) for a tower of this kind."""
    return OMNI_NAMES if tower.chunk else NAMES


# Marks of begin and end, which the thinker takes from its table of tokens instead.
UNUSED = ("audio_tower.audio_bos_eos_token.weight",)
_FIELDS = {
    "bands": "num_mel_bins",
    "num_layers": "encoder_layers",
    "width": "d_model",
    "num_heads": "encoder_attention_heads",
    "ffn_width": "encoder_ffn_dim",
    "places": "max_source_positions",
    "init_std": "initializer_range",
}


def tower_from_config(raw: dict[str, Any], **changes: Any) -> Tower:
    """The Tower that a config.json of Qwen2-Audio or of Qwen2.5-Omni tells."""
    family = raw.get("model_type")
    if family == "qwen2_5_omni":
        raw = raw.get("thinker_config") or {}
    elif family not in ("qwen2_audio", "qwen2_5_omni_thinker"):
        raise config.InputError(
            f"model_type {family!r} has no tower of this kind; wanted 'qwen2_audio', "
            "'qwen2_5_omni' or 'qwen2_5_omni_thinker'"
        )
    part = raw.get("audio_config") or {}
    act = part.get("activation_function", "gelu")
    if act != "gelu" or part.get("scale_embedding"):
        raise config.InputError(
            f"audio_config: activation_function {act!r}, scale_embedding "
            f"{part.get('scale_embedding')!r}; wanted 'gelu' and false"
        )
    values = {ours: part[t] for ours, t in _FIELDS.items() if part.get(t) is not None}
    if family == "qwen2_audio":
        width = (raw.get("text_config") or {}).get("hidden_size", 4096)
        more = {"out_width": width}
    else:
        places = part.get("n_window", 100)
        more = {"places": places, "out_width": part.get("output_dim", 3584)}
        more["chunk"] = 2 * places if isinstance(places, int) else places
    more["audio_id"] = raw.get("audio_token_index", Tower.audio_id)
    return config.freeze(Tower, values | more | changes, at="audio")


def load(
    folder: str | os.PathLike, *, dtype: str | None = None
) -> tuple[Tower, dict[str, Any]]:
    """The tower of a Hugging Face folder and its weights, in `dtype` or its own."""
    folder = pathlib.Path(folder)
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise config.InputError(f"{folder}: config.json: {error}") from None
    dtype = dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32"
    tower = tower_from_config(raw, param_dtype=dtype, compute_dtype=dtype)
    files = _files(folder)
    table, left = names(tower), set(files) - set(UNUSED)

    def read(path, p: Param):
        name, pattern = table[".".join(part.key for part in path)]
        stacked = "{i}" in name
        wanted = p.shape[1:] if stacked else p.shape
        found = []
        for i in range(p.shape[0] if stacked else 1):
            full = name.format(i=i)
            left.discard(full)
            found.append(_brought_in(files, full, pattern, wanted, tower, folder))
        whole = np.stack(found) if stacked else found[0]
        return jnp.asarray(whole.astype(jnp.dtype(dtype)))

    weights = jax.tree_util.tree_map_with_path(
        read, tower_params(tower), is_leaf=params_lib.is_param
    )
    if left:
        raise config.InputError(
            f"{folder}: {len(left)} tensors belong to no weight of the tower: "
            f"{', '.join(sorted(left)[:3])}"
        )
    return tower, weights


def _files(folder: pathlib.Path) -> dict[str, tuple[Any, str]]:
    """{name of a tensor of a tower: (its file, its name in it)}."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise config.InputError(f"{path}: {error}") from None
        for there in file.keys():
            name = there.removeprefix("thinker.")
            if name.startswith(("audio_tower.", "multi_modal_projector.")):
                found[name] = file, there
    return found


def _brought_in(files, name, pattern, wanted, tower, folder) -> np.ndarray:
    if name not in files:
        raise config.InputError(f"{folder}: no tensor {name!r}")
    file, there = files[name]
    tensor = file.get_tensor(there)
    heads = {"r": tower.num_heads} if "(r k)" in pattern else {}
    try:
        out = rearrange(tensor, pattern, **heads)
    except EinopsError:
        out = None
    if out is None or out.shape != wanted:
        raise config.InputError(
            f"{folder}: tensor {name!r} has shape {tensor.shape}, which config.json "
            "tells otherwise"
        )
    return out


# --- the function ---


def num_tokens(length: Any) -> Any:
    """How many embeddings a sound of `length` frames gives (an array or a number)."""
    return ((length - 1) // 2 + 1 - 2) // 2 + 1


def _convolved(x_ntw, w_jwd, bias_d, stride):
    """A convolution of three taps, zeros at the ends, as one product."""
    frames = x_ntw.shape[1]
    padded = jnp.pad(x_ntw, ((0, 0), (1, 1), (0, 0)))
    taps = [padded[:, j : j + frames : stride] for j in range(TAPS)]
    y_ntd = jnp.einsum("ntjw,jwd->ntd", jnp.stack(taps, axis=2), w_jwd)
    return y_ntd + bias_d[None, None]


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _layer_norm(x, weight_d, bias_d):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPS)
    shape = (1,) * (x.ndim - 1) + weight_d.shape
    return (wide * weight_d.reshape(shape) + bias_d.reshape(shape)).astype(x.dtype)


def _attention(p, x_td, real_t):
    """One sound; frames see all frames of the sound."""
    k = p["q_ldrk"].shape[-1]
    q_trk = jnp.einsum("td,drk->trk", x_td, p["q_ldrk"]) + p["q_bias_lrk"][None]
    k_srk = jnp.einsum("sd,drk->srk", x_td, p["k_ldrk"])
    v_srk = jnp.einsum("sd,drk->srk", x_td, p["v_ldrk"]) + p["v_bias_lrk"][None]
    wide = jnp.promote_types(x_td.dtype, jnp.float32)
    scores_rts = jnp.einsum(
        "trk,srk->rts", q_trk * k**-0.5, k_srk, preferred_element_type=wide
    )
    scores_rts = jnp.where(real_t[None, None], scores_rts, jnp.finfo(wide).min)
    share_rts = jax.nn.softmax(scores_rts, axis=-1).astype(x_td.dtype)
    y_trk = jnp.einsum("rts,srk->trk", share_rts, v_srk)
    return jnp.einsum("trk,rkd->td", y_trk, p["o_lrkd"]) + p["o_bias_ld"][None]


def sines(places: int, width: int) -> np.ndarray:
    """[t, d]: sin(t f) for one half of d, cos(t f) for the other, f from 1 to 1e-4."""
    inverse = np.exp(-np.log(10_000) * np.arange(width // 2) / (width // 2 - 1))
    angle_td = np.arange(places)[:, None] * inverse[None]
    return np.concatenate([np.sin(angle_td), np.cos(angle_td)], axis=1)


def _chunks(tower: Tower, mels_nzt, lengths_n):
    """Chunks [n * c, z, chunk] of sounds, silent (zero) behind their ends, and how many
    frames of each chunk are sound."""
    n, z, t = mels_nzt.shape
    count = -(-t // tower.chunk)
    mels_nzt = jnp.pad(mels_nzt, ((0, 0), (0, 0), (0, count * tower.chunk - t)))
    chunks = mels_nzt.reshape(n, z, count, tower.chunk).transpose(0, 2, 1, 3)
    starts_1c = jnp.arange(count)[None] * tower.chunk
    lengths_nc = jnp.clip(lengths_n[:, None] - starts_1c, 0, tower.chunk)
    lengths_n = lengths_nc.reshape(-1)
    real = jnp.arange(tower.chunk)[None] < lengths_n[:, None]
    chunks = chunks.reshape(n * count, z, tower.chunk)
    return jnp.where(real[:, None], chunks, 0), lengths_n, real


def encode(
    tower: Tower, p: dict[str, Any], mels_nzt: jax.Array, lengths_n: jax.Array
) -> jax.Array:
    """Embeddings [n, m, o], a quarter of the frames; of each sound the first
    `num_tokens` count."""
    dtype, sounds = jnp.dtype(tower.compute_dtype), len(mels_nzt)
    p = jax.tree.map(lambda w: w.astype(dtype), p)
    if tower.chunk:
        mels_nzt, lengths_n, real_nt = _chunks(tower, jnp.asarray(mels_nzt), lengths_n)
    x_ntz = jnp.swapaxes(mels_nzt, 1, 2).astype(dtype)
    x_ntd = _gelu(_convolved(x_ntz, p["conv1_jzd"], p["conv1_bias_d"], 1))
    if tower.chunk:
        x_ntd = jnp.where(real_nt[..., None], x_ntd, 0)
        places_td = jnp.asarray(sines(tower.places, tower.width), dtype)
    else:
        places_td = p["place_td"]
    x_ntd = _gelu(_convolved(x_ntd, p["conv2_jwd"], p["conv2_bias_d"], 2))
    x_ntd = x_ntd + places_td[None]
    real_nt = jnp.arange(tower.places)[None] < ((lengths_n - 1) // 2 + 1)[:, None]

    def layer(x_ntd, p):
        y_ntd = _layer_norm(x_ntd, p["attention_norm_ld"], p["attention_norm_bias_ld"])
        # One sound after another: the scores of all would be gigabytes.
        x_ntd += jax.lax.map(lambda args: _attention(p, *args), (y_ntd, real_nt))
        y_ntd = _layer_norm(x_ntd, p["mlp_norm_ld"], p["mlp_norm_bias_ld"])
        y_ntf = jnp.einsum("ntd,df->ntf", y_ntd, p["up_ldf"])
        y_ntf = _gelu(y_ntf + p["up_bias_lf"][None, None])
        y_ntd = jnp.einsum("ntf,fd->ntd", y_ntf, p["down_lfd"])
        return x_ntd + y_ntd + p["down_bias_ld"][None, None], None

    x_ntd, _ = jax.lax.scan(layer, x_ntd, p["layers"])
    pairs = x_ntd.reshape(sounds, -1, 2, tower.width)
    x_nmd = _layer_norm(jnp.mean(pairs, axis=2), p["norm_d"], p["norm_bias_d"])
    y_nmo = jnp.einsum("nmd,do->nmo", x_nmd, p["project_do"])
    return y_nmo + p["project_bias_o"][None, None]


def check(tower: Tower, tokens_bt: Any, sounds: dict[str, Any]) -> None:
    """Compare features with the tower and the tokens.

    Raises:
      config.InputError: see the module docstring.
    """
    missing = {"mels", "lengths"} - set(sounds)
    if missing:
        raise config.InputError(
            f"sounds lack {', '.join(sorted(missing))}: wanted mels and lengths"
        )
    shape, n = np.shape(sounds["mels"]), np.shape(sounds["lengths"])
    frames = shape[-1] if tower.chunk and shape else 2 * tower.places
    if shape[1:] != (tower.bands, frames) or n != shape[:1]:
        raise config.InputError(
            f"mels of shape {shape} with lengths of shape {n}: wanted [n, "
            f"{tower.bands}, {frames}] and [n], from data.audio with the settings of "
            "the model's folder"
        )
    known = (tokens_bt, sounds["lengths"])
    if any(isinstance(x, jax.core.Tracer) for x in known):
        return
    lengths = np.asarray(sounds["lengths"])
    if n[0] and not (lengths.min() >= 3 and lengths.max() <= shape[2]):
        raise config.InputError(
            f"lengths from {lengths.min()} to {lengths.max()}: wanted 3 to {shape[2]}"
        )
    wanted = int(num_tokens(lengths).sum())
    found = int((np.asarray(tokens_bt) == tower.audio_id).sum())
    if wanted != found:
        raise config.InputError(
            f"tokens have {found} placeholders (id {tower.audio_id}), sounds give "
            f"{wanted} embeddings"
        )


def forward(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tower: Tower,
    heard: dict[str, Any],
    tokens_bt: jax.Array,
    *,
    sounds: dict[str, Any],
    **how: Any,
) -> jax.Array:
    """Logits [b, t, v] of the text model with embeddings of sounds at the placeholders.

    The embeddings go behind the rows of the table, and placeholders become their
    numbers, so the decoder needs to know nothing of them.

    Args:
      spec: the text model.
      params: its weights.
      tower: the tower.
      heard: its weights.
      tokens_bt: int32 [b, t].
      sounds: see the module docstring.
      how: as for `decoder.hidden`: positions, segments, rules, loop, remat.
    """
    check(tower, tokens_bt, sounds)
    lengths_n = jnp.asarray(sounds["lengths"])
    out_nmo = encode(tower, heard, jnp.asarray(sounds["mels"]), lengths_n)
    rows_o = out_nmo.reshape(-1, tower.out_width)
    table_vd = params["embed_vd"]
    nothing = jnp.full((1, tower.out_width), jnp.nan, table_vd.dtype)
    table_vd = jnp.concatenate([table_vd, rows_o.astype(table_vd.dtype), nothing])
    # The numbers of the embeddings that count, in order; then the row of NaN.
    m = out_nmo.shape[1]
    counts_nm = jnp.arange(m)[None] < num_tokens(lengths_n)[:, None]
    order = jnp.argsort(~counts_nm.reshape(-1), stable=True)
    here_bt = tokens_bt == tower.audio_id
    ordinal_bt = (jnp.cumsum(here_bt.reshape(-1)) - 1).reshape(here_bt.shape)
    row_bt = order[jnp.clip(ordinal_bt, 0, len(order) - 1)]
    row_bt = jnp.where(ordinal_bt < counts_nm.sum(), row_bt, len(rows_o))
    tokens_bt = jnp.where(here_bt, len(params["embed_vd"]) + row_bt, tokens_bt)
    with_sounds = params | {"embed_vd": table_vd}
    x_btd, _ = decoder.hidden(spec, with_sounds, tokens_bt, **how)
    return decoder.logits(spec, params, x_btd, how.get("rules"))
