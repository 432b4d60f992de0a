# SPDX-License-Identifier: Apache-2.0
"""Step folders: their names, the atomic commit, deletion, leftovers, retention.

Layout of a checkpoints folder:
  00000120/     a finished step: meta.json, local.<process>.json, arrays/, manifest.json
  tmp.140/      a save under way (or killed); never a checkpoint
  old.120/      the former step 120 while a new one takes its name
  trash.100/    a step being deleted

Invariants: a step appears and disappears by one rename, so it is whole or not there;
every rename is followed by a flush of the parent folder; whatever instant the process
dies at, `recover` brings back a state in which no finished step is lost.
Raises: OSError from the disk.
"""

import os
import pathlib
import re
import shutil
from collections.abc import Sequence

from qwen_jax.checkpoint import manifest

_STEP = re.compile(r"\d{8,}")


def path(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where step `step` stands when finished."""
    return folder / f"{step:08d}"


def temporary(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where step `step` is written before it is finished."""
    return folder / f"tmp.{step}"


def present(folder: pathlib.Path) -> list[int]:
    """Steps that have a folder, ascending, intact or not."""
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in os.scandir(folder)
        if _STEP.fullmatch(entry.name) and entry.is_dir()
    )


def problem(folder: pathlib.Path, step: int) -> str:
    """Why `step` is no checkpoint, without reading data; "" if it is one."""
    content, wrong = manifest.read(path(folder, step), step)
    if content is None:
        return wrong
    return "; ".join(manifest.check_sizes(path(folder, step), content)[:3])


def commit(folder: pathlib.Path, step: int) -> None:
    """tmp.<step> becomes the step; a former one of the same number is replaced."""
    final, old = path(folder, step), folder / f"old.{step}"
    if final.exists():
        remove_tree(old)
        os.rename(final, old)
    os.rename(temporary(folder, step), final)
    manifest.sync_folder(folder)
    remove_tree(old)


def delete(folder: pathlib.Path, step: int) -> None:
    """Remove a step: first out of sight by one rename, then its files."""
    trash = folder / f"trash.{step}"
    remove_tree(trash)
    os.rename(path(folder, step), trash)
    manifest.sync_folder(folder)
    remove_tree(trash)


def recover(folder: pathlib.Path) -> list[str]:
    """Clear what killed saves and deletions left behind; names of what was cleared."""
    cleared = []
    for entry in sorted(os.listdir(folder)):
        kind, _, number = entry.partition(".")
        if kind not in ("tmp", "old", "trash") or not number.isdigit():
            continue
        final = path(folder, int(number))
        if kind == "old" and not final.exists():
            # Killed between the two renames of a replacement: the former step is good.
            os.rename(folder / entry, final)
        else:
            remove_tree(folder / entry)
        cleared.append(entry)
    if cleared:
        manifest.sync_folder(folder)
    return cleared


def clear_temporary(folder: pathlib.Path) -> None:
    """Remove what failed saves of this run left (no save may be under way)."""
    for entry in os.listdir(folder):
        kind, _, number = entry.partition(".")
        if kind == "tmp" and number.isdigit():
            remove_tree(folder / entry)


def remove_tree(folder: pathlib.Path) -> None:
    """Delete a folder with all it holds; one that is not there is fine."""
    if folder.exists():
        shutil.rmtree(folder)


def to_delete(good: Sequence[int], keep: int, keep_every: int) -> list[int]:
    """Good steps that retention gives up: all but the newest `keep` and, with
    `keep_every` > 0, the multiples of it."""
    older = sorted(good)[: -max(keep, 1)]
    return [step for step in older if not keep_every or step % keep_every]
