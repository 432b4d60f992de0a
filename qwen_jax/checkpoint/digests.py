# SPDX-License-Identifier: Apache-2.0
"""The files of a save, each flushed and digested once, by all processes together.

Process 0 lists the files when every process has written, and deals them out in shares
of about equal bytes. By the files themselves nobody could tell who wrote them: Orbax
names a chunk by its place in the array, and lets the replicas of an array share its
writing. So a process digests what others wrote: it reads from the storage what they
sent there. (What a process wrote, TensorStore has flushed before that process votes.)

Formats, in the temporary folder of the save, since a list of all files is too large for
the coordination service: share.<i>.json, the paths dealt to process i, and
digests.<i>.json, its {path: [bytes, sha256]}. Process 0 keeps its own in memory, so one
process writes neither. Both are gone before the manifest is written.
Invariants: every file is in one share; a share whose records are not exactly its paths
fails the save. That nothing else appeared is for `manifest.write` to see.
Raises: OSError from the disk, ValueError for records that do not fit their share.
"""

import json
import pathlib

import jax

from qwen_jax.checkpoint import manifest


def deal(folder: pathlib.Path) -> list[list[str]]:
    """Deal the files out to the processes (process 0); the shares."""
    shares = manifest.deal(manifest.sizes(folder), jax.process_count())
    for process in range(1, len(shares)):
        _path(folder, "share", process).write_text(json.dumps(shares[process]))
    return shares


def make(folder: pathlib.Path, shares: list[list[str]]) -> dict[str, list]:
    """Flush and digest this process's share; the records, on process 0 alone."""
    process = jax.process_index()
    if process == 0:
        return manifest.flush(folder, shares[0])
    share = json.loads(_path(folder, "share", process).read_text())
    records = manifest.flush(folder, share)
    _path(folder, "digests", process).write_text(json.dumps(records))
    return {}


def collect(folder: pathlib.Path, shares: list[list[str]]) -> dict[str, list]:
    """The other processes' records, when all have made theirs (process 0)."""
    files: dict[str, list] = {}
    for process in range(1, len(shares)):
        path = _path(folder, "digests", process)
        records = json.loads(path.read_text())
        if sorted(records) != sorted(shares[process]):
            raise ValueError(
                f"process {process} digested {len(records)} files, not the "
                f"{len(shares[process])} that were dealt to it"
            )
        files |= records
        path.unlink()
        _path(folder, "share", process).unlink()
    return files


def _path(folder: pathlib.Path, name: str, process: int) -> pathlib.Path:
    return folder / f"{name}.{process}.json"
