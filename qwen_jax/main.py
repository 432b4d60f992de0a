# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax run`: builds the pieces of a training run and hands them to each other.

The only file that may import everything. `run` reads top to bottom in the order things
happen: what can be refused is refused before anything is compiled, the folder is locked
before anything is written, and what is restored is checked against the configuration
before arrays are read.

Files of a run folder: run.json (commit, configuration, versions, mesh, command),
metrics.jsonl, samples.jsonl, bad_records.jsonl, tokenizer/, checkpoints/, export/ (a
Hugging Face folder), report.html, run.lock.
Raises: config.InputError for the user's mistakes (the command line turns it into exit
code 2), checkpoint.manager.SaveError when the last save fails.
"""

import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax

from qwen_jax import config, experiment, models, prepare, session
from qwen_jax.checkpoint import agree, compatible, lock, manager
from qwen_jax.data import corpus, loader, source, tokenizer
from qwen_jax.fault import signals
from qwen_jax.models import decoder
from qwen_jax.train import state


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says besides the configuration."""

    config: str
    workdir: str = ""
    overrides: tuple[tuple[str, str], ...] = ()
    data: str = ""
    takeover: bool = False
    dry_run: bool = False
    topology: str = ""
    json: str = ""
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    distributed: bool = False
    quiet: bool = False


def start_jax(options: Options) -> None:
    """Join the other processes, if any; turn the private compile cache on."""
    if options.coordinator or options.distributed or options.num_processes > 1:
        given = {}
        if options.coordinator:
            given = {
                "coordinator_address": options.coordinator,
                "num_processes": options.num_processes,
                "process_id": options.process_id,
            }
        try:
            jax.distributed.initialize(**given, initialization_timeout=300)
        except (RuntimeError, ValueError) as error:
            raise config.InputError(
                f"joining the other processes failed: {str(error).splitlines()[0]}; "
                "check --coordinator HOST:PORT, --num_processes and --process_id"
            ) from error
    use_compile_cache()


def use_compile_cache() -> pathlib.Path | None:
    """Compiled programs are kept in a folder only this user can read and write: what
    lies there is run as code. JAX_COMPILATION_CACHE_DIR names another, "" none."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named == "":
        return None
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(named or os.path.join(root, "qwen_jax", "compile"))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not named:
            folder.chmod(0o700)
    except OSError as error:
        print(f"compile cache {folder} is off: {error}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def run(options: Options) -> int:
    """Train as the experiment file says; resume when the folder has checkpoints.

    Returns:
      Exit code: 0 also when a signal asked for a stop and the state was saved.
    """
    exp = experiment.resolve(options.config, list(options.overrides), options.data)
    if options.dry_run:
        from qwen_jax import dryrun

        return dryrun.main(exp, options)
    if not options.workdir:
        raise config.InputError("--workdir is needed: the folder of this run")
    workdir = pathlib.Path(options.workdir).absolute()
    sources = source.open_sources(exp.data)  # missing files are told before JAX starts
    start_jax(options)
    primary = jax.process_index() == 0
    held = lock.acquire(workdir, options.takeover) if primary else None
    say = print if primary and not options.quiet else lambda *_: None
    try:
        with signals.Stopper(grace_s=None) as stopper:
            return _train(exp, options, workdir, sources, stopper, held, say)
    finally:
        if held is not None:
            held.release()


def _train(
    exp: experiment.Experiment,
    options: Options,
    workdir: pathlib.Path,
    sources: Any,
    stopper: signals.Stopper,
    held: lock.Lock | None,
    say: Callable[[str], None],
) -> int:
    primary = jax.process_index() == 0
    checkpoints = manager.Manager(
        workdir / "checkpoints",
        keep=exp.checkpoint.keep,
        keep_every=exp.checkpoint.keep_every,
        guard=held.check if held else None,
    )
    meta = None
    if checkpoints.latest() is not None:
        meta = checkpoints.read_meta(checkpoints.newest_intact())
        exp = _with_stored(exp, meta["config"])
    exp, setup = prepare.set_up(exp)
    resolved = config.thaw(exp)
    if meta is not None:
        compatible.refuse(
            meta["config"], resolved, experiment.MAY_CHANGE, where=str(workdir)
        )
    for line in setup.lines:
        say(line)
    # The step is compiled while the vocabulary is learnt and the data is opened.
    compiling = futures.ThreadPoolExecutor(1).submit(prepare.compile_step, setup)
    vocabulary = _vocabulary(exp, workdir, sources)
    _check_vocabulary(exp, vocabulary)
    place = prepare.placer(
        setup.device_mesh, exp.rules, setup.batch.rows, setup.batch.micro_steps
    )
    batches = loader.Loader(
        exp.data,
        vocabulary,
        batch_rows=setup.batch.rows,
        seed=exp.seed,
        process_index=place.index,
        process_count=place.count,
        sources=sources,
        bad_records_path=workdir / _own("bad_records.jsonl"),
    )
    first_step, now = 0, None
    with jax.set_mesh(setup.device_mesh):
        if meta is not None:
            target = state.abstract(exp.model, setup.tx, setup.device_mesh, exp.rules)
            now, meta = checkpoints.restore(target, meta["step"])
            first_step = meta["step"]
            checkpoints.drop_after(first_step)
            batches.restore(loader.merge_states(_distinct(meta["local"])))
            say(f"resuming {workdir} after step {first_step}")
        batches.start()
        if now is None:
            now = _fresh(exp, setup)
        part = session.Session(
            exp,
            setup,
            command(options),
            workdir,
            vocabulary,
            batches,
            checkpoints,
            stopper,
            say,
            show_progress=not options.quiet,
        )
        if primary:
            part.write_run_json(resolved, sources)
        made = part.train(now, place, compiling.result(), first_step)
    checkpoints.close()
    if made == setup.derivation.num_steps:
        say(f"finished {made} steps; run folder: {workdir}")
        say(next_commands(options, workdir, exp))
    return 0


def _own(name: str) -> str:
    """The name of a file that each process writes for itself."""
    index = jax.process_index()
    stem, dot, suffix = name.partition(".")
    return name if index == 0 else f"{stem}-{index}{dot}{suffix}"


def _distinct(states: list[dict]) -> list[dict]:
    """Data states without repetitions (processes that share rows read the same)."""
    seen, out = set(), []
    for one in states:
        key = tuple(one["lanes"])
        if key not in seen:
            seen.add(key)
            out.append(one)
    return out


def _with_stored(exp: experiment.Experiment, stored: dict) -> experiment.Experiment:
    """What the run left open takes the values it was started with."""
    optim, train = exp.optim, exp.train
    if not optim.lr_peak:
        optim = dataclasses.replace(optim, lr_peak=stored["optim"]["lr_peak"])
    if optim.warmup_steps < 0:
        optim = dataclasses.replace(optim, warmup_steps=stored["optim"]["warmup_steps"])
    return dataclasses.replace(exp, optim=optim, train=train)


def _fresh(exp: experiment.Experiment, setup: prepare.Setup) -> state.State:
    """The state of step 0: random weights, or those of a model folder."""
    weights = None
    if exp.train.init_from:
        loaded, weights = models.load(
            exp.train.init_from,
            dtype=exp.model.param_dtype,
            device_mesh=setup.device_mesh,
            rules=exp.rules,
        )
        same = dataclasses.replace(
            loaded,
            compute_dtype=exp.model.compute_dtype,
            attention=exp.model.attention,
            max_positions=exp.model.max_positions,
        )
        if decoder.decoder_params(same) != decoder.decoder_params(exp.model):
            lines = config.diff(config.thaw(loaded), config.thaw(exp.model))
            raise config.InputError(
                f"{exp.train.init_from} is not the model of this run: "
                + "; ".join(f"{k}: {a} there, {b} here" for k, a, b in lines)
            )
    return state.create(
        exp.model, setup.tx, setup.device_mesh, exp.rules, exp.seed, weights
    )


def _vocabulary(exp, workdir: pathlib.Path, sources: Any) -> tokenizer.Tokenizer:
    """The run's tokenizer; learnt by process 0 where it has to be learnt."""
    folder, wrong = workdir / "tokenizer", ""
    if jax.process_index() == 0:
        try:
            corpus.prepare_tokenizer(exp.data, folder, sources=sources)
        except config.InputError as error:
            wrong = str(error)
    wrong = agree.from_primary("qwen_jax/tokenizer", wrong, 3600.0)
    if wrong:
        raise config.InputError(wrong)
    return tokenizer.load(folder)


def _check_vocabulary(exp, vocabulary: tokenizer.Tokenizer) -> None:
    if vocabulary.vocab_size > exp.model.vocab_size:
        raise config.InputError(
            f"the tokenizer has {vocabulary.vocab_size:,} ids, the model's vocabulary "
            f"{exp.model.vocab_size:,}: set --config.model.vocab_size="
            f"{vocabulary.vocab_size} or another tokenizer"
        )


def command(options: Options) -> str:
    """The command line that resumes this run."""
    parts = ["qwen-jax", "run", "--config", options.config]
    parts += ["--workdir", options.workdir]
    if options.data:
        parts += ["--data", options.data]
    parts += [f"--config.{key}={value}" for key, value in options.overrides]
    if options.coordinator:
        parts += ["--coordinator", options.coordinator]
        parts += ["--num_processes", str(options.num_processes)]
        parts += ["--process_id", str(options.process_id)]
    elif options.distributed:
        parts.append("--distributed")
    return shlex.join(parts)


def next_commands(options: Options, workdir: pathlib.Path, exp) -> str:
    """What a user does after a run, ready to paste."""
    shown = shlex.quote(options.workdir)
    prompt = shlex.quote(exp.sample.prompts[0] if exp.sample.prompts else "Once")
    longer = 2 * exp.train.num_steps if exp.train.num_steps else 0
    more = f"  {command(options)} --config.train.num_steps={longer}\n" if longer else ""
    return (
        "next:\n"
        f"  qwen-jax generate --model {shown}/export --prompt {prompt}\n"
        f"  qwen-jax report {shown}        # writes {shown}/report.html\n"
        + (f"{more}" if more else f"  {command(options)}        # resumes\n")
    ).rstrip()
