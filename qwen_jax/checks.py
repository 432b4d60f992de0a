# SPDX-License-Identifier: Apache-2.0
"""What a run refuses before it compiles or writes anything, beyond `prepare.set_up`.

Each function raises config.InputError with the value, what was wanted and the fix, or
returns. `with_stored` fills what a resumed run left open, so that only real differences
are told.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from qwen_jax import config, experiment, params, prepare
from qwen_jax.checkpoint import compatible
from qwen_jax.data import mixture, source, tokenizer
from qwen_jax.models import decoder, hf, rope
from qwen_jax.models import spec as spec_lib
from qwen_jax.plan import chips, micro


def with_stored(exp: experiment.Experiment, stored: dict) -> experiment.Experiment:
    """What the run left open takes the values it was started with."""
    optim, train = exp.optim, exp.train
    if not optim.lr_peak:
        optim = dataclasses.replace(optim, lr_peak=stored["optim"]["lr_peak"])
    if optim.warmup_steps < 0:
        optim = dataclasses.replace(optim, warmup_steps=stored["optim"]["warmup_steps"])
    if not train.batch_tokens:
        train = dataclasses.replace(train, batch_tokens=stored["train"]["batch_tokens"])
    return dataclasses.replace(exp, optim=optim, train=train)


def chunk_memory(setup: prepare.Setup) -> None:
    """Refuse chunks of which the longest row does not fit in a device's memory."""
    if setup.chunks is None:
        return
    held, exp, train = prepare.chunk_memory(setup), setup.exp, setup.exp.train
    device = setup.device_mesh.devices.flat[0]
    there = int(micro.HEADROOM * chips.memory_bytes(device))
    gib, longest = 1 << 30, exp.data.seq_tokens
    if held.total <= there:
        return
    raise config.InputError(
        f"rows of {longest} tokens in chunks of {train.chunk_tokens}, of which "
        f"{train.live_chunks} wait, need about {held.total / gib:.2f} GiB of a device: "
        f"keys, values and their cotangents {(held.keys + held.key_grads) / gib:.2f}, "
        f"what waits {held.waiting / gib:.2f}, weights, gradients, optimizer and what "
        f"stages hand on {held.fixed / gib:.2f}; {there / gib:.2f} GiB are to be used. "
        "`qwen-jax plan chunk` finds chunks that fit; keys shrink with "
        "--config.mesh.tensor, --config.mesh.stage and a smaller "
        "--config.data.seq_tokens, weights with --config.mesh.fsdp"
    )


def resume(
    meta: dict, resolved: dict, setup: prepare.Setup, workdir: pathlib.Path
) -> None:
    """Refuse what the run that made this checkpoint cannot go on with."""
    # A field that came with a later version has the value it had before: its default.
    stored = experiment.complete(experiment.Experiment, meta["config"])
    # Where the corpus stands and how it is named there says little about what it is:
    # Loader.restore compares names, order, files and contents.
    sources, now = stored["data"]["sources"], resolved["data"]["sources"]
    if len(sources) == len(now):
        moved = [{key: new[key] for key in ("path", "name")} for new in now]
        sources = [
            experiment.complete(source.SourceConfig, old | new)
            for old, new in zip(sources, moved, strict=True)
        ]
    stored["data"] = stored["data"] | {"sources": sources}
    compatible.refuse(
        stored,
        resolved,
        experiment.MAY_CHANGE,
        where=str(workdir),
        also=experiment.MAY_MOVE,
    )
    if meta["step"] > setup.derivation.num_steps:
        raise config.InputError(
            f"the run in {workdir} has made {meta['step']} steps, more than the "
            f"{setup.derivation.num_steps} asked for: set --config.train.num_steps="
            f"{meta['step']} or more, or use a new --workdir"
        )


def stages(
    meta: dict, exp: experiment.Experiment, sources: Sequence[source.Source]
) -> None:
    """Refuse a mixture that would have drawn the steps of a resumed run otherwise.

    A stage that has not begun may change, come or go: the lanes ask for the stage of
    every batch anew. One that has begun decided what is in the weights already, and
    its place among the stages is part of the order of rows.
    """
    names, step = [one.name for one in sources], meta["step"]
    was, now = (
        mixture.begun(data.stages or ((0, _weights(data, names)),), step)
        for data in (config.freeze(source.DataConfig, meta["config"]["data"]), exp.data)
    )
    if was != now:
        raise config.InputError(
            f"data.stages: the {step} steps of this run were drawn in the stages "
            f"{config.thaw(was)}; those given would have drawn them in "
            f"{config.thaw(now)}. Keep the stages that have begun, the last of them "
            f"until step {step} or later, and change only those that follow; or use a "
            "new --workdir"
        )


def _weights(data: source.DataConfig, names: Sequence[str]) -> dict[str, float]:
    """The one stage of a mixture without stages."""
    weights = (one.weight for one in data.sources)
    return dict(zip(names, weights, strict=True))


# What a model that begins with the weights of another may have otherwise. Choices of a
# run, which change no function that the weights were trained for:
CHOSEN = (
    *("param_dtype", "compute_dtype", "reduce_dtype", "attention", "init_std"),
    *("family", "bos_id", "eos_ids", "pad_id"),
    *("moe.balance_coef", "moe.z_coef", "moe.impl", "moe.capacity_factor"),
    *("moe.exchange", "moe.pieces"),
)
# and what stages of longer rows change: ABF (2309.16039), YaRN (arXiv 2309.00071).
LENGTH = ("max_positions", "rope_theta", "rope_scaling", "dual_chunk")


def init_from(exp: experiment.Experiment, say: Callable[[str], None]) -> None:
    """Refuse a model folder whose weights are not those of this model; say in one line
    how the positions differ, which a stage of longer rows changes."""
    folder = exp.train.init_from
    parts = "text" if exp.model.vision is None else "all"
    there = hf.read_spec(folder, parts=parts)
    lines = [
        f"{key} is {a} there, {b} here"
        for key, a, b in config.diff(config.thaw(there), config.thaw(exp.model))
        if key not in CHOSEN and key.partition(".")[0] not in LENGTH
    ]
    if lines or _shapes(there) != _shapes(exp.model):
        raise config.InputError(
            f"train.init_from={folder} is not the model of this run: "
            f"{'; '.join(lines)}; set --config.model.* to its values"
        )
    hf.check(folder, there)
    own_tokenizer(exp)
    if told := _length(there, exp.model):
        say(f"positions, unlike in {folder}: {told}")
    if not exp.data.tokenizer:
        say(f"tokenizer: that of {folder}")


def _length(there: spec_lib.Spec, here: spec_lib.Spec) -> str:
    """How positions change, "" where they do not."""

    def shown(spec: spec_lib.Spec, key: str) -> str:
        value = getattr(spec, key)
        if key == "dual_chunk":
            return "none" if value is None else f"{value.chunk_size:,}"
        if key != "rope_scaling":
            return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
        if value is None:
            return "none"
        factor = f"{value.kind} {value.factor:g} on {value.original_positions:,}"
        return f"{factor} (attention x {rope.frequencies(spec)[1]:.4g})"

    return ", ".join(
        f"{key} {shown(there, key)} -> {shown(here, key)}"
        for key in LENGTH
        if getattr(there, key) != getattr(here, key)
    )


def own_tokenizer(exp: experiment.Experiment) -> None:
    """Refuse weights to begin with that come without the tokenizer of their ids."""
    folder = exp.train.init_from
    if exp.data.tokenizer or not folder:
        return
    if not (pathlib.Path(folder) / "tokenizer.json").is_file():
        raise config.InputError(
            f"train.init_from={folder} has no tokenizer.json, and one learnt here "
            "would give its embeddings other words: set --config.data.tokenizer to the "
            "tokenizer that the model was trained with"
        )


def other_tokenizer(
    exp: experiment.Experiment,
    known: tokenizer.Tokenizer,
    say: Callable[[str], None],
) -> None:
    """Say so where the tokenizer asked for is not that of the weights to begin with."""
    folder, asked = exp.train.init_from, exp.data.tokenizer
    if not folder or not asked:
        return
    if not (pathlib.Path(folder) / "tokenizer.json").is_file():
        say(f"note: {folder} has no tokenizer.json to compare data.tokenizer with")
        return
    try:
        same = tokenizer.load(folder).fingerprint == known.fingerprint
    except config.InputError as error:  # it is not the one that is used
        say(f"note: data.tokenizer is not compared with that of {folder}: {error}")
        return
    if not same:
        say(
            f"note: data.tokenizer={asked} is not the tokenizer of {folder}, whose "
            "embeddings were trained with its own ids"
        )


def _shapes(spec: spec_lib.Spec) -> Any:
    return params.tree_map(lambda p: p.shape, decoder.decoder_params(spec))


def learnt_vocabulary(exp: experiment.Experiment) -> None:
    """Refuse a vocabulary that would not fit the model before it is learnt."""
    if exp.data.vocab_size > exp.model.vocab_size:
        raise config.InputError(
            f"data.vocab_size={exp.data.vocab_size:,} ids do not fit the model's "
            f"vocabulary of {exp.model.vocab_size:,}: set --config.model.vocab_size="
            f"{exp.data.vocab_size} or a smaller --config.data.vocab_size"
        )


def vocabulary(exp: experiment.Experiment, known: tokenizer.Tokenizer) -> None:
    """Refuse ids that the model's table does not have."""
    if known.vocab_size > exp.model.vocab_size:
        raise config.InputError(
            f"the tokenizer has {known.vocab_size:,} ids, the model's vocabulary "
            f"{exp.model.vocab_size:,}: set --config.model.vocab_size="
            f"{known.vocab_size} or another tokenizer"
        )


def ids_fit(known: tokenizer.Tokenizer, spec: Any, folder: pathlib.Path) -> None:
    """Refuse a model folder whose tokenizer has ids that its model's table has not."""
    if known.vocab_size > spec.vocab_size:
        raise config.InputError(
            f"tokenizer.json of {folder} has ids up to {known.vocab_size - 1:,}, its "
            f"model a vocabulary of {spec.vocab_size:,}: the two are of different "
            "models; copy the folder anew"
        )


def samples(exp: experiment.Experiment, known: tokenizer.Tokenizer) -> None:
    """Refuse samples that would stop the run when their step comes."""
    sample = exp.sample
    if not sample.every_steps or not sample.prompts:
        return
    longest = 1 + max(len(known.encode(text)) for text in sample.prompts)
    if longest + sample.max_tokens > exp.model.max_positions:
        raise config.InputError(
            f"sample.max_tokens={sample.max_tokens} and a prompt of {longest} tokens "
            f"pass model.max_positions={exp.model.max_positions}: set "
            "--config.sample.max_tokens or shorten sample.prompts"
        )
