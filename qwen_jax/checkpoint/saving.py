# SPDX-License-Identifier: Apache-2.0
"""One save: prepare the folder, write, vote, commit, retain. `manager.py` drives it.

The order, and why:
1. process 0 checks guard and free space and makes tmp.<step>; all learn the verdict, so
   that a save which cannot start is refused in every process alike (`begin`);
2. every process writes its shards and its local facts, then votes: one bad process
   makes all give the step up, within the vote instead of a barrier's time limit;
3. process 0 merges, writes meta.json and deals the files out; every process flushes and
   digests its share, then votes: one process alone would need hours for a terabyte;
4. process 0 writes the manifest, asks the guard once more and renames (`commit`);
5. only then does retention delete older steps;
6. all learn the verdict.

Raises: SaveError from `begin`; `finish` never raises but returns what went wrong.
"""

import dataclasses
import pathlib
import re
import shutil
import time
from collections.abc import Callable

import jax

from qwen_jax import config
from qwen_jax.checkpoint import agree, arrays, digests, manifest, steps

_MARGIN_BYTES = 4 << 20  # metadata files and block rounding, for the free-space check
_CLEAR_PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.5)


class SaveError(RuntimeError):
    """A checkpoint was not written; the older ones are untouched."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"checkpoint of step {step} was not saved: {reason}")
        self.step = step


@dataclasses.dataclass(frozen=True)
class Job:
    """Facts of one save under way."""

    folder: pathlib.Path  # the checkpoints folder
    step: int
    tag: str  # prefix of this save's exchanges between processes
    leaves: arrays.Table
    num_bytes: int
    meta_text: str
    local_text: str  # "" when this process has no facts of its own
    guard: Callable[[], None]
    timeout_s: float

    @property
    def temporary(self) -> pathlib.Path:
        return steps.temporary(self.folder, self.step)

    def reason(self, error: BaseException) -> str:
        """An exception as one line; with the fix for a full disk or a slow one."""
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, TimeoutError):
            text += (
                f" within checkpoint.timeout_s={self.timeout_s:g}; raise that if the "
                f"disk is only slow ({self.num_bytes:,} bytes)"
            )
        if re.search(r"No space left|quota exceeded", text):
            try:
                free = f"{shutil.disk_usage(self.folder).free:,}"
            except OSError:
                free = "unknown"
            text = (
                f"disk full ({self.num_bytes:,} bytes needed, {free} free now in "
                f"{self.folder}); free some space; {text}"
            )
        return text[:1000]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a save ended; the same on all processes unless one of them is lost."""

    wrong: str  # "" when the step is visible
    num_bytes: int
    gone: list[int]  # steps that retention deleted


def begin(job: Job) -> None:
    """Check the space and make the temporary folder; SaveError everywhere if not."""
    wrong = ""
    if jax.process_index() == 0:
        try:
            job.guard()
            steps.clear_temporary(job.folder)
            wrong = _no_room(job)
            if not wrong:
                (job.temporary / "arrays").mkdir(parents=True)
        except (OSError, config.InputError) as error:
            wrong = job.reason(error)
    wrong = agree.from_primary(f"{job.tag}/begin", wrong, job.timeout_s)
    if wrong:
        raise SaveError(job.step, wrong)


def _no_room(job: Job) -> str:
    """Why the save cannot fit on the disk, or ""."""
    needed = job.num_bytes + _MARGIN_BYTES
    free = shutil.disk_usage(job.folder).free
    if free >= needed:
        return ""
    return (
        f"it needs {needed:,} bytes and {free:,} are free in {job.folder}; free some "
        "space or lower checkpoint.keep"
    )


def finish(
    job: Job, futures: list, failed: str, retain: Callable[[], list[int]]
) -> Verdict:
    """Write, digest, commit on process 0, learn the verdict (in the save's thread).

    Args:
      futures: what `arrays.start_write` returned.
      failed: why it could not start in this process, or "".
      retain: deletes what retention gives up and returns those steps.
    """
    try:
        wrong = _vote(job, "written", failed or _write_own(job, futures))
        files: dict[str, list] = {}
        if not wrong:
            files, wrong = _digest(job)
        outcome = None
        if jax.process_index() == 0:
            outcome = _commit(job, files, wrong, retain)
        outcome = agree.from_primary(f"{job.tag}/verdict", outcome, job.timeout_s)
        return Verdict(*outcome)
    except Exception as error:  # noqa: BLE001 - becomes the SaveError of check()
        _clear(job)
        return Verdict(job.reason(error), 0, [])


def _vote(job: Job, name: str, mine: str) -> str:
    """What went wrong anywhere, or ""; the same on all processes."""
    votes = agree.gather(f"{job.tag}/{name}", mine, job.timeout_s)
    if len(votes) == 1:
        return mine
    return "; ".join(f"process {i}: {text}" for i, text in enumerate(votes) if text)


def _write_own(job: Job, futures: list) -> str:
    """Wait for this process's arrays, write its local facts; what failed or ""."""
    wrong = ""
    for future in futures:  # all of them: none may write into a folder cleared away
        try:
            future.result(timeout=job.timeout_s)
        except Exception as error:  # noqa: BLE001 - voted: all give the step up
            wrong = wrong or job.reason(error)
    try:
        if job.local_text and not wrong:
            name = f"local.{jax.process_index()}.json"
            (job.temporary / name).write_text(job.local_text, encoding="utf-8")
    except OSError as error:
        wrong = job.reason(error)
    return wrong


def _digest(job: Job) -> tuple[dict[str, list], str]:
    """Flush and digest every file once, all processes together.

    Returns:
      ({path: [bytes, sha256]}, what went wrong anywhere or ""); the records are those
      of all processes on process 0, and none elsewhere.
    """
    shares: list[list[str]] = []
    files: dict[str, list] = {}
    wrong = ""
    if jax.process_index() == 0:
        try:
            arrays.finish_write(job.temporary / "arrays")
            (job.temporary / "meta.json").write_text(job.meta_text, encoding="utf-8")
            shares = digests.deal(job.temporary)
        except Exception as error:  # noqa: BLE001 - all learn it
            wrong = job.reason(error)
    wrong = agree.from_primary(f"{job.tag}/dealt", wrong, job.timeout_s)
    if wrong:
        return {}, wrong
    try:
        files = digests.make(job.temporary, shares)
    except Exception as error:  # noqa: BLE001 - voted: all give the step up
        wrong = job.reason(error)
    wrong = _vote(job, "digested", wrong)
    if jax.process_index() == 0 and not wrong:
        try:
            files |= digests.collect(job.temporary, shares)
        except Exception as error:  # noqa: BLE001 - part of the verdict
            wrong = job.reason(error)
    return files, wrong


def _commit(
    job: Job, files: dict[str, list], wrong: str, retain: Callable[[], list[int]]
) -> list:
    """Make the step visible, or clear it away; the fields of a Verdict."""
    num_bytes, gone = 0, []
    if not wrong:
        try:
            num_bytes = manifest.write(job.temporary, job.step, job.leaves, files)
            job.guard()
            steps.commit(job.folder, job.step)
        except Exception as error:  # noqa: BLE001 - part of the verdict
            wrong = job.reason(error)
    if wrong:
        _clear(job)
    else:
        gone = retain()
    return [wrong, num_bytes, gone]


def _clear(job: Job) -> None:
    """Free a failed save's space (process 0), so that a full disk is not kept full.

    When one of Orbax's writes fails, its others may still be running and make their
    files anew; so look again for a while. What is left after that, the next save or
    the next start clears.
    """
    if jax.process_index() != 0:
        return
    for pause_s in _CLEAR_PAUSES_S:
        time.sleep(pause_s)
        shutil.rmtree(job.temporary, ignore_errors=True)
