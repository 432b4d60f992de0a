# SPDX-License-Identifier: Apache-2.0
"""The parts of a run that depend on no data: mesh, sizes, micro-batch, placement.

`set_up` is where what does not fit together is refused, before anything is compiled or
written; a dry run and a real one go through it alike. `placer` tells which rows of the
global batch a process reads and lays them on the mesh.

Shapes: a batch on the mesh is [micro, rows, t] with rows by `batch` and, under context
parallelism, tokens by `tokens` in the order of `mesh.zigzag`.
Raises: config.InputError naming the value, what was wanted and the fix.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, experiment, mesh, params
from qwen_jax.checkpoint import agree
from qwen_jax.data import packing
from qwen_jax.models import attention, context, decoder, flops, hf_config
from qwen_jax.optim import build, derive
from qwen_jax.plan import chips, memory, micro
from qwen_jax.plan import chunks as chunk_costs
from qwen_jax.train import chunkflow, pipeline, state, step
from qwen_jax.train.chunkflow import chunks, layers
from qwen_jax.train.chunkflow import step as chunk_step
from qwen_jax.train.pipeline import chunked
from qwen_jax.train.pipeline import rounds as rounds_lib

GATHER_S = 3600.0  # that processes wait for each other's lengths, as reading may take


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run that depend on no data: sizes, mesh, optimizer, step."""

    exp: experiment.Experiment
    device_mesh: jax.sharding.Mesh
    derivation: derive.Derivation
    batch: micro.Batch
    lines: tuple[str, ...]

    @property
    def tx(self) -> Any:
        return build.build(self.exp.optim, self.derivation.num_steps)

    @property
    def chunks(self) -> chunkflow.Settings | None:
        """How a step goes through its chunks; None for whole rows."""
        train, routers = self.exp.train, self.exp.model.moe
        if not train.chunk_tokens:
            return None
        return chunkflow.Settings(
            train.chunk_tokens,
            train.live_chunks,
            z_coef=train.z_loss,
            router_losses=bool(routers and (routers.balance_coef or routers.z_coef)),
            remat=train.remat,
            kv_grad_dtype=train.kv_grad_dtype,
        )

    @functools.cached_property
    def rounds(self) -> rounds_lib.Programs | None:
        """How chunks go through the stages; None where there are none."""
        stages, train = self.device_mesh.shape["stage"], self.exp.train
        if stages == 1 or not train.chunk_tokens:
            return None
        groups = chunk_step.group_sizes(self.chunks, self.exp.data.seq_tokens)
        full = _full_chunks(train, self.batch)
        return rounds_lib.programs(train.live_chunks, stages, groups, full)

    @property
    def step_config(self) -> step.StepConfig:
        train = self.exp.train
        return step.StepConfig(
            train.z_loss, train.document_mask, train.loop, train.remat, train.mtp_coef
        )


def set_up(
    exp: experiment.Experiment, devices: list[Any] | None = None
) -> tuple[experiment.Experiment, Setup]:
    """Mesh, derived numbers and micro-batch; the record with nothing left open.

    Raises:
      config.InputError: whatever does not fit together, before anything is compiled.
    """
    spec = exp.model
    device_mesh = mesh.make(exp.mesh, devices)
    first = device_mesh.devices.flat[0]
    attention.check_backend(spec, first.platform, packed=exp.train.document_mask)
    if exp.data.seq_tokens > spec.max_positions:
        raise config.InputError(
            f"data.seq_tokens={exp.data.seq_tokens} passes model.max_positions="
            f"{spec.max_positions}; set one of them"
        )
    _check_stages(exp, dict(device_mesh.shape))
    context_ways = memory.ways(exp.rules.tokens, device_mesh.shape)
    if device_mesh.shape["context"] > 1 or context_ways > 1:
        _check_context(exp, dict(device_mesh.shape), context_ways)
    spread = mesh.names(exp.rules.batch)
    spread += mesh.names(exp.rules.tokens) if context_ways > 1 else ()
    off = set(mesh.names(exp.rules.embed)) - set(spread)
    if spec.reduce_dtype != "compute" and off:
        raise config.InputError(
            f"model.reduce_dtype={spec.reduce_dtype} needs the axes of rules.embed "
            f"among those of rules.batch, {', '.join(sorted(off))} is not: set "
            "--config.rules.* or --config.model.reduce_dtype=compute"
        )
    if exp.train.chunk_tokens:
        check_chunks(exp)
    if exp.export:
        hf_config.check_spec(spec)
    tree = decoder.decoder_params(spec)
    params.shardings(tree, device_mesh, exp.rules)  # refuses what is uneven
    ways = math.prod(device_mesh.shape[a] for a in mesh.names(exp.rules.batch))
    derivation = derive.derive(
        exp.optim,
        num_weights=flops.num_non_embedding(spec),
        tokens=exp.train.tokens or exp.train.num_steps * exp.train.batch_tokens,
        batch_tokens=exp.train.batch_tokens,
        round_to=ways * exp.data.seq_tokens,
    )
    train = dataclasses.replace(exp.train, batch_tokens=derivation.batch_tokens)
    exp = dataclasses.replace(exp, optim=derivation.optim, train=train)
    batch = _batch(exp, device_mesh, ways, derivation.batch_tokens)
    staged = _stage_lines(exp, device_mesh.shape["stage"], batch)
    shape = ", ".join(f"{k} {v}" for k, v in device_mesh.shape.items())
    outside = flops.num_non_embedding(spec)
    lines = (
        f"model: {flops.num_params(spec):,} weights, {outside:,} without embeddings",
        f"mesh: {shape} ({device_mesh.size} {first.device_kind} devices)",
        *derivation.lines,
        batch.line,
        *staged,
    )
    return exp, Setup(exp, device_mesh, derivation, batch, lines)


def _check_context(
    exp: experiment.Experiment, sizes: dict[str, int], ways: int
) -> None:
    """Refuse what is trained on whole rows only, where rows are split."""
    train, spec, rules = exp.train, exp.model, exp.rules
    tokens = set(mesh.names(rules.tokens))
    for dim in ("batch", "heads", "kv_heads", "ffn", "vocab", "experts"):
        both = tokens & set(mesh.names(getattr(rules, dim)))
        if both:
            raise config.InputError(
                f"rules.tokens={rules.tokens!r} and rules.{dim} both lie on "
                f"{', '.join(sorted(both))}; set --config.rules.tokens=context"
            )
    if sizes["context"] > 1 and "context" not in tokens:
        raise config.InputError(
            f"mesh.context={sizes['context']} and rules.tokens={rules.tokens!r}: those "
            "devices would all do the same; set --config.rules.tokens=context or "
            "--config.mesh.context=1"
        )
    depths = spec.mtp_layers if train.mtp_coef else 0
    context.check(spec, exp.data.seq_tokens, ways, depths=depths)
    if sizes["stage"] > 1:
        raise config.InputError(
            f"mesh.stage={sizes['stage']} and mesh.context={ways}: stages take whole "
            "rows; set --config.mesh.stage=1 or --config.mesh.context=1"
        )
    if train.chunk_tokens:
        raise config.InputError(
            f"train.chunk_tokens={train.chunk_tokens} and mesh.context={ways}: rows go "
            "over the devices in chunks, one after another, or split, all at once; set "
            "--config.train.chunk_tokens=0 or --config.mesh.context=1"
        )


def _batch(exp: experiment.Experiment, device_mesh: Any, ways: int, tokens: int):
    """The micro-batch of whole rows; of chunks, a row of each device at a time."""
    first, train = device_mesh.devices.flat[0], exp.train
    held = functools.partial(
        memory.estimate,
        exp.model,
        exp.rules,
        dict(device_mesh.shape),
        optimizer=exp.optim.name,
        remat=train.remat,
    )
    context_ways = memory.ways(exp.rules.tokens, device_mesh.shape)
    # Stages want many micro-batches, and so the smallest.
    staged = device_mesh.shape["stage"] > 1 and not train.micro_rows
    one_each = train.chunk_tokens or staged
    one, several = held(tokens=1, micro_steps=1), held(tokens=1, micro_steps=2)
    batch = micro.derive(
        batch_tokens=tokens,
        seq_tokens=exp.data.seq_tokens,
        batch_ways=ways,
        fixed_bytes=one.fixed,
        sum_bytes=several.fixed - one.fixed,
        activation_bytes_per_token=-(-(one.total - one.fixed) // context_ways),
        memory_bytes=chips.memory_bytes(first),
        platform=first.platform,
        micro_rows=ways if one_each else train.micro_rows,
    )
    if not train.chunk_tokens:
        return batch
    line = (
        f"chunks = {train.chunk_tokens} tokens, of which {train.live_chunks} of a row "
        f"wait; rows of up to {-(-exp.data.seq_tokens // train.chunk_tokens)} chunks"
    )
    return dataclasses.replace(batch, line=line)


def chunk_memory(setup: Setup) -> chunk_costs.Estimate:
    """What a step in chunks holds in one device's memory, of rows as long as may be."""
    exp, train = setup.exp, setup.exp.train
    of = functools.partial(
        chunk_costs.estimate,
        sizes=dict(setup.device_mesh.shape),
        optimizer=exp.optim.name,
        remat=train.remat,
        chunk_tokens=train.chunk_tokens,
        live_chunks=train.live_chunks,
        kv_grad_bytes=jnp.dtype(train.kv_grad_dtype or "float32").itemsize,
    )
    if setup.rounds is None:
        most = -(-exp.data.seq_tokens // train.chunk_tokens)
        return of(exp.model, exp.rules, chunks=chunks.rounded(most))
    share = pipeline.share_of(exp.model, setup.rounds.stages, 1)
    each = [
        of(share, _flat(exp.rules), chunks=one.chunks, slots=dict(one.slots))
        for one in setup.rounds.sizes.values()
    ]
    return max(each, key=lambda one: one.total)


def _check_stages(exp: experiment.Experiment, sizes: dict[str, int]) -> None:
    """Refuse layers that lie along something else than the stages that compute them."""
    layers, train, spec = exp.rules.layers, exp.train, exp.model
    stages = sizes["stage"]
    if stages == 1 and layers:
        raise config.InputError(
            f"rules.layers={layers!r}: layers are computed one after another, so their "
            "dim stays whole; set --config.rules.layers=None, and split weights by "
            "rules.embed, or set --config.mesh.stage above 1 for a pipeline"
        )
    if stages == 1 and train.stage_parts > 1:
        raise config.InputError(
            f"train.stage_parts={train.stage_parts} is of a pipeline, and "
            "mesh.stage=1: set one of them"
        )
    if stages == 1:
        return
    if layers != "stage":
        raise config.InputError(
            f"mesh.stage={stages} and rules.layers={layers!r}: each stage has its own "
            "layers; set --config.rules.layers=stage, or --config.mesh.stage=1"
        )
    if train.chunk_tokens and train.stage_parts > 1:
        raise config.InputError(
            f"train.stage_parts={train.stage_parts} with chunks, which go through one "
            "stretch of layers a stage; set --config.train.stage_parts=1 or "
            "--config.train.chunk_tokens=0"
        )
    if spec.mtp_layers or spec.vision is not None:
        what = "a tower for images" if spec.vision else "layers for further tokens"
        raise config.InputError(
            f"mesh.stage={stages} and the model has {what}, which no stage has; set "
            "--config.mesh.stage=1, or train a model without (--config.model."
            f"{'vision=None' if spec.vision else 'mtp_layers=0'})"
        )
    if spec.reduce_dtype != "compute":
        raise config.InputError(
            f"mesh.stage={stages} and model.reduce_dtype={spec.reduce_dtype}: inside "
            "stages gradients are summed in the dtype of compute; set "
            "--config.model.reduce_dtype=compute"
        )
    if sizes["fsdp"] > 1 and sizes["expert"] > 1:
        raise config.InputError(
            f"mesh.stage={stages} with mesh.fsdp={sizes['fsdp']} and mesh.expert="
            f"{sizes['expert']}: one of them at a time inside stages; set "
            "--config.mesh.fsdp=1 or --config.mesh.expert=1"
        )
    pipeline.share_of(spec, stages, train.stage_parts)


def _stage_lines(exp: experiment.Experiment, stages: int, batch: Any) -> tuple:
    """How the pipeline goes; refuses an order that its micro-batches do not make."""
    if stages == 1:
        return ()
    if exp.train.chunk_tokens:
        full = _full_chunks(exp.train, batch)
        plan = chunked.plan_of(full, (), exp.train.live_chunks, stages)
        waits = plan.sizes.ticks - 2 * full
        line = (
            f"pipeline = {stages} stages, state-aware 1f1b; {full} chunks of short "
            f"documents in {plan.sizes.ticks} ticks, in {waits} of which a stage waits"
        )
        return (line,)
    parts, count = exp.train.stage_parts, batch.micro_steps
    order = exp.train.stage_order
    plan = pipeline.table(count, stages, parts, order)
    ticks, share = len(plan.rows["kind"]), 2 * count * parts
    line = (
        f"pipeline = {stages} stages x {parts} stretches, {order}, {count} "
        f"micro-batches in {ticks} ticks, in {ticks - share} of which a stage waits"
    )
    return (line,)


def _full_chunks(train: experiment.TrainConfig, batch: micro.Batch) -> int:
    """Batches of chunks in a step whose rows are full."""
    return -(-train.batch_tokens // (batch.micro_rows * train.chunk_tokens))


def check_chunks(exp: experiment.Experiment) -> None:
    """Refuse what is trained in whole rows only."""
    train, spec = exp.train, exp.model
    sizes = train.chunk_tokens, train.live_chunks
    chunkflow.Settings(*sizes, kv_grad_dtype=train.kv_grad_dtype)
    layers.check(spec, train.chunk_tokens, exp.data.seq_tokens)
    if train.chunk_tokens > exp.data.seq_tokens:
        raise config.InputError(
            f"train.chunk_tokens={train.chunk_tokens} passes data.seq_tokens="
            f"{exp.data.seq_tokens}, the longest row: set one of them"
        )
    if not train.document_mask:
        raise config.InputError(
            "train.chunk_tokens is set and train.document_mask=False: chunks hold "
            "documents that do not see each other; set one of them"
        )
    if spec.mtp_layers and train.mtp_coef:
        raise config.InputError(
            f"train.chunk_tokens is set and the model has {spec.mtp_layers} layers for "
            "further tokens, which are trained in whole rows only; set "
            "--config.train.mtp_coef=0 to leave them untrained"
        )


def abstract_inputs(setup: Setup) -> tuple[Any, dict[str, Any], Any]:
    """Shapes and shardings of what the compiled step takes: state, batch, bytes_v."""
    exp, batch = setup.exp, setup.batch
    place = placer(setup.device_mesh, exp.rules, batch.rows, batch.micro_steps)
    shape = (batch.micro_steps, batch.micro_rows, exp.data.seq_tokens)
    dtypes = dict.fromkeys(
        ("tokens_bt", "targets_bt", "positions_bt", "segments_bt"), jnp.int32
    )
    arrays = {
        key: jax.ShapeDtypeStruct(shape, dtype, sharding=place.sharding)
        for key, dtype in (dtypes | {"mask_bt": jnp.float32}).items()
    }
    whole = mesh.sharding(setup.device_mesh, jax.P())
    bytes_v = jax.ShapeDtypeStruct((exp.model.vocab_size,), jnp.float32, sharding=whole)
    now = state.abstract(exp.model, setup.tx, setup.device_mesh, exp.rules)
    return now, arrays, bytes_v


def compile_step(setup: Setup) -> Any:
    """The training step compiled for exactly this run (seconds to minutes)."""
    exp = setup.exp
    if setup.chunks is not None:
        return _compile_chunks(setup)
    of = None
    if setup.device_mesh.shape["stage"] > 1:
        parts = exp.train.stage_parts
        how = {"parts": parts, "order": exp.train.stage_order}
        of = functools.partial(pipeline.gradients, **how)
    fn = step.compile_step(exp.model, setup.tx, exp.rules, setup.step_config, of)
    with jax.set_mesh(setup.device_mesh):
        return fn.lower(*abstract_inputs(setup)).compile()


def _flat(rules: mesh.Rules) -> mesh.Rules:
    """The rules of programs without stages, for what `whole_layers` gives."""
    return dataclasses.replace(rules, layers=None)


def whole_layers(setup: Setup, weights: Any) -> Any:
    """The weights with all layers on every stage, for programs without stages."""
    if not setup.exp.rules.layers:
        return weights
    rules = _flat(setup.exp.rules)
    tree = decoder.decoder_params(setup.exp.model)
    layout = params.shardings(tree, setup.device_mesh, rules)
    with jax.set_mesh(setup.device_mesh):
        return jax.jit(lambda weights: weights, out_shardings=layout)(weights)


def _compile_chunks(setup: Setup) -> chunk_step.Compiled:
    exp, device_mesh = setup.exp, setup.device_mesh
    now = state.abstract(exp.model, setup.tx, device_mesh, exp.rules)

    def chunk(*lead):
        lies = _chunks_lie(device_mesh, exp.rules, len(lead))
        shape = (*lead, setup.batch.micro_rows, exp.train.chunk_tokens)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=lies)
            for name, dtype in packing.DTYPES.items()
        }

    how = exp.model, setup.chunks, exp.rules
    if setup.rounds is not None:
        parts, each = setup.rounds.shapes(chunk), setup.rounds.jitted(*how)
    else:
        parts = chunk_step.shapes(setup.chunks, exp.data.seq_tokens, chunk)
        each = chunkflow.jitted(*how, parts)
    with jax.set_mesh(device_mesh):
        return chunk_step.compiled(
            *(exp.model, setup.tx, setup.step_config),
            each=each,
            parts=parts,
            state=now,
        )


def _chunks_lie(device_mesh, rules, lead: int):
    spec = rules.pspec(*[None] * lead, "batch", None)
    return jax.sharding.NamedSharding(device_mesh, spec)


@dataclasses.dataclass(frozen=True)
class Placer:
    """Which rows of the global batch a process reads, and how they reach the mesh."""

    sharding: jax.sharding.NamedSharding
    micro_steps: int
    rows: int
    index: int
    count: int
    context_ways: int = 1

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows [r, t] -> global arrays [micro, rows, t], tokens in the
        order that splits them."""

        def one(x):
            if self.context_ways > 1:
                x = x[:, mesh.zigzag(x.shape[1], self.context_ways)]
            local = x.reshape(self.micro_steps, -1, *x.shape[1:])
            whole = (self.micro_steps, self.rows // self.micro_steps, *x.shape[1:])
            return jax.make_array_from_process_local_data(self.sharding, local, whole)

        return {key: one(x) for key, x in rows.items()}


@dataclasses.dataclass(frozen=True)
class ChunkPlacer:
    """As `Placer`, for rows that go over the mesh in chunks. `what` they are of names
    the exchanges of processes: each kind of rows has one thread that lays it out."""

    setup: Setup
    bytes_v: np.ndarray
    index: int
    count: int
    what: str
    parts_of: Any
    calls: Any = dataclasses.field(default_factory=itertools.count)

    def __call__(self, rows: dict[str, np.ndarray]) -> chunk_step.Work:
        """This process's rows [r, t] -> the chunks of the batch."""
        exp, every = self.setup.exp, self.setup.batch.micro_rows

        def place(x):
            lies = _chunks_lie(self.setup.device_mesh, exp.rules, x.ndim - 2)
            whole = (*x.shape[:-2], every, x.shape[-1])
            return jax.make_array_from_process_local_data(lies, x, whole)

        return chunk_step.lay_out(
            rows,
            settings=self.setup.chunks,
            local_rows=every // self.count,
            place=place,
            bytes_v=self.bytes_v,
            gather=self._gather,
            parts_of=self.parts_of,
        )

    def _gather(self, mine: Any) -> list[Any]:
        """What processes with different rows say; all of them have read the last
        exchange when they speak in the next."""
        number = next(self.calls)
        tag = f"qwen_jax/{self.what}/{{}}".format
        said = agree.gather(tag(number), [self.index, mine], GATHER_S)
        agree.forget(tag(number - 1))
        return list(dict(said).values())


def placer_of(setup: Setup, token_bytes: np.ndarray) -> Placer | ChunkPlacer:
    """What lays the batches of a run on its mesh."""
    if setup.chunks is not None:
        parts_of = setup.rounds.parts_of if setup.rounds else chunkflow.parts_of
        return chunk_placer(setup, token_bytes, "chunks", parts_of)
    batch = setup.batch
    return placer(setup.device_mesh, setup.exp.rules, batch.rows, batch.micro_steps)


def chunk_placer(
    setup: Setup, token_bytes: np.ndarray, what: str, parts_of: Any
) -> ChunkPlacer:
    """What lays rows in chunks; see `ChunkPlacer`, and `chunkflow.parts_of`."""
    one = placer(setup.device_mesh, setup.exp.rules, setup.batch.micro_rows, 1)
    bytes_v = np.zeros(setup.exp.model.vocab_size, np.float32)
    bytes_v[: len(token_bytes)] = token_bytes
    return ChunkPlacer(setup, bytes_v, one.index, one.count, what, parts_of)


def placer(device_mesh: Any, rules: mesh.Rules, rows: int, micro_steps: int) -> Placer:
    """The Placer of a batch of `rows` rows cut in `micro_steps`.

    A process may hold rows that are no neighbours (a host of a TPU slice is a block of
    2 x 2 chips): it reads a stretch of the batch all the same and lays it on the rows
    it holds, so only the order of rows inside the batch differs from their places.
    Processes that hold parts of the same rows read those rows whole, each of them.
    """
    each = rows // micro_steps
    flat = jax.sharding.NamedSharding(device_mesh, rules.pspec("batch"))
    held: dict[int, set[tuple[int, ...]]] = {}
    for device, index in flat.devices_indices_map((each,)).items():
        spans = held.setdefault(device.process_index, set())
        spans.add(index[0].indices(each)[:2])
    parts = sorted({tuple(sorted(spans)) for spans in held.values()})
    every = [span for part in parts for span in part]
    if len(set(map(len, parts))) > 1 or len(set(every)) < len(every):
        raise config.InputError(
            "the processes of this job do not hold equal or separate rows of the "
            "batch; let mesh.data and mesh.fsdp be multiples of the number of processes"
        )
    place = parts.index(tuple(sorted(held[jax.process_index()])))
    ways = memory.ways(rules.tokens, device_mesh.shape)
    tokens = rules.tokens if ways > 1 else None
    sharding = jax.sharding.NamedSharding(
        device_mesh, jax.P(None, *rules.pspec("batch"), tokens)
    )
    return Placer(sharding, micro_steps, rows, place, len(parts), ways)
