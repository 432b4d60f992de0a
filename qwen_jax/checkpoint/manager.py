# SPDX-License-Identifier: Apache-2.0
"""Asynchronous, atomic, self-checking checkpoints of a pytree plus JSON facts.

`save` copies the arrays to host memory and returns; a thread writes them, then on
process 0 a manifest with the digest of every file, and one rename makes the step
visible. `restore` checks the digests and falls back to the newest intact step. All
processes of a run call the same methods in the same order.

Source: Orbax writes and reads the arrays (see `arrays.py` for the deviation).
Files: see `steps.py` (folder layout) and `manifest.py` (when a step counts).
Invariants:
- A step is wholly visible or invisible, on every process; `latest()` never names a step
  that is not finished, and retention never removes the last good one.
- Once `save` returned, its leaves may be donated or overwritten.
- At most one save is in flight; a second one waits for the first.
- A save that fails leaves all older steps as they were, frees its own space, and is
  raised by the next `check`, `wait` or `close`: call `check()` once a step.
Raises: SaveError (a save did not succeed; training may go on), config.InputError
(nothing to restore, damaged step asked for by number, leaves that do not fit).
"""

import dataclasses
import itertools
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax

from qwen_jax import config
from qwen_jax.checkpoint import agree, arrays, catalog, saving, steps

SaveError = saving.SaveError
_instances = itertools.count()  # the same in every process: creation is collective


@dataclasses.dataclass(frozen=True)
class Saved:
    """Facts of the last finished save."""

    step: int
    bytes: int
    blocked_s: float  # how long the caller of save() waited
    total_s: float


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Manager:
    """A handle on one checkpoints folder.

    Args:
      folder: created when missing; on shared storage when there are many processes.
      keep: how many of the newest good steps stay (at least 1).
      keep_every: steps divisible by this stay for ever (0: none).
      read_only: look and restore only; touches nothing, so it may open the folder of a
        run that is training.
      compress: zstd; 1.08x smaller on real weights, slower to write.
      ocdbt: pack arrays in few large files: for object stores and thousands of shards;
        a damaged file is then named, but not its leaf.
      guard: called on process 0 right before files become visible or are removed;
        raises InputError when this run may no longer write (`lock.Lock.check`).
      say: receives one-line notices (fallback, slow disk) on process 0.
      timeout_s: how long a save may wait for the disk and for the other processes.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        keep_every: int = 0,
        read_only: bool = False,
        compress: bool = False,
        ocdbt: bool = False,
        guard: Callable[[], None] | None = None,
        say: Callable[[str], None] = _print,
        timeout_s: float = 600.0,
    ):
        if keep < 1 or keep_every < 0:
            raise config.InputError(
                f"checkpoint.keep={keep}, keep_every={keep_every}: keep must be at "
                "least 1 and keep_every 0 (off) or more"
            )
        self.folder = pathlib.Path(folder).absolute()
        self.last_save: Saved | None = None
        self._keep, self._keep_every = keep, keep_every
        self._read_only = read_only
        self._compress, self._ocdbt = compress, ocdbt
        self._guard = guard or (lambda: None)
        self._primary = jax.process_index() == 0
        self._say = say if self._primary else (lambda text: None)
        self._timeout_s = timeout_s
        instance = next(_instances)
        self._tags = (
            f"qwen_jax/checkpoint/{instance}/{number}" for number in itertools.count()
        )
        self._save_tags: list[str] = []
        self._thread: threading.Thread | None = None
        self._pending: SaveError | None = None
        self._said_slow = False
        self._catalog = catalog.Catalog(self.folder, self._tags, self._say, timeout_s)
        self._catalog.open(read_only=read_only)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Looking

    def all_steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        if self._read_only:
            self._catalog.scan()
        return list(self._catalog.good)

    def latest(self) -> int | None:
        """The newest step that can be restored."""
        return max(self.all_steps(), default=None)

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON facts of a step (newest when None), its arrays unread."""
        return self._catalog.checked_meta(step)

    def newest_intact(self, step: int | None = None) -> int:
        """The newest step whose files all have the right digests (collective).

        Reads the files, so that a damaged checkpoint is known before anything is
        compiled; `restore` does not read them a second time.
        """
        self._settle()
        return self._catalog.choose(step, verify=True)[0]

    # Saving

    def save(
        self,
        step: int,
        tree: Any,
        meta: Mapping[str, Any],
        *,
        local: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Start saving `tree` and `meta` as `step` (collective).

        Args:
          step: 0 or more; a step that exists is replaced atomically.
          tree: pytree of arrays (see `arrays.py`), any sharding.
          meta: JSON facts, the same on all processes; "step" is added.
          local: JSON facts of this process alone (a data reader's position); `restore`
            gives them back as meta["local"], a list in process order. All or none of
            the processes give it.
          wait: return only when the step is visible, raising if it failed.
        Raises:
          SaveError: this save could not start (no space, folder gone); the same on all
            processes. An earlier save's failure is raised by `check`, not here.
        """
        started_s = time.monotonic()
        if self._read_only:
            raise config.InputError(f"{self.folder} was opened read-only: cannot save")
        leaves = arrays.named_leaves(tree)
        job = saving.Job(
            folder=self.folder,
            step=_checked_step(step, meta),
            tag=self._next_save_tag(),
            leaves=arrays.table(leaves),
            num_bytes=arrays.total_bytes(leaves),
            meta_text=_json_text("meta", {**meta, "step": step}),
            local_text="" if local is None else _json_text("local", local),
            guard=self._guard,
            timeout_s=self._timeout_s,
        )
        self._settle(for_step=step)
        saving.begin(job)
        futures, failed = [], ""
        try:
            futures = arrays.start_write(
                job.temporary / "arrays",
                leaves,
                ocdbt=self._ocdbt,
                compress=self._compress,
            )
        except Exception as error:  # noqa: BLE001 - all learn it; check() raises it
            failed = job.reason(error)
        blocked_s = time.monotonic() - started_s
        self._thread = threading.Thread(
            target=self._finish,
            args=(job, futures, failed, started_s, blocked_s),
            name=f"checkpoint-{step}",
        )
        self._thread.start()
        if wait:
            self.wait()

    def check(self) -> None:
        """Raise the failure of a save that has ended, once; costs nothing otherwise."""
        if self._thread is not None and not self._thread.is_alive():
            self._settle()
        self._raise_pending()

    def wait(self) -> None:
        """Wait until the save in flight is visible; raise if it failed."""
        self._settle()
        self._raise_pending()

    def close(self) -> None:
        """Wait for the save in flight; raise if it failed."""
        self.wait()

    def drop_after(self, step: int) -> list[int]:
        """Delete steps newer than `step` (collective), before training goes on from it.

        Without this, a run that goes on from an older step would leave the steps of
        the abandoned course as its newest ones.
        """
        self._settle()
        known = (*self._catalog.good, *self._catalog.damaged)
        doomed = sorted((s for s in known if s > step), reverse=True)
        wrong = ""
        if self._primary:
            try:
                self._guard()
                for newer in doomed:
                    steps.delete(self.folder, newer)
            except (OSError, config.InputError) as error:
                wrong = str(error)
        wrong = agree.from_primary(next(self._tags), wrong, self._timeout_s)
        if wrong:
            raise config.InputError(f"cannot delete steps after {step}: {wrong}")
        self._catalog.forget(doomed)
        return doomed

    def _raise_pending(self) -> None:
        error, self._pending = self._pending, None
        if error is not None:
            raise error

    def _next_save_tag(self) -> str:
        """A tag for a save's exchanges; drops those of two saves ago.

        Every process that has voted on the previous save has learnt the verdict of the
        one before it, so nobody reads those texts any more.
        """
        self._save_tags.append(next(self._tags))
        if len(self._save_tags) > 3:
            agree.forget(self._save_tags.pop(0))
        return self._save_tags[-1]

    def _settle(self, for_step: int | None = None) -> None:
        """Join the save in flight; its failure stays pending."""
        if self._thread is None:
            return
        started_s = time.monotonic()
        self._thread.join()
        self._thread = None
        waited_s = time.monotonic() - started_s
        last = self.last_save
        if for_step is not None and waited_s > 1 and last and not self._said_slow:
            self._said_slow = True
            self._say(
                f"checkpoint: step {for_step} waited {waited_s:.1f} s for the save of "
                f"step {last.step} ({last.bytes / last.total_s / 1e9:.2f} GB/s): save "
                "less often or to a faster disk"
            )

    def _finish(
        self,
        job: saving.Job,
        futures: list,
        failed: str,
        started_s: float,
        blocked_s: float,
    ) -> None:
        """The save's thread: everything after the copy to host memory."""
        verdict = saving.finish(job, futures, failed, lambda: self._retain(job.step))
        if verdict.wrong:
            self._pending = SaveError(job.step, verdict.wrong)
            return
        self._catalog.forget(verdict.gone)
        self._catalog.add(job.step)
        total_s = time.monotonic() - started_s
        self.last_save = Saved(job.step, verdict.num_bytes, blocked_s, total_s)

    def _retain(self, newest: int) -> list[int]:
        """Delete what retention gives up, now that `newest` is safe; steps deleted."""
        good = sorted({*self._catalog.good, newest})
        doomed = steps.to_delete(good, self._keep, self._keep_every)
        oldest_kept = min(step for step in good if step not in doomed)
        doomed += [s for s in self._catalog.damaged if s < oldest_kept]
        gone = []
        for step in doomed:
            try:
                if steps.path(self.folder, step).exists():
                    steps.delete(self.folder, step)
            except OSError as error:
                # The new step is safe; this one is tried again after the next save.
                self._say(f"checkpoint: cannot delete step {step}: {error}")
                continue
            gone.append(step)
        return gone

    # Restoring

    def restore(
        self,
        abstract_tree: Any,
        step: int | None = None,
        *,
        verify: bool = True,
        subset: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """(tree, meta) of a step onto the shardings of `abstract_tree` (collective).

        Args:
          abstract_tree: jax.ShapeDtypeStruct leaves with shardings, of any mesh and
            process count (see `arrays.read` for other leaves).
          step: None takes the newest intact step and says which were passed over.
          verify: read all needed files first and compare their digests.
          subset: leaves of the checkpoint that are not in `abstract_tree` are left
            (parameters without the optimizer's state).
        Raises: config.InputError as told in the module docstring.
        """
        self._settle()
        if self._read_only:
            self._catalog.scan()
        wanted = arrays.table(arrays.named_leaves(abstract_tree))
        while True:
            chosen, content = self._catalog.choose(
                step, verify=verify, wanted=wanted if subset else None
            )
            lines = arrays.mismatches(content["leaves"], wanted, subset=subset)
            if lines:
                raise config.InputError(_mismatch_text(self.folder, chosen, lines))
            tree, meta, error = None, {}, None
            try:
                folder = steps.path(self.folder, chosen) / "arrays"
                tree = arrays.read(folder, abstract_tree)
                meta = self._catalog.load_meta(chosen)
            except Exception as caught:  # noqa: BLE001 - raised below
                error = caught
            votes = agree.gather(
                next(self._tags), repr(error) if error else "", self._timeout_s
            )
            if not any(votes):
                return tree, meta
            # Was it the files (then an older step will do), or something else?
            wrong = self._catalog.inspect_again(chosen)
            if not wrong:
                raise error or RuntimeError(f"restore failed elsewhere: {votes}")
            self._catalog.pass_over(chosen, wrong, asked=step)


def _mismatch_text(folder: pathlib.Path, step: int, lines: list[str]) -> str:
    shown = "\n  ".join(lines[:20])
    more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
    return (
        f"checkpoint step {step} in {folder} does not fit this model or optimizer; "
        f"{len(lines)} leaves differ:\n  {shown}{more}\n"
        "use the configuration the checkpoint was made with, or another --workdir"
    )


def _checked_step(step: int, meta: Mapping[str, Any]) -> int:
    if not isinstance(step, int) or step < 0:
        raise config.InputError(f"checkpoint step {step!r}: wanted an int, 0 or more")
    if meta.get("step", step) != step:
        raise config.InputError(
            f"meta has step {meta['step']} in a save of step {step}"
        )
    return step


def _json_text(what: str, facts: Mapping[str, Any]) -> str:
    try:
        return json.dumps(facts, indent=1)
    except (TypeError, ValueError) as error:
        raise config.InputError(
            f"checkpoint {what} is not JSON: {error}; arrays belong into the tree"
        ) from error
