# SPDX-License-Identifier: Apache-2.0
"""One writer per run folder, and whether the folder can be written at all.

Two runs that write one folder destroy each other's checkpoints and metrics, and nobody
notices before the restore. `acquire` therefore holds a lock for the life of the run.

Format: `run.lock` holds one JSON object (pid, host, boot, namespace, ticks, job,
started, command) and is held by `flock`. Two means, because each alone is wrong
somewhere: the kernel drops a dead process's flock, but a forked child may keep it alive
and some network file systems do not pass it between machines; the JSON says who it was.
Rules: a holder that is provably dead (same machine, process gone, machine restarted) is
replaced silently; one on another machine cannot be checked and needs `takeover`, unless
both are of one scheduler's job, which starts a job again only after it has ended it; a
run whose lock was taken over learns it from `Lock.check`. The job is QWEN_JAX_JOB or
Slurm's job number.
Invariants: of the processes of one machine at most one passes; a run of many processes
takes the lock in process 0 only. The file stays after `release`, empty.
Raises: config.InputError naming the holder or the fault of the folder, and the fix.
"""

import dataclasses
import datetime
import errno
import fcntl
import json
import os
import pathlib
import shlex
import socket
import sys
import tempfile
from typing import Any, Self

from qwen_jax import config

NAME = "run.lock"


@dataclasses.dataclass
class Lock:
    """A held lock; keep it until the run ends."""

    path: pathlib.Path
    handle: int | None

    def check(self) -> None:
        """Raise InputError if another run has taken the folder over."""
        if self.handle is None:
            raise config.InputError(f"{self.path} was released by this run")
        try:
            same = os.stat(self.path).st_ino == os.fstat(self.handle).st_ino
        except FileNotFoundError:
            same = False
        if not same:
            holder = _describe(_parse(_text(str(self.path))))
            raise config.InputError(
                f"this run lost {self.path}: {holder} took the folder over; this run "
                "must not write there any more"
            )

    def release(self) -> None:
        """Give the folder free; twice is fine."""
        if self.handle is None:
            return
        handle, self.handle = self.handle, None
        # Emptying our own inode cannot hurt a run that took the path over.
        os.ftruncate(handle, 0)
        try:
            # A forked child shares our flock; closing alone would leave it with him.
            fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(workdir: str | os.PathLike, takeover: bool = False) -> Lock:
    """Take the lock of a run folder, which is made and checked first.

    Args:
      workdir: the run folder.
      takeover: the user says that the holder is dead or must yield.
    """
    folder = pathlib.Path(workdir).absolute()
    check_writable(folder)
    path = folder / NAME
    # Acquiring is serialized by a flock on the folder itself: without it two takers of
    # one dead run's lock could each replace the other's new file.
    mutex = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _flock(mutex, wait=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            free = _flock(handle)
            holder = _parse(os.pread(handle, 1 << 16, 0).decode("utf-8", "replace"))
            if not takeover and not _may_take(holder, free):
                raise config.InputError(_refusal(folder, holder))
            elsewhere = holder and holder.get("host") != socket.gethostname()
            if takeover or not free or elsewhere:
                # The old holder's flock (or its orphan's) sits on this inode and its
                # owner may still live: a new file, by which it learns the loss.
                os.close(handle)
                handle = _replace(path)
            _write(handle, _myself())
        except BaseException:
            os.close(handle)
            raise
    finally:
        os.close(mutex)
    return Lock(path, handle)


def _flock(handle: int, wait: bool = False) -> bool:
    """Whether the file is ours now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return True  # a file system without flock: the JSON alone decides
        raise
    return True


def _replace(path: pathlib.Path) -> int:
    """A new lock file in place of the old one, held before it has the name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{NAME}.")
    _flock(handle)
    os.rename(name, path)
    return handle


def _may_take(holder: dict[str, Any], free: bool) -> bool:
    """Whether the lock may be taken without asking: nobody can still be writing."""
    if not holder:
        return free
    me = _myself()
    if holder.get("host") != me["host"]:
        return bool(me["job"]) and holder.get("job") == me["job"]
    if holder.get("boot") != me["boot"]:
        return True  # this machine has restarted since
    if holder.get("namespace") != me["namespace"]:
        return free  # another container here: its pids mean nothing, its flock does
    # Same machine: alive only if that pid still is the process that took the lock.
    return _start_ticks(holder.get("pid", 0)) != holder.get("ticks")


def _refusal(folder: pathlib.Path, holder: dict[str, Any]) -> str:
    local = holder.get("host") == socket.gethostname()
    pid = holder.get("pid")
    fix = f"stop it (kill {pid}) or use another" if local and pid else "use another"
    return (
        f"{folder} is in use by {_describe(holder)}; {fix} --workdir; if that run is "
        "surely dead, add --takeover"
    )


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run (its details are not written yet)"
    return (
        f"pid {holder.get('pid')} on host {holder.get('host')} since "
        f"{holder.get('started')} ({holder.get('command')})"
    )


def _myself() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "ticks": _start_ticks(os.getpid()),
        "job": _job(),
        "started": now.isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv)[:500],
    }


def _job() -> str:
    """What a scheduler starts once at a time, or ""."""
    slurm = os.environ.get("SLURM_JOB_ID", "")
    return os.environ.get("QWEN_JAX_JOB", "") or (f"slurm {slurm}" if slurm else "")


def _start_ticks(pid: int) -> str:
    """When the process started, in the kernel's ticks; "" if there is none.

    A pid is used again after a while; with the start time it is unique in one boot.
    """
    if not pathlib.Path("/proc/self/stat").exists():  # not Linux: only the pid
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return ""
        except PermissionError:
            return "alive"
        return "alive"
    stat = _text(f"/proc/{pid}/stat")
    # The name in parentheses may hold spaces; state is the first field after it.
    fields = stat.rpartition(")")[2].split()
    if not fields or fields[0] in "ZX":  # a zombie writes nothing any more
        return ""
    return fields[19]


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any]:
    """The holder's facts; {} while they are not written or not readable."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(handle: int, facts: dict[str, Any]) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(facts).encode(), 0)
    os.fsync(handle)


def check_writable(path: str | os.PathLike) -> None:
    """Make the folder if needed and prove that files can be written and removed there.

    Raises: config.InputError: not a folder, read-only, no permission, full, ...
    """
    folder = pathlib.Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".probe.")
        try:
            os.write(handle, b"x" * 4096)
            os.fsync(handle)
        finally:
            os.close(handle)
            os.unlink(name)
    except OSError as error:
        fixes = {
            errno.EROFS: "it lies on a read-only file system: choose another --workdir",
            errno.EACCES: "no permission: choose another --workdir or change its owner",
            errno.EPERM: "no permission: choose another --workdir or change its owner",
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EEXIST: "it is a file, not a folder: choose another --workdir",
            errno.ENOTDIR: "a part of the path is a file: choose another --workdir",
        }
        fix = fixes.get(error.errno, "choose another --workdir")
        raise config.InputError(
            f"cannot write into {folder}: {error.strerror or error}; {fix}"
        ) from error
