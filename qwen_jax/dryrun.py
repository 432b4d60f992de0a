# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax run --dry_run`: what a run would take, from its compiled step, untrained.

`measure` compiles the very step of the run for shapes alone and gives the numbers,
`render` prints them, `main` does both and refuses what does not fit. With `--topology
v6e:4x4` the step is compiled for a TPU slice that is not there, with `--slices 2` for
two of them.

Nothing is trained or allocated, no corpus is opened, nothing is written but --json
FILE: the Report as JSON. The compiler's numbers stand beside estimates from shapes (see
`plan.memory`); where they differ the compiler is right.

Units: bytes of one device unless named otherwise, FLOPs of the whole step, seconds.
`needed` is what the program asks of the device: on a TPU the compiler's peak, elsewhere
arguments + results that take no argument's place + temporaries, which are allocated at
once. It fits when that is at most `FULL` of the device's memory.
Raises: config.InputError for a run that does not fit, naming what would, and for
whatever `prepare.set_up` refuses.
"""

import dataclasses
import json
import math
import pathlib
import re
import time
from typing import Any

import jax

from qwen_jax import config, experiment, mesh, prepare
from qwen_jax.models import flops
from qwen_jax.plan import chips, collectives, memory, topology
from qwen_jax.plan import chunks as chunk_costs
from qwen_jax.train.chunkflow import step as chunk_step

FULL = 0.95
GIB = 1 << 30
# Model FLOPs as a share of the peak that a tuned run reaches; printed as an assumption.
ASSUMED_MFU = {"cpu": 0.6, "gpu": 0.4, "tpu": 0.4}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's own account of one device's memory, in bytes."""

    argument: int
    output: int
    alias: int  # results that take the place of arguments
    temp: int
    host_temp: int
    peak: int
    needed: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a dry run tells; `--json` writes it as it stands."""

    config: str
    topology: str
    device: str
    num_devices: int
    mesh: dict[str, int]
    lines: tuple[str, ...]  # of the set-up: model, mesh, derived numbers, micro-batch
    num_params: int
    num_non_embedding: int
    rows: int
    micro_rows: int
    micro_steps: int
    seq_tokens: int
    batch_tokens: int
    num_steps: int
    tokens: int
    derived: memory.Estimate | chunk_costs.Estimate
    optimizer_bytes: int  # of one device, exact
    compiled: Compiled | None  # None: the compiler ran out of the device's memory
    device_bytes: int
    needed_bytes: int
    fits: bool
    fix: str
    step_flops: float
    step_flops_causal: float
    compiled_flops: float  # of one device, bodies of loops once; nan if not told
    traffic: tuple[collectives.Traffic, ...]
    traffic_at_least: bool
    checkpoint_bytes: int
    checkpoints_kept: int
    peak_flops_per_s: float  # of one device
    peak_source: str
    assumed_mfu: float
    step_s: float
    run_s: float
    compile_s: float


def main(exp: experiment.Experiment, options: Any) -> int:
    """Measure, print, write --json; exit code 0.

    Raises:
      config.InputError: it does not fit (after everything was printed), or cannot be.
    """
    devices, slice_name = None, options.topology
    if slice_name:
        devices = topology.devices(slice_name, options.slices)
    if options.slices > 1:
        if devices is None:
            raise config.InputError(
                f"--slices {options.slices}: of which TPU slice? Add --topology NAME, "
                "such as v6e:4x4"
            )
        slice_name = f"{options.slices} x {slice_name}"
    try:
        report = measure(exp, devices, name=options.config, slice_name=slice_name)
    except config.InputError as error:
        if devices is None and jax.default_backend() == "cpu":
            raise config.InputError(
                f"{error} (for a TPU slice that need not be here, add "
                "--topology v6e:4x4)"
            ) from error
        raise
    print(render(report))
    if options.json:
        write_json(report, options.json)
    if not report.fits:
        raise config.InputError(
            f"does not fit: needs {_gib(report.needed_bytes)} of the "
            f"{_gib(report.device_bytes)} of a device, at most {FULL:.0%} are to be "
            f"used; {report.fix}"
        )
    return 0


def measure(
    exp: experiment.Experiment,
    devices: list[Any] | None = None,
    *,
    name: str = "",
    slice_name: str = "",
) -> Report:
    """The Report of an experiment on `devices` (default: all that are here)."""
    exp, setup = prepare.set_up(exp, devices)
    device = setup.device_mesh.devices.flat[0]
    batch, derivation = setup.batch, setup.derivation
    sizes = dict(setup.device_mesh.shape)
    derived = _derived(setup)
    state = prepare.abstract_inputs(setup)[0]
    start_s = time.monotonic()
    program, ran_out = _compile(setup)
    compile_s = time.monotonic() - start_s
    whole, program = program, program and _measurable(program)
    compiled = _account(program, device.platform) if program else None
    if compiled and setup.chunks is not None:
        compiled = dataclasses.replace(compiled, needed=whole.needed())
    needed = compiled.needed if compiled else ran_out
    device_bytes = chips.memory_bytes(device)
    fits = needed <= FULL * device_bytes
    traffic, at_least = (), False
    if program:
        traffic, at_least = collectives.traffic(
            program.as_text(), setup.device_mesh.size
        )
        at_least |= setup.chunks is not None  # it is that of one batch of chunks
    step_tokens = batch.rows * exp.data.seq_tokens
    per_token = flops.train_per_token(exp.model, exp.data.seq_tokens)
    causal = flops.train_per_token(exp.model, exp.data.seq_tokens, causal=True)
    peak, source = chips.peak_flops_per_s(device)
    mfu = ASSUMED_MFU.get(device.platform, 0.4)
    step_s = per_token * step_tokens / (peak * setup.device_mesh.size * mfu)
    return Report(
        config=name,
        topology=slice_name,
        device=device.device_kind,
        num_devices=setup.device_mesh.size,
        mesh=sizes,
        lines=setup.lines,
        num_params=flops.num_params(exp.model),
        num_non_embedding=flops.num_non_embedding(exp.model),
        rows=batch.rows,
        micro_rows=batch.micro_rows,
        micro_steps=batch.micro_steps,
        seq_tokens=exp.data.seq_tokens,
        batch_tokens=step_tokens,
        num_steps=derivation.num_steps,
        tokens=step_tokens * derivation.num_steps,
        derived=derived,
        optimizer_bytes=sum(_local(x) for x in jax.tree.leaves(state.opt)),
        compiled=compiled,
        device_bytes=device_bytes,
        needed_bytes=needed,
        fits=fits,
        fix="" if fits else fix(exp, setup, needed / derived.total, device_bytes),
        step_flops=per_token * step_tokens,
        step_flops_causal=causal * step_tokens,
        compiled_flops=_flops(program),
        traffic=traffic,
        traffic_at_least=at_least,
        checkpoint_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        checkpoints_kept=exp.checkpoint.keep,
        peak_flops_per_s=peak,
        peak_source=source,
        assumed_mfu=mfu,
        step_s=step_s,
        run_s=step_s * derivation.num_steps,
        compile_s=compile_s,
    )


def _derived(setup: prepare.Setup) -> Any:
    """What a step holds by its shapes."""
    if setup.chunks is not None:
        return prepare.chunk_memory(setup)
    exp, batch, sizes = setup.exp, setup.batch, dict(setup.device_mesh.shape)
    ways = memory.ways(exp.rules.batch, sizes) * memory.ways(exp.rules.tokens, sizes)
    return memory.estimate(
        exp.model,
        exp.rules,
        sizes,
        optimizer=exp.optim.name,
        remat=exp.train.remat,
        tokens=batch.micro_rows * exp.data.seq_tokens // ways,
        micro_steps=batch.micro_steps,
    )


def _compile(setup: prepare.Setup) -> tuple[Any, int]:
    """(compiled step, 0), or (None, bytes it asked for) when a device is too small."""
    try:
        return prepare.compile_step(setup), 0
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = re.search(r"\(([\d.]+)([KMGT])\) exceeds available", str(error))
        if asked is None:
            raise
        return None, int(float(asked[1]) * 1024 ** ("KMGT".index(asked[2]) + 1))


def _measurable(program: Any) -> Any:
    """The program whose account stands for the step's: of several the largest."""
    return program.largest() if isinstance(program, chunk_step.Compiled) else program


def _account(program: Any, platform: str) -> Compiled:
    found = program.memory_analysis()
    argument, output = found.argument_size_in_bytes, found.output_size_in_bytes
    alias, temp = found.alias_size_in_bytes, found.temp_size_in_bytes
    peak = found.peak_memory_in_bytes
    held = argument + output - alias + temp
    return Compiled(
        argument=argument,
        output=output,
        alias=alias,
        temp=temp,
        host_temp=found.host_temp_size_in_bytes,
        peak=peak,
        needed=peak if platform == "tpu" else max(peak, held),
    )


def _flops(program: Any) -> float:
    cost = program.cost_analysis() if program else None
    return float((cost or {}).get("flops", math.nan))


def _local(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def fix(
    exp: experiment.Experiment,
    setup: prepare.Setup,
    ratio: float,
    device_bytes: int,
) -> str:
    """The smallest change that fits by the estimate, scaled by what it missed here."""
    if setup.chunks is not None:
        return "`qwen-jax plan chunk` finds chunks that fit, if any do"
    sizes, batch = dict(setup.device_mesh.shape), setup.batch
    ways = math.prod(sizes[a] for a in mesh.names(exp.rules.batch))
    context = math.prod(sizes[a] for a in mesh.names(exp.rules.tokens))

    def fits(remat: str, rows: int, **more: int) -> bool:
        at = sizes | more
        spread = math.prod(at[a] for a in mesh.names(exp.rules.batch))
        guess = memory.estimate(
            exp.model,
            exp.rules,
            at,
            optimizer=exp.optim.name,
            remat=remat,
            tokens=max(rows // spread, 1) * exp.data.seq_tokens // context,
            micro_steps=2 if rows < batch.rows else 1,
        )
        return guess.total * ratio <= FULL * device_bytes

    smaller = [
        n for n in range(batch.micro_rows - ways, 0, -ways) if batch.rows % n == 0
    ]
    for remat in dict.fromkeys((exp.train.remat, "full")):
        flag = f"--config.train.remat={remat}" if remat != exp.train.remat else ""
        for rows in (batch.micro_rows, *smaller):
            if fits(remat, rows):
                cut = rows != batch.micro_rows
                flags = [flag, f"--config.train.micro_rows={rows}" if cut else ""]
                return f"would fit with {' '.join(filter(None, flags))}"
    for axis in ("fsdp", "tensor"):
        for times in (2, 4, 8, 16, 32, 64):
            if fits("full", ways * times, **{axis: sizes[axis] * times}):
                return (
                    f"would fit with --config.train.remat=full on {times} times the "
                    f"devices, --config.mesh.{axis}={sizes[axis] * times}"
                )
    return "no number of devices tried would make it fit: take a smaller model"


def write_json(report: Report, path: str) -> None:
    """The Report as JSON; numbers that are none become null."""
    values = config.thaw(report)
    values = {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }
    try:
        pathlib.Path(path).write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise config.InputError(
            f"--json {path}: {error.strerror}; give a file that can be written"
        ) from error


def render(report: Report) -> str:
    """The Report in lines for a terminal."""
    parts = (
        [f"dry run of {report.config}: nothing is trained or written", *report.lines],
        _memory_lines(report),
        _traffic_lines(report),
        _cost_lines(report),
    )
    return "\n".join(line for part in parts for line in part)


def _memory_lines(report: Report) -> list[str]:
    derived, compiled = report.derived, report.compiled
    if isinstance(derived, chunk_costs.Estimate):
        return _chunk_lines(report, derived)
    state = derived.weights + report.optimizer_bytes
    temporaries = derived.total - derived.weights - derived.optimizer
    rows = [
        ("weights", derived.weights, None),
        ("optimizer", report.optimizer_bytes, None),
        ("= arguments", state, compiled and compiled.argument),
        ("gradient", derived.gradient, None),
        ("gathered weights", derived.gathered, None),
        ("head and loss", derived.head, None),
        (f"activations kept ({report.micro_rows} rows)", derived.kept, None),
        ("activations of one layer", derived.working, None),
        ("= temporaries", temporaries, compiled and compiled.temp),
        ("results", None, compiled and compiled.output),
        ("  in the place of arguments", None, compiled and compiled.alias),
        ("peak", state + temporaries, compiled and compiled.peak),
    ]
    lines = [f"memory of one device, GiB {'derived':>16} {'compiler':>10}"]
    for name, guess, told in rows:
        lines.append(f"  {name:30} {_number(guess):>9} {_number(told):>10}".rstrip())
    return [*lines, _needed_line(report)]


def _needed_line(report: Report) -> str:
    share = report.needed_bytes / report.device_bytes
    return (
        f"  needed {_gib(report.needed_bytes)} of {_gib(report.device_bytes)} a "
        f"program may use: {share:.1%}, {'fits' if report.fits else 'DOES NOT FIT'}"
    )


def _chunk_lines(report: Report, derived: chunk_costs.Estimate) -> list[str]:
    """Of a step in chunks, whose largest program the compiler tells of."""
    names = {
        "weights": "weights",
        "optimizer": "optimizer",
        "sums": "gradients of the step",
        "gradient": "gradient of a chunk",
        "gathered": "gathered weights",
        "keys": "keys and values of the longest row",
        "key_grads": "their cotangents",
        "waiting": "chunks that wait",
        "handed": "handed from stage to stage",
        "working": "activations of one layer",
        "head": "or head and loss",
        "packed": "or all layers of a standalone chunk",
    }
    lines = [f"memory of one device, GiB {'derived':>21} {'compiler':>10}"]
    if not derived.handed:
        del names["handed"]
    for field, name in names.items():
        lines.append(f"  {name:35} {_number(getattr(derived, field)):>9}")
    told = report.compiled and report.compiled.needed
    last = f"  {'all of these':35} {_number(derived.total):>9} {_number(told):>10}"
    return [*lines, last.rstrip(), _needed_line(report)]


def _number(value: int | None) -> str:
    return "" if value is None else f"{value / GIB:.3f}"


def _traffic_lines(report: Report) -> list[str]:
    if not report.traffic:
        return ["communication in a step: none"] if report.compiled else []
    bound = "at least, " if report.traffic_at_least else ""
    lines = [f"communication in a step, {bound}bytes received by one device"]
    for one in report.traffic:
        lines.append(
            f"  {one.kind:20} {one.count:>7,} x {_gib(one.bytes):>13}, largest "
            f"{one.largest} with {_gib(one.largest_bytes)}"
        )
    return lines


def _cost_lines(report: Report) -> list[str]:
    total = report.peak_flops_per_s * report.num_devices
    kept = max(report.checkpoints_kept, 1)
    lines = [
        (
            f"tokens: {report.batch_tokens:,} a step ({report.rows:,} rows of "
            f"{report.seq_tokens:,}), {report.num_steps:,} steps, "
            f"{report.tokens:,} in all"
        ),
        (
            f"FLOPs of a step: {report.step_flops:.4g} by formula "
            f"({report.step_flops_causal:.4g} with half of attention masked)"
        ),
    ]
    if not math.isnan(report.compiled_flops):
        lines.append(
            f"  {report.compiled_flops:.4g} on one device by the compiler, which "
            "counts the body of a loop once"
        )
    lines += [
        (
            f"checkpoint: {_gib(report.checkpoint_bytes)} on disk, "
            f"{_gib(kept * report.checkpoint_bytes)} for the {kept} kept"
        ),
        (
            f"time: {_duration(report.step_s)} a step, {_duration(report.run_s)} in "
            f"all, {report.batch_tokens / report.step_s:,.0f} tokens/s, ASSUMING "
            f"{report.assumed_mfu:.0%} of {total / 1e12:,.4g} TFLOP/s "
            f"({report.num_devices} x {report.peak_source})"
        ),
        f"compiled in {report.compile_s:.0f} s",
    ]
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "unknown time"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"
