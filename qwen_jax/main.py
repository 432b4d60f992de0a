# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax run`: builds the pieces of a training run and hands them to each other.

The only file that may import everything. `run` reads top to bottom in the order things
happen: what can be refused is refused before anything is compiled, the folder is locked
before anything is written, and what is restored is checked against the configuration
before arrays are read.

Files of a run folder: run.json (commit, configuration, versions, mesh, command),
metrics.jsonl, samples.jsonl, bad_records.jsonl, tokenizer/, checkpoints/, export/ (a
Hugging Face folder), report.html, run.lock.
Raises: config.InputError for the user's mistakes and for a save that fails (the command
line turns it into exit code 2).
"""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax

from qwen_jax import (
    checks,
    config,
    doctor,
    experiment,
    metrics,
    models,
    prepare,
    session,
)
from qwen_jax.checkpoint import agree, lock, manager, saving, steps
from qwen_jax.data import corpus, loader, source, tokenizer
from qwen_jax.fault import signals
from qwen_jax.train import loop, state


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
    slices: int = 1
    json: str = ""
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    distributed: bool = False
    exit_code_when_stopped: int = 0
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
    folder = doctor.compile_cache_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
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
      Exit code: `exit_code_when_stopped` when a signal asked for a stop and the state
      was saved; 0 when all steps are made.
    """
    if not 0 <= options.exit_code_when_stopped <= 255:
        raise config.InputError(
            f"--exit_code_when_stopped {options.exit_code_when_stopped}: wanted a "
            "number from 0 to 255, such as 75"
        )
    exp = experiment.resolve(options.config, list(options.overrides), options.data)
    if options.dry_run:
        from qwen_jax import dryrun

        return dryrun.main(exp, options)
    if not options.workdir:
        raise config.InputError("--workdir is needed: the folder of this run")
    if "://" in options.workdir:
        raise config.InputError(
            f"--workdir {options.workdir}: wanted a folder that every process of the "
            "run sees, not a URL; mount the bucket or share and give its path"
        )
    workdir = pathlib.Path(options.workdir).absolute()
    sources = source.open_sources(exp.data)  # missing files are told before JAX starts
    start_jax(options)
    primary = jax.process_index() == 0
    say = print if primary and not options.quiet else lambda *_: None
    with _ending_together():
        held = lock.acquire(workdir, options.takeover) if primary else None
        try:
            with signals.Stopper(at_once=_nothing_to_save(held, options)) as stopper:
                return _train(exp, options, workdir, sources, stopper, held, say)
        except saving.SaveError as error:
            raise config.InputError(f"{error}; then {_go_on(options)}") from error
        except loop.TooManySkipped as error:
            print(f"error: {error}; then {_go_on(options)}", file=sys.stderr)
            return 1
        finally:
            if held is not None:
                held.release()


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """A process of many that fails leaves at once: an ordinary exit would wait about
    100 s for its peers, and they for it."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, config.InputError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        if jax.process_index() == 0:
            time.sleep(1)  # the coordinator's end aborts the others: let them speak
        signals.leave(2 if isinstance(error, config.InputError) else 1)


def _nothing_to_save(held: lock.Lock | None, options: Options) -> Callable[[str], None]:
    """How a process ends when a signal comes before the first step: at once, since
    nothing is lost, and learning a vocabulary or compiling may take minutes."""

    def leave(reason: str) -> None:
        if held is not None:
            held.release()
        if jax.process_index() == 0:
            print(f"{reason}: nothing new to save; {_go_on(options)}", flush=True)
        signals.leave(options.exit_code_when_stopped)

    return leave


def _go_on(options: Options) -> str:
    return f"go on with:\n{_in_every_process(options, command(options))}"


def _train(
    exp: experiment.Experiment,
    options: Options,
    workdir: pathlib.Path,
    sources: Any,
    stopper: signals.Stopper,
    held: lock.Lock | None,
    say: Callable[[str], None],
) -> int:
    """What is refused is refused first; then compile, restore, train."""
    primary = jax.process_index() == 0
    checkpoints = manager.Manager(
        workdir / "checkpoints",
        keep=exp.checkpoint.keep,
        keep_every=exp.checkpoint.keep_every,
        guard=held.check if held else None,
        timeout_s=exp.checkpoint.timeout_s,
    )
    meta = None
    if steps.present(checkpoints.folder):  # all of them damaged is an error, no start
        meta = checkpoints.read_meta(checkpoints.newest_intact())
        exp = checks.with_stored(exp, meta["config"])
    exp, setup = prepare.set_up(exp)
    checks.chunk_memory(setup)
    resolved = config.thaw(exp)
    if meta is not None:
        checks.resume(meta, resolved, setup, workdir)
        began = meta["local"][0]["order"]["sources"]
        sources = source.under_names(sources, began)
    elif exp.train.init_from:
        checks.init_from(exp, say)
    trackers = metrics.trackers(exp.log.trackers, workdir) if primary else []
    for line in setup.lines:
        say(line)
    compiling = None
    if meta is None and not exp.tokenizer:
        checks.learnt_vocabulary(exp)
        compiling = _compile(setup)  # while the vocabulary is learnt
    vocabulary = _vocabulary(exp, workdir, sources, fresh=meta is None)
    checks.vocabulary(exp, vocabulary)
    if meta is None:
        checks.other_tokenizer(exp, vocabulary, say)
    checks.samples(exp, vocabulary)
    place = prepare.placer_of(setup, vocabulary.token_bytes)
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
    if meta is not None:
        batches.restore(loader.merge_states(_distinct(meta["local"])))
        checks.stages(meta, exp, sources)
    batches.start()
    compiling = compiling or _compile(setup)
    with jax.set_mesh(setup.device_mesh):
        if meta is not None:
            now, meta = _restored(setup, checkpoints, meta["step"])
            say(f"resuming {workdir} after step {meta['step']}")
        else:
            now = _fresh(exp, setup)
        part = session.Session(
            exp,
            setup,
            command(options),
            _go_on(options),
            workdir,
            vocabulary,
            batches,
            checkpoints,
            stopper,
            say,
            trackers,
            show_progress=not options.quiet,
        )
        if primary:
            part.write_run_json(resolved, sources)
        made = part.train(now, place, compiling.result(), meta)
    checkpoints.close()
    if made < setup.derivation.num_steps:
        return options.exit_code_when_stopped
    say(f"finished {made} steps; run folder: {workdir}")
    say(next_commands(options, workdir, exp))
    return 0


def _restored(setup: prepare.Setup, checkpoints: manager.Manager, step: int) -> Any:
    """(state, meta) of a checkpoint, whatever the mesh; later ones are dropped."""
    target = state.abstract(
        setup.exp.model, setup.tx, setup.device_mesh, setup.exp.rules
    )
    now, meta = checkpoints.restore(target, step)
    checkpoints.drop_after(meta["step"])
    return now, meta


def _compile(setup: prepare.Setup) -> futures.Future:
    """The compiled step, made in a thread (XLA lets the others run)."""
    return futures.ThreadPoolExecutor(1).submit(prepare.compile_step, setup)


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


def _fresh(exp: experiment.Experiment, setup: prepare.Setup) -> state.State:
    """The state of step 0: random weights, or those of a model folder."""
    weights = None
    if exp.train.init_from:
        _, weights = models.load(
            exp.train.init_from,
            dtype=exp.model.param_dtype,
            parts="text" if exp.model.vision is None else "all",
            device_mesh=setup.device_mesh,
            rules=exp.rules,
        )
    return state.create(
        exp.model, setup.tx, setup.device_mesh, exp.rules, exp.seed, weights
    )


def _vocabulary(
    exp: experiment.Experiment, workdir: pathlib.Path, sources: Any, *, fresh: bool
) -> tokenizer.Tokenizer:
    """The run's tokenizer; learnt by process 0 where it has to be learnt.

    In a fresh run one that is there is of a run that never saved, perhaps of other
    settings: it is dropped, unless it is what was asked for.
    """
    folder, wrong = workdir / "tokenizer", ""
    if jax.process_index() == 0:
        asked = pathlib.Path(exp.tokenizer).resolve()
        if fresh and not asked.is_relative_to(folder.resolve()):
            (folder / "tokenizer.json").unlink(missing_ok=True)
        data = dataclasses.replace(exp.data, tokenizer=exp.tokenizer)
        try:
            corpus.prepare_tokenizer(data, folder, sources=sources)
        except config.InputError as error:
            wrong = str(error)
    wrong = agree.from_primary("qwen_jax/tokenizer", wrong, 3600.0)
    if wrong:
        raise config.InputError(wrong)
    return tokenizer.load(folder)


def program() -> str:
    """The command as it can be typed here: by its name, or by its place in a venv that
    is not activated."""
    beside = pathlib.Path(sys.executable).with_name("qwen-jax")
    if shutil.which("qwen-jax") or not beside.is_file():
        return "qwen-jax"
    here = os.path.relpath(beside)
    return str(beside) if here.startswith("..") else here


def command(options: Options) -> str:
    """The command line that resumes this run; of several processes, that of each, with
    I in the place of its number."""
    parts = [program(), "run", "--config", options.config]
    parts += ["--workdir", options.workdir]
    if options.data:
        parts += ["--data", options.data]
    parts += [f"--config.{key}={value}" for key, value in options.overrides]
    if options.coordinator:
        parts += ["--coordinator", options.coordinator]
        parts += ["--num_processes", str(options.num_processes)]
        one = str(options.process_id)
        parts += ["--process_id", "I" if options.num_processes > 1 else one]
    elif options.distributed or options.num_processes > 1:
        parts.append("--distributed")
    return shlex.join(parts)


def _in_every_process(options: Options, line: str) -> str:
    """A command as it is printed, and where to give it if that is not here alone."""
    count, where = options.num_processes, ""
    if options.coordinator and count > 1:
        where = f"\n  in each of the {count} processes, with I = 0 to {count - 1}"
    elif not options.coordinator and (options.distributed or count > 1):
        where = "\n  in every process of the job"
    return f"  {line}{where}"


def next_commands(options: Options, workdir: pathlib.Path, exp) -> str:
    """What a user does after a run, ready to paste."""
    shown = shlex.quote(options.workdir)
    prompt = shlex.quote(exp.sample.prompts[0] if exp.sample.prompts else "Once")
    longer = 2 * exp.train.num_steps if exp.train.num_steps else 0
    more = f" --config.train.num_steps={longer}" if longer else "        # resumes"
    return (
        "next:\n"
        f"  {program()} generate --model {shown}/export --prompt {prompt}\n"
        f"  {program()} report {shown}        # writes {shown}/report.html\n"
        + _in_every_process(options, command(options) + more)
    )
