# SPDX-License-Identifier: Apache-2.0
"""What a Qwen is: one frozen record of sizes and switches, and the published sizes.

Source: config.json of the published checkpoints; sizes of Qwen2 from arXiv 2407.10671
table 1, Qwen2.5 from arXiv 2412.15115 table 1, Qwen3 from arXiv 2505.09388.
`head_width` is the explicit `head_dim` of Qwen3 (128) and width / heads before it.

Units: counts; `rope_theta` is the RoPE base; `norm_eps` is added to a mean square.
Invariants: num_heads is a multiple of num_kv_heads; window 0 means full attention;
`windows[i]` is the window of layer i; `kinds[i]` is all that makes layer i differ from
its neighbours. Vocabulary sizes are the padded table sizes.
Raises: ValueError from `__post_init__`, config.InputError from `get`.
"""

import dataclasses
import math
from typing import Any

from qwen_jax import config

ATTENTION = ("blockwise", "cudnn", "splash")
MIXERS = ("attention", "delta")
EXPERTS = ("auto", "ragged", "blocks", "capacity", "tokamax")
EXCHANGES = ("gather", "all_to_all")
TOWER_NORMS = ("layer", "rms")
TOWER_MLPS = ("quick_gelu", "gelu_tanh", "swiglu")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the trained length are reached.

    kind: "linear" divides positions by `factor`; "yarn" (arXiv 2309.00071) divides the
    low frequencies only and scales attention. `original_positions` is the length the
    base model was trained at. `attention_factor` None means 0.1 ln(factor) + 1.
    """

    kind: str = "linear"
    factor: float = 1.0
    original_positions: int = 32768
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ("linear", "yarn"):
            raise ValueError(f"rope_scaling kind {self.kind!r}: wanted linear or yarn")
        if self.factor < 1:
            raise ValueError(f"rope_scaling factor {self.factor} must be at least 1")


@dataclasses.dataclass(frozen=True)
class MoE:
    """Experts in place of one feed-forward: a router picks some for each token.

    ffn_width: of one expert. shared_width: of the expert that every token meets, behind
    a gate; 0 for none. norm_topk: the picked probabilities are divided by their sum.
    balance_coef, z_coef: weights of the load-balance loss (summed over the global
    batch) and of the router's z-loss in training. impl, capacity_factor: see
    `kernels/experts.py`; exchange: how tokens reach experts on other devices, see
    `moe.py`. These three pick an implementation of the same function.
    """

    num_experts: int = 128
    experts_per_token: int = 8
    ffn_width: int = 768
    shared_width: int = 0
    norm_topk: bool = True
    balance_coef: float = 0.001
    z_coef: float = 0.0
    impl: str = "auto"
    capacity_factor: float = 1.25
    exchange: str = "gather"

    def __post_init__(self):
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token}: wanted 1 to "
                f"num_experts={self.num_experts}"
            )
        if self.ffn_width < 1 or self.shared_width < 0:
            raise ValueError(
                f"moe.ffn_width={self.ffn_width} must be at least 1 and "
                f"moe.shared_width={self.shared_width} at least 0"
            )
        if self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be above 0")
        for name, known in (("impl", EXPERTS), ("exchange", EXCHANGES)):
            if getattr(self, name) not in known:
                hint = config.nearest(getattr(self, name), known)
                raise ValueError(f"moe.{name}={getattr(self, name)!r}{hint}")


@dataclasses.dataclass(frozen=True)
class Delta:
    """Gated delta rule: heads and widths of keys and values, taps of the filter."""

    key_heads: int = 16
    value_heads: int = 32
    key_width: int = 128
    value_width: int = 128
    conv_taps: int = 4

    def __post_init__(self):
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"delta.value_heads={self.value_heads} must be a multiple of "
                f"delta.key_heads={self.key_heads}"
            )
        if self.conv_taps < 2:  # the last inputs tell which segment the state is of
            raise ValueError(f"delta.conv_taps={self.conv_taps} must be at least 2")


@dataclasses.dataclass(frozen=True)
class Vision:
    """The tower that turns patches of images and videos into embeddings of tokens.

    A patch is `temporal_patch` frames of `patch` x `patch` pixels; `merge` x `merge`
    patches become one token. norm: "layer" or "rms"; mlp: "quick_gelu", "gelu_tanh" or
    "swiglu". places: rows of the table of learned positions (a square grid), 0 for
    none. window: side in pixels of the squares inside which patches attend, 0 for all
    of a frame; the layers in `full_layers` attend to all anyway. deepstack: layers
    whose merged outputs are added behind the decoder's first layers, too.
    frame_blocks: whether each frame of a video is a block of tokens of its own.
    tokens_per_second: steps of a video's temporal positions; 0 for one step a frame.
    """

    num_layers: int = 27
    width: int = 1152
    num_heads: int = 16
    ffn_width: int = 4304
    patch: int = 16
    temporal_patch: int = 2
    channels: int = 3
    merge: int = 2
    norm: str = "layer"
    mlp: str = "gelu_tanh"
    patch_bias: bool = True
    places: int = 2304
    window: int = 0
    full_layers: tuple[int, ...] = ()
    deepstack: tuple[int, ...] = ()
    rope_theta: float = 10_000.0
    frame_blocks: bool = True
    tokens_per_second: int = 0
    image_id: int = 151_655
    video_id: int = 151_656
    start_id: int = 151_652
    end_id: int = 151_653

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "patch", "temporal_patch", "merge"):
            if getattr(self, name) < 1:
                raise ValueError(f"vision.{name}={getattr(self, name)}: wanted above 0")
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"vision.width={self.width} over vision.num_heads={self.num_heads} "
                "must be a multiple of 4: heads rotate by rows and by columns"
            )
        if math.isqrt(self.places) ** 2 != self.places:
            raise ValueError(f"vision.places={self.places} is not a square number")
        if self.window and self.window < self.merge * self.patch:
            raise ValueError(
                f"vision.window={self.window} holds no token of "
                f"{self.merge * self.patch} pixels"
            )
        for name in ("full_layers", "deepstack"):
            if any(not 0 <= i < self.num_layers for i in getattr(self, name)):
                raise ValueError(
                    f"vision.{name}={getattr(self, name)}: the layers are 0 to "
                    f"{self.num_layers - 1}"
                )
        for name, known in (("norm", TOWER_NORMS), ("mlp", TOWER_MLPS)):
            if getattr(self, name) not in known:
                hint = config.nearest(getattr(self, name), known)
                raise ValueError(f"vision.{name}={getattr(self, name)!r}{hint}")

    @property
    def patch_numbers(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a layer is: its mixer, the window of its attention, experts or none, and
    whether features of images are added behind it."""

    mixer: str = "attention"
    window: int = 0
    sparse: bool = False
    deep: bool = False


@dataclasses.dataclass(frozen=True)
class Spec:
    """One Qwen. Every field is a fact about the function, none about a run,
    except `attention` and `reduce_dtype`, which pick an implementation of the same one.

    vision: the tower in front, or None. mrope_sections: how many rotated pairs of a
    head turn with the temporal, the row and the column position of a token; they follow
    each other, or alternate where mrope_interleaved.
    reduce_dtype: in which devices sum their parts of a gradient: "compute" (the dtype
    of compute, half the traffic with bfloat16) or "float32" (see mesh.gather). The
    matrices of the layers alone: tables and head are summed in float32 always, biases
    and norms in the dtype of compute.
    """

    family: str = "qwen3"
    vocab_size: int = 151_936
    width: int = 1024
    num_layers: int = 28
    num_heads: int = 16
    num_kv_heads: int = 8
    head_width: int = 128
    ffn_width: int = 3072
    qkv_bias: bool = False
    qk_norm: bool = True
    tie_embedding: bool = True
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    max_positions: int = 40_960
    window: int = 0
    full_layers: int = 0
    mixers: tuple[str, ...] = ("attention",)
    delta: Delta | None = None
    moe: MoE | None = None
    dense_layers: tuple[int, ...] = ()
    output_gate: bool = False
    rotary_share: float = 1.0
    vision: Vision | None = None
    mrope_sections: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    norm_offset: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    reduce_dtype: str = "compute"
    attention: str = "blockwise"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} must be even for RoPE")
        if not self.mixers or set(self.mixers) - set(MIXERS):
            raise ValueError(f"mixers={self.mixers}: wanted some of {MIXERS}")
        if "delta" in self.mixers and self.delta is None:
            raise ValueError("mixers name 'delta', and the group delta is not given")
        if self.rotary_width % 2 or not 0 < self.rotary_share <= 1:
            raise ValueError(
                f"rotary_share={self.rotary_share} of head_width={self.head_width}: "
                "wanted an even number of rotated dims, at most all"
            )
        if self.mrope_sections and (
            len(self.mrope_sections) != 3
            or sum(self.mrope_sections) != self.rotary_width // 2
        ):
            raise ValueError(
                f"mrope_sections={self.mrope_sections}: wanted three numbers that sum "
                f"to {self.rotary_width // 2}, half of the rotated width"
            )
        if self.attention not in ATTENTION:
            raise ValueError(
                f"attention={self.attention!r}"
                f"{config.nearest(self.attention, ATTENTION)}"
            )
        for name in ("param_dtype", "compute_dtype"):
            known = ("float32", "bfloat16", "float16", "float64")
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: wanted one of {known}"
                )
        if self.reduce_dtype not in ("compute", "float32"):
            raise ValueError(
                f"reduce_dtype={self.reduce_dtype!r}: wanted compute or float32"
            )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What each layer is. `mixers` repeats until all layers have one."""
        return tuple(
            Kind(
                mixer=mixer,
                window=self.windows[i] if mixer == "attention" else 0,
                sparse=self.moe is not None and i not in self.dense_layers,
            )
            for i in range(self.num_layers)
            for mixer in [self.mixers[i % len(self.mixers)]]
        )

    def layers_with(self, stack: str) -> tuple[int, ...]:
        """Layers that have weights in a stack: "attention", "delta", "mlp", "moe"."""
        return tuple(i for i, kind in enumerate(self.kinds) if stack in stacks(kind))

    @property
    def rotary_width(self) -> int:
        """Dims of a head that turn with the position: the first ones."""
        return int(self.head_width * self.rotary_share)

    @property
    def windows(self) -> tuple[int, ...]:
        """Sliding window of each layer, 0 for full attention.

        With a window, the first `full_layers` layers still see everything
        (`max_window_layers` in published configs).
        """
        return tuple(
            0 if i < self.full_layers else self.window for i in range(self.num_layers)
        )


def stacks(kind: Kind) -> tuple[str, str]:
    """The two stacks of weights that a layer of this kind takes its own from."""
    return kind.mixer, "moe" if kind.sparse else "mlp"


def _qwen2(width, heads, kv_heads, ffn, layers, *, tie, vocab=151_936, **kw) -> Spec:
    """Qwen2 and Qwen2.5: biases on q, k, v; head width = width / heads."""
    return Spec(
        family="qwen2",
        vocab_size=vocab,
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=width // heads,
        ffn_width=ffn,
        num_layers=layers,
        qkv_bias=True,
        qk_norm=False,
        tie_embedding=tie,
        max_positions=kw.pop("positions", 131_072),
        eos_ids=(151_643,),
        **kw,
    )


def _qwen3(width, heads, kv_heads, ffn, layers, *, tie) -> Spec:
    """Qwen3 dense: norms on q and k heads of width 128, no biases."""
    return Spec(
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_width=ffn,
        num_layers=layers,
        tie_embedding=tie,
        eos_ids=(151_645, 151_643),
    )


def _qwen3_moe(width, heads, kv_heads, ffn, expert, layers, *, theta=1e6) -> Spec:
    """Qwen3 with 128 experts, of which a token meets 8."""
    return dataclasses.replace(
        _qwen3(width, heads, kv_heads, ffn, layers, tie=False),
        family="qwen3_moe",
        rope_theta=theta,
        moe=MoE(num_experts=128, experts_per_token=8, ffn_width=expert),
    )


def _qwen2_vl(width, heads, kv_heads, ffn, layers, *, tie, vocab=152_064) -> Spec:
    """Qwen2-VL: Qwen2 behind a tower of 32 layers, patches of 14 pixels."""
    tower = Vision(
        num_layers=32,
        width=1280,
        ffn_width=5120,
        patch=14,
        mlp="quick_gelu",
        patch_bias=False,
        places=0,
        frame_blocks=False,
    )
    text = _qwen2(
        width, heads, kv_heads, ffn, layers, tie=tie, vocab=vocab, positions=32_768
    )
    return dataclasses.replace(
        text,
        family="qwen2_vl",
        vision=tower,
        mrope_sections=(16, 24, 24),
        eos_ids=(151_645,),
    )


def _qwen2_5_vl(*sizes, tower_ffn=3420, **kw) -> Spec:
    """Qwen2.5-VL: windows in all layers of the tower but four, RMSNorm, SwiGLU."""
    text = _qwen2_vl(*sizes, **kw)
    tower = dataclasses.replace(
        text.vision,
        ffn_width=tower_ffn,
        norm="rms",
        mlp="swiglu",
        window=112,
        full_layers=(7, 15, 23, 31),
        tokens_per_second=2,
    )
    return dataclasses.replace(
        text, family="qwen2_5_vl", vision=tower, max_positions=128_000
    )


def _qwen3_vl(text: Spec, *, small: bool = False) -> Spec:
    """Qwen3-VL: a text model behind a tower with learned positions and DeepStack."""
    tower = Vision(deepstack=(8, 16, 24))
    if small:
        tower = Vision(num_layers=24, width=1024, ffn_width=4096, deepstack=(5, 11, 17))
    return dataclasses.replace(
        text,
        family="qwen3_vl" if text.moe is None else "qwen3_vl_moe",
        vision=tower,
        mrope_sections=(24, 20, 20),
        mrope_interleaved=True,
        rope_theta=5e6,
        max_positions=262_144,
        eos_ids=(151_645,),
    )


_HYBRID = {
    "mixers": ("delta", "delta", "delta", "attention"),
    "head_width": 256,
    "output_gate": True,
    "rotary_share": 0.25,
    "norm_offset": True,
    "rope_theta": 1e7,
    "max_positions": 262_144,
    "eos_ids": (151_645, 151_643),
}


def _qwen3_5(width, heads, kv_heads, layers, *, values, ffn=0, moe=None, tie=False):
    """Qwen3.5 (text): three linear layers, then one gated attention; 16 key heads."""
    return Spec(
        family="qwen3_5" if moe is None else "qwen3_5_moe",
        vocab_size=248_320,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_width=ffn or 1,
        tie_embedding=tie,
        delta=Delta(value_heads=values),
        moe=moe,
        **_HYBRID | {"eos_ids": (248_044,)},
    )


NAMED: dict[str, Spec] = {
    # Qwen2, arXiv 2407.10671 table 1.
    "qwen2-0.5b": _qwen2(896, 14, 2, 4864, 24, tie=True),
    "qwen2-1.5b": _qwen2(1536, 12, 2, 8960, 28, tie=True),
    "qwen2-7b": _qwen2(3584, 28, 4, 18944, 28, tie=False, vocab=152_064),
    "qwen2-72b": _qwen2(8192, 64, 8, 29568, 80, tie=False, vocab=152_064),
    # Qwen2.5, arXiv 2412.15115 table 1.
    "qwen2.5-0.5b": _qwen2(896, 14, 2, 4864, 24, tie=True, positions=32_768),
    "qwen2.5-1.5b": _qwen2(1536, 12, 2, 8960, 28, tie=True),
    "qwen2.5-3b": _qwen2(2048, 16, 2, 11008, 36, tie=True, positions=32_768),
    "qwen2.5-7b": _qwen2(3584, 28, 4, 18944, 28, tie=False, vocab=152_064),
    "qwen2.5-14b": _qwen2(5120, 40, 8, 13824, 48, tie=False, vocab=152_064),
    "qwen2.5-32b": _qwen2(5120, 40, 8, 27648, 64, tie=False, vocab=152_064),
    "qwen2.5-72b": _qwen2(8192, 64, 8, 29568, 80, tie=False, vocab=152_064),
    # Qwen3 dense, arXiv 2505.09388 table 1.
    "qwen3-0.6b": _qwen3(1024, 16, 8, 3072, 28, tie=True),
    "qwen3-1.7b": _qwen3(2048, 16, 8, 6144, 28, tie=True),
    "qwen3-4b": _qwen3(2560, 32, 8, 9728, 36, tie=True),
    "qwen3-8b": _qwen3(4096, 32, 8, 12288, 36, tie=False),
    "qwen3-14b": _qwen3(5120, 40, 8, 17408, 40, tie=False),
    "qwen3-32b": _qwen3(5120, 64, 8, 25600, 64, tie=False),
    # Qwen3 with experts, arXiv 2505.09388 table 2.
    "qwen3-30b-a3b": _qwen3_moe(2048, 32, 4, 6144, 768, 48),
    "qwen3-235b-a22b": _qwen3_moe(4096, 64, 4, 12288, 1536, 94),
    "qwen3-coder-480b-a35b": dataclasses.replace(
        _qwen3_moe(6144, 96, 8, 8192, 2560, 62, theta=1e7),
        moe=MoE(num_experts=160, experts_per_token=8, ffn_width=2560),
        max_positions=262_144,
    ),
    # Qwen2-VL and Qwen2.5-VL, arXiv 2409.12191 and 2502.13923, and their config.json.
    "qwen2-vl-2b": _qwen2_vl(1536, 12, 2, 8960, 28, tie=True, vocab=151_936),
    "qwen2-vl-7b": _qwen2_vl(3584, 28, 4, 18944, 28, tie=False),
    "qwen2-vl-72b": _qwen2_vl(8192, 64, 8, 29568, 80, tie=False),
    "qwen2.5-vl-3b": _qwen2_5_vl(2048, 16, 2, 11008, 36, tie=True, vocab=151_936),
    "qwen2.5-vl-7b": _qwen2_5_vl(3584, 28, 4, 18944, 28, tie=False),
    "qwen2.5-vl-32b": _qwen2_5_vl(5120, 40, 8, 27648, 64, tie=False, tower_ffn=3456),
    "qwen2.5-vl-72b": _qwen2_5_vl(8192, 64, 8, 29568, 80, tie=False, tower_ffn=3456),
    # Qwen3-VL, arXiv 2511.21631 and the config.json of the published checkpoints.
    "qwen3-vl-2b": _qwen3_vl(_qwen3(2048, 16, 8, 6144, 28, tie=True), small=True),
    "qwen3-vl-4b": _qwen3_vl(_qwen3(2560, 32, 8, 9728, 36, tie=True), small=True),
    "qwen3-vl-8b": _qwen3_vl(_qwen3(4096, 32, 8, 12288, 36, tie=False)),
    "qwen3-vl-32b": _qwen3_vl(_qwen3(5120, 64, 8, 25600, 64, tie=False)),
    "qwen3-vl-30b-a3b": _qwen3_vl(_qwen3_moe(2048, 32, 4, 6144, 768, 48)),
    "qwen3-vl-235b-a22b": _qwen3_vl(_qwen3_moe(4096, 64, 4, 12288, 1536, 94)),
    # Qwen1.5 and Qwen2 with experts, arXiv 2407.10671 table 1.
    "qwen1.5-moe-a2.7b": dataclasses.replace(
        _qwen2(2048, 16, 16, 5632, 24, tie=False, positions=8192),
        family="qwen2_moe",
        moe=MoE(60, 4, 1408, shared_width=5632, norm_topk=False),
    ),
    "qwen2-57b-a14b": dataclasses.replace(
        _qwen2(3584, 28, 4, 18944, 28, tie=False, vocab=151_936),
        family="qwen2_moe",
        moe=MoE(64, 8, 2560, shared_width=20_480, norm_topk=False),
    ),
    # Qwen3-Next, config.json of the published checkpoint.
    "qwen3-next-80b-a3b": Spec(
        family="qwen3_next",
        width=2048,
        num_layers=48,
        num_heads=16,
        num_kv_heads=2,
        ffn_width=5120,
        tie_embedding=False,
        delta=Delta(),
        moe=MoE(512, 10, 512, shared_width=512),
        **_HYBRID,
    ),
    # Qwen3.5 (text), config.json of the published checkpoints.
    "qwen3.5-0.8b": _qwen3_5(1024, 8, 2, 24, values=16, ffn=3584, tie=True),
    "qwen3.5-2b": _qwen3_5(2048, 8, 2, 24, values=16, ffn=6144, tie=True),
    "qwen3.5-4b": _qwen3_5(2560, 16, 4, 32, values=32, ffn=9216, tie=True),
    "qwen3.5-9b": _qwen3_5(4096, 16, 4, 32, values=32, ffn=12_288),
    "qwen3.5-27b": _qwen3_5(5120, 24, 4, 64, values=48, ffn=17_408),
    "qwen3.5-35b-a3b": _qwen3_5(
        2048, 16, 2, 40, values=32, moe=MoE(256, 8, 512, shared_width=512)
    ),
    "qwen3.5-122b-a10b": _qwen3_5(
        3072, 32, 2, 48, values=64, moe=MoE(256, 8, 1024, shared_width=1024)
    ),
    "qwen3.5-397b-a17b": _qwen3_5(
        4096, 32, 2, 60, values=64, moe=MoE(512, 10, 1024, shared_width=1024)
    ),
}


def get(name: str, **changes: Any) -> Spec:
    """A published size by name, with fields replaced.

    Raises:
      config.InputError: unknown name (with the nearest) or field.
    """
    if name not in NAMED:
        raise config.InputError(f"model {name!r}{config.nearest(name, NAMED)}")
    values = config.merge(config.thaw(NAMED[name]), changes)
    return config.freeze(Spec, values, at="model")
