# SPDX-License-Identifier: Apache-2.0
"""One process's part of a run between restore and exit: what the loop calls.

A handle on the run's files: metrics.jsonl, samples.jsonl, run.json, checkpoints, and
the progress line. Only process 0 writes them (checkpoints apart); every process takes
part in what runs on the mesh.

Units: as in metrics.jsonl (see `metrics`). Invariants: a line is logged before anything
that follows its step; after a resume the files hold nothing of steps that will be made
again.
Raises: config.InputError from the writer (full disk), manager.SaveError for a failed
save, both out of the loop.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import pathlib
import platform
import socket
import subprocess
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np

from qwen_jax import config, export, heldout, mesh, metrics, prepare, report, rng
from qwen_jax.checkpoint import agree, manager, timing
from qwen_jax.data import corpus, loader, tokenizer
from qwen_jax.eval import perplexity
from qwen_jax.fault import signals
from qwen_jax.models import decode, flops, sampling
from qwen_jax.optim import schedules
from qwen_jax.plan import chips
from qwen_jax.train import loop, state, step


class Session:
    """One process's part of a run between restore and exit: a handle on its files."""

    def __init__(
        self,
        exp,
        setup: prepare.Setup,
        command: str,
        go_on: str,
        workdir: pathlib.Path,
        vocabulary: tokenizer.Tokenizer,
        batches: loader.Loader,
        checkpoints: manager.Manager,
        stopper: signals.Stopper,
        say: Callable[[str], None],
        trackers: list[metrics.Tracker],
        show_progress: bool = True,
    ):
        self.exp, self.setup, self.workdir = exp, setup, workdir
        self.command, self.go_on = command, go_on
        self.vocabulary, self.batches = vocabulary, batches
        self.checkpoints, self.stopper, self.say = checkpoints, stopper, say
        self.trackers, self.show_progress = trackers, show_progress
        self.primary = jax.process_index() == 0
        every = exp.checkpoint
        self.timer = timing.Timer(every.every_s, timeout_s=every.timeout_s)
        self.tokens = self.skipped = 0.0
        self.made = 0  # steps made and logged
        self.tracing = False
        self.last_saved: int | None = None
        self.bytes_v = self._bytes_table()
        self.heldout: list[Any] | None = None

    def _bytes_table(self) -> jax.Array:
        lengths = np.zeros(self.exp.model.vocab_size, np.float32)
        known = self.vocabulary.token_bytes
        lengths[: len(known)] = known
        whole = mesh.sharding(self.setup.device_mesh, jax.P())
        return jax.make_array_from_callback(lengths.shape, whole, lambda i: lengths[i])

    def write_run_json(self, resolved: dict, sources: Any) -> None:
        """run.json: what ran, with what, where, and how to go on."""
        path = self.workdir / "run.json"
        old = json.loads(path.read_text()) if path.is_file() else {}
        facts = {
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain")),
            "config": resolved,
            "versions": _versions(),
            "mesh": dict(self.setup.device_mesh.shape),
            "device": self.setup.device_mesh.devices.flat[0].device_kind,
            "seed": self.exp.seed,
            "command": self.command,
            "resume_command": self.command,
            "host": socket.gethostname(),
            "machine": f"{platform.platform()}, {os.cpu_count()} cores",
            "started": old.get("started") or now(),
            "num_steps": self.setup.derivation.num_steps,
            "num_params": flops.num_params(self.exp.model),
            "derivation": list(self.setup.lines),
            "tokenizer": self.vocabulary.fingerprint,
        }
        if self.exp.eval.every_steps and self.exp.data.holdout_share:
            text = corpus.heldout_bytes(self.exp.data, self.vocabulary, sources=sources)
            facts["heldout_bytes"] = len(text)
            facts["gzip_bits_per_byte"] = perplexity.gzip_bits_per_byte(text)
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(facts, indent=1) + "\n")
        whole.replace(path)

    def train(
        self,
        now: state.State,
        place: prepare.Placer | prepare.ChunkPlacer,
        step_fn: Callable[..., Any],
        meta: dict[str, Any] | None,
    ) -> int:
        """The loop and what follows it; returns the number of steps made.

        `meta` is what the restored checkpoint says, None at the beginning.
        """
        exp, num_steps = self.exp, self.setup.derivation.num_steps
        self.place, self.skipped = place, float(now.skipped)
        if meta is not None:
            self.made, self.tokens = meta["step"], meta["tokens"]
        self.timer.restart(self.made)
        # All rates at once: asked for step by step, each would wait for the device.
        rate = jax.jit(schedules.make(exp.optim, num_steps))
        self.rates = np.asarray(rate(np.arange(num_steps, dtype=np.int32)))
        self._open_logs(self.made)
        hooks = loop.Hooks(
            log=self.log,
            save=self.save,
            save_due=self.save_due,
            evaluate=self.evaluate,
            evaluate_every=exp.eval.every_steps if exp.data.holdout_share else 0,
            sample=self.sample,
            sample_every=exp.sample.every_steps if exp.sample.prompts else 0,
            stop=self.stopper.should_stop,
            profile=self.profile,
        )
        # No batch is laid out that is not used: processes may do that together.
        left = itertools.islice(self.batches, max(num_steps - self.made, 0))
        stream = loop.prefetch(left, place, self.batches.state)
        failed = True
        try:
            self._make_up(hooks, now.params)
            self.stopper.begin()
            now, self.made = loop.loop(
                now,
                lambda s, batch: step_fn(s, batch, self.bytes_v),
                stream,
                first_step=self.made,
                num_steps=num_steps,
                hooks=hooks,
                max_skipped=exp.train.max_skipped,
            )
            if self.made == num_steps and exp.export:
                self.export(now.params)
            failed = False
        finally:
            stream.close()
            self.batches.close()
            self._end(num_steps, failed)
        return self.made

    def _open_logs(self, first_step: int) -> None:
        self.writer = self.progress = None
        if not self.primary:
            return
        path = self.workdir / "metrics.jsonl"
        self.writer = metrics.Writer(path, self.trackers, resume_step=first_step)
        event = "resume" if first_step else "start"
        self.writer.write(first_step, {"event": event, "time": now()})
        self._trim_samples(first_step)
        if self.show_progress:
            self.progress = metrics.Progress(self.setup.derivation.num_steps)
        if first_step:
            self._progress("saved", first_step)
        self.peak  # noqa: B018 - measured now, so that no step's time has it in

    def _make_up(self, hooks: loop.Hooks, weights: Any) -> None:
        """What the restored step still owes: a run may end between its save and its
        evaluation or samples."""
        step, owed = self.made, []
        if self.primary and step:
            rows = metrics.read(self.workdir / "metrics.jsonl")
            path = self.workdir / "samples.jsonl"
            texts = path.read_text().splitlines() if path.is_file() else []
            if not any(r["step"] == step and "eval_loss" in r for r in rows):
                owed.append("evaluation")
            if not any(_step(text) == step for text in texts):
                owed.append("samples")
        owed = agree.from_primary("qwen_jax/owed", owed, 600.0)
        last = step == self.setup.derivation.num_steps
        for what, every, make in (
            ("evaluation", hooks.evaluate_every, hooks.evaluate),
            ("samples", hooks.sample_every, hooks.sample),
        ):
            if what in owed and every and (step % every == 0 or last):
                make(step, weights)

    def _trim_samples(self, first_step: int) -> None:
        """Samples of steps that will be made again are dropped, as in metrics.jsonl."""
        path = self.workdir / "samples.jsonl"
        if path.is_file():
            lines = path.read_text().splitlines()
            kept = [x for x in lines if x.endswith("}") and _step(x) <= first_step]
            whole = path.with_suffix(".tmp")
            whole.write_text("".join(x + "\n" for x in kept))
            whole.replace(path)

    def _progress(self, method: str, *args: Any) -> None:
        if self.progress is not None:
            getattr(self.progress, method)(*args)

    def log(self, number: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and of the terminal."""
        exp = self.exp
        self.checkpoints.check()
        if (
            self.checkpoints.last_save
            and self.last_saved != self.checkpoints.last_save.step
        ):
            self.last_saved = self.checkpoints.last_save.step
            self._progress("saved", self.last_saved)
        self.made = number
        self.tokens += values["targets"]
        updates = number - 1 - round(self.skipped)  # a skipped step moves no schedule
        self.skipped += values["skipped"]
        if self.writer is None:
            return
        counted, length = values["places"], exp.data.seq_tokens
        if exp.train.chunk_tokens:  # whose padding and other documents are no work
            counted, length = counted - values["padding"], values["length"]
        work = flops.train_per_token(exp.model, length) * counted
        row = {
            "loss": values["loss"],
            "bits_per_byte": values["bits"] / max(values["bytes"], 1.0),
            "grad_norm": values["grad_norm"],
            "lr": float(self.rates[updates]),
            "tokens": self.tokens,
            "tokens_per_s": values["targets"] / values["step_s"],
            "mfu": work / values["step_s"] / self.peak,
            "step_s": values["step_s"],
            "data_s": values["data_s"],
            "skipped_steps": self.skipped,
            "padding_share": values["padding"] / values["places"],
            "epoch": self.batches.epoch,
        }
        if exp.train.z_loss:
            row["z_loss"] = values["z_loss"]
        if "mtp_loss" in values:
            row["mtp_loss"] = values["mtp_loss"]
        if exp.model.moe is not None:
            row |= {name: values[name] for name in step.ROUTER_METRICS}
        self.writer.write(number, row)
        self._progress("update", number, row)

    @functools.cached_property
    def peak(self) -> float:
        """FLOP/s of all devices, for MFU."""
        devices = self.setup.device_mesh.devices
        return chips.peak_flops_per_s(devices.flat[0])[0] * devices.size

    def save_due(self, number: int) -> bool:
        """Every so many steps, or when a time has passed (process 0's clock)."""
        every = self.exp.checkpoint.every_steps
        return bool(every and number % every == 0) or self.timer.due(number)

    def save(self, number: int, now: state.State, position: Any) -> None:
        """Start a checkpoint of step `number`."""
        stored = {"config": config.thaw(self.exp), "tokens": self.tokens}
        self.checkpoints.save(number, now, stored, local=position)
        self.timer.restart(number)

    def evaluate(self, number: int, weights: Any) -> None:
        """Held-out loss, into the metrics and on the terminal."""
        if self.heldout is None:
            self.heldout, self.eval_sums = heldout.opened(
                self.setup, self.vocabulary, self.batches.sources
            )
        scores = perplexity.evaluate(
            self.eval_sums, weights, self.heldout, self.bytes_v
        )
        if self.writer is not None:
            self.writer.write(number, scores)
        self._progress(
            "message",
            f"step {number}: held-out {scores['eval_bits_per_byte']:.3f} bits/byte, "
            f"loss {scores['eval_loss']:.3f}",
        )

    def sample(self, number: int, weights: Any) -> None:
        """Continue the prompts and print what came."""
        wanted, weights = self.exp.sample, prepare.whole_layers(self.setup, weights)
        seed = rng.seed_for(self.exp.seed, f"sample/{number}")
        ids = [
            [self.vocabulary.eos_id, *self.vocabulary.encode(text)]
            for text in wanted.prompts
        ]
        spec = dataclasses.replace(self.exp.model, eos_ids=(self.vocabulary.eos_id,))
        new = decode.generate(
            spec,
            weights,
            ids,
            max_tokens=wanted.max_tokens,
            sampling=[
                sampling.Sampling(wanted.temperature, top_p=0.95, seed=seed + i)
                for i in range(len(ids))
            ],
            rules=self.exp.rules,
        )
        if not self.primary:
            return
        lines = ""
        for prompt, tokens in zip(wanted.prompts, new, strict=True):
            text = self.vocabulary.decode(tokens)
            row = {"step": number, "prompt": prompt, "text": text}
            lines += json.dumps(row) + "\n"
            shown = (prompt + text).replace("\n", "\n    ")
            self._progress("message", f"  sample at step {number}:\n    {shown}")
        with (self.workdir / "samples.jsonl").open("ab", buffering=0) as file:
            file.write(lines.encode())  # one write: all samples of a step, or none

    def profile(self, number: int) -> None:
        """Start and stop the profiler around the asked steps."""
        first = self.exp.log.profile_from
        if first < 0 or not self.primary:
            return
        if number == first:
            jax.profiler.start_trace(self.workdir / "profile")
            self.tracing = True
        elif number == first + self.exp.log.profile_steps:
            self._end_profile()

    def _end_profile(self) -> None:
        if self.tracing:  # not where a run was resumed inside the window
            self.tracing = False
            jax.profiler.stop_trace()
            self._progress("message", f"profile written to {self.workdir / 'profile'}")

    def export(self, weights: Any) -> None:
        """The Hugging Face folder of the final weights."""
        weights = prepare.whole_layers(self.setup, weights)
        export.write(self.exp.model, weights, self.vocabulary, self.workdir / "export")

    def _end(self, num_steps: int, failed: bool) -> None:
        """Close what is open; say how the run ended and how it goes on.

        After a failure nothing here may hide it, or wait for a peer that is gone.
        """
        if failed:
            # When all processes end at once, what fails here failed because the others
            # had gone: then this does not return.
            self.stopper.close()
        self._end_profile()
        self._progress("close")
        try:
            if not failed:
                self.checkpoints.wait()
            elif jax.process_count() == 1:
                with contextlib.suppress(manager.SaveError):
                    self.checkpoints.wait()
        except manager.SaveError:
            failed = True
            raise
        finally:
            if self.writer is not None:
                self._close_logs(num_steps, failed)
        if not failed and self.made < num_steps and self.stopper.reason:
            self.say(
                f"stopped by {self.stopper.reason} after step {self.made}; saved; "
                f"{self.go_on}"
            )

    def _close_logs(self, num_steps: int, failed: bool) -> None:
        done = self.made == num_steps and not failed
        reason = "finished" if done else "error" if failed else self.stopper.reason
        event = {"event": "stop", "reason": reason, "time": now()}
        event["counters"] = self.batches.counters()
        with contextlib.suppress(*[config.InputError] if failed else []):
            self.writer.write(self.made, event)
        self.writer.close()
        try:
            report.write([self.workdir])
        except Exception as error:  # noqa: BLE001 - a picture of the run, not the run
            self.say(f"report.html was not written: {error}")


def _step(line: str) -> int:
    return json.loads(line)["step"]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str:
    """A fact of the repository the package lies in; "" outside of one."""
    here = pathlib.Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"python": platform.python_version()}
    for name in (*names, "tokenizers", "qwen_jax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
