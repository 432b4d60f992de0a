# SPDX-License-Identifier: Apache-2.0
"""One run as one frozen record, from an experiment file and the command line.

`resolve("experiments/x.py:tiny", overrides)` loads the file, fills every field it
leaves out with its default (so that each can be overridden by name), applies the
overrides and freezes. `model.base` names a published size whose fields are the defaults
of `model`.

Formats: see `config`. The resolved record, thawed, is what run.json and checkpoints
keep.
Raises: config.InputError for unknown keys, wrong types and cross-field mistakes.
"""

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

from qwen_jax import config
from qwen_jax import mesh as mesh_lib
from qwen_jax.data import loader
from qwen_jax.models import decoder, sizes
from qwen_jax.models import spec as spec_lib
from qwen_jax.optim import build
from qwen_jax.train.chunkflow import gradients
from qwen_jax.train.pipeline import batches

# What a resumed run may change; everything else would train another thing.
MAY_CHANGE = (
    "train.num_steps",
    "train.tokens",
    "train.remat",
    "train.loop",
    "train.micro_rows",
    "train.chunk_tokens",
    "train.live_chunks",
    "train.kv_grad_dtype",
    "train.stage_order",
    "train.stage_parts",
    "train.max_skipped",
    "optim.decay_steps",
    "model.attention",
    "model.reduce_dtype",
    "mesh.*",
    "rules.*",
    "checkpoint.*",
    "eval.*",
    "sample.*",
    "log.*",
    "data.num_workers",
    "data.max_bad_share",
    "data.read_threads",
    "data.cache_dir",
    "data.stages",  # those that have not begun: see checks.stages
    "export",
)
# What else may change is compared by more than its text: see checks.resume.
MAY_MOVE = ("data.sources' path to another place of the same corpus",)


def _not_negative(record: Any, *names: str) -> None:
    for name in names:
        if getattr(record, name) < 0:
            raise ValueError(f"{name}={getattr(record, name)} must not be negative")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how large; 0 leaves a number to be derived in the open.

    document_mask=False lets the documents of a row see each other, as GPT-style
    pre-training does; the "cudnn" attention needs that, since it takes no segments.
    """

    num_steps: int = 0
    tokens: int = 0
    batch_tokens: int = 0
    micro_rows: int = 0
    z_loss: float = 0.0
    # Weight of the loss of further tokens, for a model with an MTP head.
    mtp_coef: float = 0.1
    document_mask: bool = True
    remat: str = "dots"
    loop: str = "scan"
    max_skipped: int = 20
    # Chunks that rows are cut in (see train.chunkflow), and how many of a row wait for
    # their backward pass; 0 = whole rows.
    chunk_tokens: int = 0
    live_chunks: int = 1
    # Of cotangents of their keys and values: "" for float32; bfloat16 halves them.
    kv_grad_dtype: str = ""
    # Along mesh.stage (see train.pipeline): the order of micro-batches of whole rows,
    # 1f1b, eager or interleaved, which has several stretches of layers on each device.
    # Chunks go in state-aware 1f1b.
    stage_order: str = "eager"
    stage_parts: int = 1
    # A model folder to start from, its tokenizer with it; "" = random weights.
    init_from: str = ""

    def __post_init__(self):
        if self.loop not in ("scan", "unroll"):
            raise ValueError(f"loop={self.loop!r}: wanted scan or unroll")
        _not_negative(self, "num_steps", "tokens", "batch_tokens", "micro_rows")
        _not_negative(self, "mtp_coef", "chunk_tokens")
        for name, known in (
            ("stage_order", batches.ORDERS),
            ("kv_grad_dtype", gradients.KV_GRAD_DTYPES),
        ):
            if getattr(self, name) not in known:
                hint = config.nearest(getattr(self, name), known)
                raise ValueError(f"{name}={getattr(self, name)!r}{hint}")
        for name in ("live_chunks", "stage_parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.chunk_tokens and self.micro_rows:
            raise ValueError(
                f"micro_rows={self.micro_rows} is of whole rows and chunk_tokens="
                f"{self.chunk_tokens} cuts them: set one of them"
            )
        if self.num_steps and self.tokens:
            raise ValueError(
                f"num_steps={self.num_steps} and tokens={self.tokens}: set one of them"
            )
        if self.num_steps and not self.batch_tokens:
            raise ValueError(
                f"num_steps={self.num_steps} needs batch_tokens, the global batch; or "
                "give tokens, the length of the run, and leave both open"
            )
        if self.max_skipped < 1:
            raise ValueError(f"max_skipped={self.max_skipped} must be at least 1")
        decoder.saved_names(self.remat)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save (whichever comes first), what to keep, and how long a save may wait
    for the disk and for the other processes before it has failed."""

    every_steps: int = 500
    every_s: float = 900.0
    keep: int = 3
    keep_every: int = 0
    timeout_s: float = 600.0

    def __post_init__(self):
        _not_negative(self, "every_steps", "every_s", "keep_every")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be positive")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out text: evaluated every so many steps and at the end; 0 = never.

    max_tokens = 0 takes all of it, which is what gzip's number beside it is of.
    """

    every_steps: int = 200
    max_tokens: int = 0

    def __post_init__(self):
        _not_negative(self, "every_steps", "max_tokens")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Prompts continued as training goes; 0 steps = never."""

    every_steps: int = 0
    prompts: tuple[str, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.0

    def __post_init__(self):
        _not_negative(self, "every_steps", "temperature")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl is always written; trackers are extras."""

    trackers: tuple[str, ...] = ()
    profile_from: int = -1  # first step of a profiler trace; -1 = none
    profile_steps: int = 3


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run."""

    data: loader.DataConfig
    seed: int = 0
    model: spec_lib.Spec = dataclasses.field(default_factory=spec_lib.Spec)
    optim: build.OptimConfig = dataclasses.field(default_factory=build.OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: mesh_lib.MeshConfig = dataclasses.field(default_factory=mesh_lib.MeshConfig)
    rules: mesh_lib.Rules = dataclasses.field(default_factory=mesh_lib.Rules)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    export: bool = True

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer comes from; "" = it is learnt from the corpus.

        Weights to begin with bring theirs: embeddings mean nothing under other ids.
        `data.tokenizer` stays as it was given, so that a resumed run compares equal.
        """
        return self.data.tokenizer or self.train.init_from


def resolve(
    path: str, overrides: list[tuple[str, str]] = (), data_path: str = ""
) -> Experiment:
    """The frozen record of an experiment file with command-line overrides.

    Args:
      path: experiment file, with ":arg" if it takes one.
      overrides: (dotted key, text) pairs.
      data_path: a folder or file that replaces the sources of the file.
    """
    given = config.thaw(config.load(path))
    model = given.setdefault("model", {})
    if not isinstance(model, dict):
        raise config.InputError(
            f"model: wanted a group of keys, got {model!r}; a published size is named "
            "by model.base"
        )
    base = dict(overrides).get("model.base") or model.pop("base", "")
    overrides = [(k, v) for k, v in overrides if k != "model.base"]
    model.pop("base", "")
    if base:
        given["model"] = config.merge(config.thaw(sizes.get(base)), model)
    if data_path:
        given.setdefault("data", {})["sources"] = [{"path": data_path}]
    whole = complete(Experiment, given)
    return config.freeze(Experiment, config.override(whole, overrides))


def complete(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the defaults of the record's fields where it says nothing."""
    out = dict(given)
    hints = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name, field in hints.items():
        default = field.default
        if default is dataclasses.MISSING and (
            field.default_factory is not dataclasses.MISSING
        ):
            default = field.default_factory()
        nested = _record_type(cls, name)
        if nested is not None and isinstance(out.get(name), dict):
            out[name] = complete(nested, out[name])
        elif name not in out and default is not dataclasses.MISSING:
            out[name] = config.thaw(default)
    return out


def _record_type(cls: type, name: str) -> type | None:
    """The dataclass a field holds, or None."""
    hint = get_type_hints(cls)[name]
    for kind in (hint, *get_args(hint)):
        if dataclasses.is_dataclass(kind) and get_origin(hint) is not tuple:
            return kind
    return None
