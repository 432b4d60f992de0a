# SPDX-License-Identifier: Apache-2.0
"""What a Qwen is: one frozen record of sizes and switches.

Source: config.json of the published checkpoints; see `sizes` for theirs.
`head_width` is the explicit `head_dim` of Qwen3 (128) and width / heads before it.

Units: counts; `rope_theta` is the RoPE base; `norm_eps` is added to a mean square.
Invariants: num_heads is a multiple of num_kv_heads; window 0 means full attention;
`windows[i]` is the window of layer i; `kinds[i]` is all that makes layer i differ from
its neighbours. Vocabulary sizes are the padded table sizes.
Raises: ValueError from `__post_init__`.
"""

import dataclasses
import math

from qwen_jax import config

ATTENTION = ("blockwise", "cudnn", "splash")
MIXERS = ("attention", "delta")
STACKS = (*MIXERS, "mlp", "moe", "ngram")
EXPERTS = ("auto", "ragged", "blocks", "capacity", "tokamax")
EXCHANGES = ("gather", "all_to_all")
HEADS = ("tokens", "none", "classes", "token_classes", "reward")
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
    `kernels/experts.py`; exchange: how tokens reach experts on other devices, pieces:
    in how many parts, one after another, a device's tokens go through them, see
    `moe.py`. These four pick an implementation of the same function.
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
    pieces: int = 1

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
        if self.pieces < 1:
            raise ValueError(f"moe.pieces={self.pieces} must be at least 1")
        for name, known in (("impl", EXPERTS), ("exchange", EXCHANGES)):
            if getattr(self, name) not in known:
                hint = config.nearest(getattr(self, name), known)
                raise ValueError(f"moe.{name}={getattr(self, name)!r}{hint}")


@dataclasses.dataclass(frozen=True)
class Delta:
    """Gated delta rule: heads and widths of keys and values, taps of the filter, and
    what the output gate is put through."""

    key_heads: int = 16
    value_heads: int = 32
    key_width: int = 128
    value_width: int = 128
    conv_taps: int = 4
    gate: str = "silu"

    def __post_init__(self):
        if self.gate not in ("silu", "sigmoid"):
            raise ValueError(f"delta.gate={self.gate!r}: wanted silu or sigmoid")
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"delta.value_heads={self.value_heads} must be a multiple of "
                f"delta.key_heads={self.key_heads}"
            )
        if self.conv_taps < 2:  # the last inputs tell which segment the state is of
            raise ValueError(f"delta.conv_taps={self.conv_taps} must be at least 2")


@dataclasses.dataclass(frozen=True)
class DualChunk:
    """Dual chunk attention (see dual_chunk.py): the trained length, how far a query
    sees true distances into the chunk before its own, and the length from which scores
    are tempered (0: never)."""

    chunk_size: int = 262_144
    local_size: int = 8192
    original_positions: int = 0

    def __post_init__(self):
        if not 0 < self.local_size < self.chunk_size or self.original_positions < 0:
            raise ValueError(
                f"dual_chunk: local_size={self.local_size} must be above 0 and below "
                f"chunk_size={self.chunk_size}, original_positions="
                f"{self.original_positions} at least 0"
            )

    @property
    def stride(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size


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
class Streams:
    """Several residual streams, mixed into each block and injected with its output
    through gates of a low rank: see `streams.py`. They stand for the norms, too."""

    count: int = 4
    rank: int = 320

    def __post_init__(self):
        if self.count < 2 or self.rank < 1:
            raise ValueError(
                f"streams.count={self.count} must be at least 2 and "
                f"streams.rank={self.rank} at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Indexed:
    """Attention over chosen blocks of keys: see `indexed.py`.

    heads, width: of the index. ratio: keys in a block. budget: keys in the blocks that
    a query may choose; the block it stands in comes on top.
    """

    heads: int = 4
    width: int = 128
    budget: int = 2048
    ratio: int = 4

    def __post_init__(self):
        for name in ("heads", "width", "budget", "ratio"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"indexed.{name}={getattr(self, name)} must be at least 1"
                )
        if self.budget % self.ratio:
            raise ValueError(
                f"indexed.budget={self.budget} must be a multiple of "
                f"indexed.ratio={self.ratio}"
            )


@dataclasses.dataclass(frozen=True)
class Ngram:
    """Embeddings of the last few tokens, added in some layers: see `ngram.py`.

    layers: which, the first is 0. size: tokens of the longest n-gram; there are `heads`
    hashes for each length from 2 on, each into a table of its own with a prime number
    of rows, `base` or more; together their rows are a multiple of `multiple`. width: of
    the looked-up rows of all hashes, joined. taps: of the convolution. seed: of the
    multipliers. eos_id: no n-gram reaches across it. shards: files' tensors of a table.
    """

    layers: tuple[int, ...] = ()
    size: int = 3
    heads: int = 8
    width: int = 2560
    taps: int = 4
    base: int = 20_000_000
    multiple: int = 128
    seed: int = 1234
    eos_id: int = 0
    shards: int = 128

    def __post_init__(self):
        for name in ("heads", "width", "taps", "multiple", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"ngram.{name}={getattr(self, name)} must be at least 1"
                )
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"ngram.layers={self.layers}: wanted some, each once, in order"
            )
        if self.size < 2 or not 2 <= self.base < 2**27:
            raise ValueError(
                f"ngram.size={self.size} must be at least 2 and "
                f"ngram.base={self.base} from 2 to 2^27"
            )
        if self.width % self.tables:
            raise ValueError(
                f"ngram.width={self.width} must be a multiple of the "
                f"{self.tables} hashes (size - 1) * heads"
            )

    @property
    def tables(self) -> int:
        """Hashes of a token, and tables of a layer."""
        return (self.size - 1) * self.heads


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a layer is: its mixer, the window of its attention, experts or none, n-gram
    embeddings or none, and whether features of images are added behind it."""

    mixer: str = "attention"
    window: int = 0
    sparse: bool = False
    deep: bool = False
    ngram: bool = False


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

    head: what stands on the last norm: "tokens" (logits of the vocabulary), "none"
    (an embedding model), or scores of `num_classes`, by a matrix from the last token
    of a document ("classes") or from each ("token_classes"), or by two matrices with
    a ReLU between them from each ("reward"); see heads.py. head_bias: of "classes" and
    "token_classes". mtp_layers: of the head that predicts further tokens, see mtp.py.
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
    head: str = "tokens"
    num_classes: int = 0
    head_bias: bool = False
    mtp_layers: int = 0
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    dual_chunk: DualChunk | None = None
    max_positions: int = 40_960
    window: int = 0
    full_layers: int = 0
    mixers: tuple[str, ...] = ("attention",)
    delta: Delta | None = None
    moe: MoE | None = None
    dense_layers: tuple[int, ...] = ()
    streams: Streams | None = None
    indexed: Indexed | None = None
    ngram: Ngram | None = None
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
    pad_id: int | None = None

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
        self._check_parts()
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
        if self.dual_chunk and (self.window or self.rope_scaling):
            raise ValueError(
                "dual_chunk stands for itself: with it window must be 0 and "
                "rope_scaling not given"
            )
        _check_head(self)

    def _check_parts(self) -> None:
        """What indexed attention and n-gram embeddings want of the rest."""
        if self.indexed is not None:
            if self.window:
                raise ValueError(
                    f"window={self.window} with indexed attention: wanted 0"
                )
            if self.rotary_width > self.indexed.width:
                raise ValueError(
                    f"indexed.width={self.indexed.width} must be at least the "
                    f"{self.rotary_width} dims of a head that turn"
                )
            if self.dual_chunk is not None:
                raise ValueError("indexed attention and dual_chunk: wanted one of them")
        both = self.indexed is not None or self.streams is not None
        if both and (self.mtp_layers or self.vision is not None):
            raise ValueError(
                f"mtp_layers={self.mtp_layers}, vision={self.vision}: with streams or "
                "indexed attention wanted 0 and None"
            )
        if self.ngram is None:
            return
        if self.streams is None:
            raise ValueError("the group ngram is given, and the group streams is not")
        delta = [i for i, kind in enumerate(self.kinds) if kind.mixer == "delta"]
        if set(self.ngram.layers) - set(delta):
            raise ValueError(
                f"ngram.layers={self.ngram.layers}: wanted some of the layers that mix "
                f"with delta, {tuple(delta)}"
            )
        if not 0 <= self.ngram.eos_id < self.vocab_size:
            raise ValueError(
                f"ngram.eos_id={self.ngram.eos_id}: wanted 0 to {self.vocab_size - 1}"
            )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What each layer is. `mixers` repeats until all layers have one."""
        return tuple(
            Kind(
                mixer=mixer,
                window=self.windows[i] if mixer == "attention" else 0,
                sparse=self.moe is not None and i not in self.dense_layers,
                ngram=self.ngram is not None and i in self.ngram.layers,
            )
            for i in range(self.num_layers)
            for mixer in [self.mixers[i % len(self.mixers)]]
        )

    @property
    def mtp_kinds(self) -> tuple[Kind, ...]:
        """What each layer of the head for further tokens is: full attention."""
        return (Kind(sparse=self.moe is not None),) * self.mtp_layers

    def layers_with(self, stack: str) -> tuple[int, ...]:
        """Layers that have weights in a stack, one of `STACKS`."""
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


def _check_head(spec: Spec) -> None:
    if spec.head not in HEADS:
        raise ValueError(f"head={spec.head!r}{config.nearest(spec.head, HEADS)}")
    scores = spec.head not in ("tokens", "none")
    if scores != (spec.num_classes > 0):
        raise ValueError(
            f"num_classes={spec.num_classes} with head={spec.head!r}: wanted "
            + ("at least 1" if scores else "0")
        )
    if spec.mtp_layers < 0 or (spec.mtp_layers and spec.head != "tokens"):
        raise ValueError(
            f"mtp_layers={spec.mtp_layers} with head={spec.head!r}: wanted 0 or more, "
            "and 0 where no tokens are predicted"
        )
    if spec.head_bias and spec.head not in ("classes", "token_classes"):
        raise ValueError(
            f"head_bias=True with head={spec.head!r}: only classes and token_classes "
            "choose whether to have a bias"
        )


def stacks(kind: Kind) -> tuple[str, ...]:
    """The stacks of weights that a layer of this kind takes its own from."""
    own = (kind.mixer, "moe" if kind.sparse else "mlp")
    return (*own, "ngram") if kind.ngram else own
