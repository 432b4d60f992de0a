# SPDX-License-Identifier: Apache-2.0
"""Dying at any disk operation loses no finished step; retention keeps its promise."""

import os
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.checkpoint import manager, manifest, steps

CHANGING = ("rename", "unlink", "rmdir", "fsync")


class PowerCut(BaseException):
    """The process dies here; nothing may catch it."""


def cut_before(monkeypatch, number):
    """Die before the `number`-th disk operation that changes something."""
    done = []

    def wrap(name, real):
        def wrapped(*args, **kwargs):
            if len(done) == number:
                raise PowerCut
            done.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, wrapped)

    for name in CHANGING:
        wrap(name, getattr(os, name))


def write_step(folder, step, text):
    """A step as `saving` writes it, with a text file in place of arrays."""
    temporary = steps.temporary(folder, step)
    (temporary / "arrays").mkdir(parents=True)
    (temporary / "arrays" / "x").write_text(text)
    files = manifest.flush(temporary, list(manifest.sizes(temporary)))
    manifest.write(temporary, step, {}, files)
    steps.commit(folder, step)


def contents(folder):
    """{step: text} of the good steps."""
    return {
        step: (steps.path(folder, step) / "arrays" / "x").read_text()
        for step in steps.present(folder)
        if not steps.problem(folder, step)
    }


def scenario(folder):
    """A new step, a replaced step, a deleted step: all that a save may do."""
    write_step(folder, 3, "three")
    write_step(folder, 2, "two again")
    steps.delete(folder, 1)


def test_dying_before_any_disk_operation_loses_nothing(tmp_path, monkeypatch):
    start = tmp_path / "start"
    start.mkdir()
    write_step(start, 1, "one")
    write_step(start, 2, "two")
    number, finished = 0, False
    seen = set()
    while not finished:
        folder = shutil.copytree(start, tmp_path / f"at{number}")
        with monkeypatch.context() as patch:
            cut_before(patch, number)
            try:
                scenario(folder)
                finished = True
            except PowerCut:
                pass
        steps.recover(folder)
        got = contents(folder)
        seen.add(tuple(sorted(got.items())))
        # Step 2 is there at every instant, in its old or its new form; step 1 goes
        # only at the very end; what is listed is whole, and nothing else is left.
        assert got[2] in ("two", "two again")
        assert got.get(3, "three") == "three"
        if 1 not in got:
            assert got == {2: "two again", 3: "three"}
        assert all(name.isdigit() for name in os.listdir(folder)), os.listdir(folder)
        assert set(got) == set(steps.present(folder))
        number += 1
    assert number > 20 and len(seen) == 4  # nothing, +3, 2 replaced, -1


def test_dying_while_recovering_is_harmless(tmp_path, monkeypatch):
    """The state between the two renames of a replacement, and a half-deleted step."""
    start = tmp_path / "start"
    start.mkdir()
    for step in (1, 2, 5):
        write_step(start, step, str(step))
    os.rename(steps.path(start, 2), start / "old.2")
    os.rename(steps.path(start, 1), start / "trash.1")
    shutil.copytree(start / "old.2", start / "old.5")
    shutil.copytree(start / "old.2", steps.temporary(start, 7))
    number, finished = 0, False
    while not finished:
        folder = shutil.copytree(start, tmp_path / f"at{number}")
        with monkeypatch.context() as patch:
            cut_before(patch, number)
            try:
                steps.recover(folder)
                finished = True
            except PowerCut:
                pass
        cleared = steps.recover(folder)
        assert contents(folder) == {2: "2", 5: "5"}
        number += 1
    assert cleared == []
    assert number > 5


def test_everything_is_flushed_before_and_after_the_name_changes(tmp_path, monkeypatch):
    """The order that a power loss needs: files, folders, rename, parent folder."""
    log, real_fsync, real_rename = [], os.fsync, os.rename

    def path_of(handle):
        return os.readlink(f"/proc/self/fd/{handle}")

    def fsync(handle):
        log.append(("fsync", path_of(handle)))
        real_fsync(handle)

    def rename(old, new):
        log.append(("rename", str(new)))
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with manager.Manager(tmp_path / "c") as m:
        log.clear()
        m.save(1, {"w": jnp.ones((4, 4)), "n": jnp.int32(1)}, {}, wait=True)
    final = steps.path(tmp_path / "c", 1)
    at = log.index(("rename", str(final)))
    flushed = {path for kind, path in log[:at] if kind == "fsync"}
    temporary = str(steps.temporary(tmp_path / "c", 1))
    for path in [final, *final.rglob("*")]:
        assert str(path).replace(str(final), temporary) in flushed, path
    # The manifest is the last file to be flushed, and the parent follows the rename.
    order = [pathlib.Path(path) for kind, path in log[:at] if kind == "fsync"]
    files = [p for p in order if p.is_relative_to(temporary)]
    files = [p for p in files if (final / p.relative_to(temporary)).is_file()]
    assert files[-1].name == "manifest.json" and len(files) > 5
    assert ("fsync", str(tmp_path / "c")) in log[at:]


@hypothesis.given(
    numbers=st.sets(st.integers(0, 200), min_size=1),
    keep=st.integers(1, 8),
    keep_every=st.integers(0, 50),
)
def test_retention_keeps_the_newest_and_the_marked(numbers, keep, keep_every):
    doomed = set(steps.to_delete(sorted(numbers), keep, keep_every))
    left = numbers - doomed
    newest = set(sorted(numbers)[-keep:])
    assert doomed < numbers or not doomed
    assert newest <= left
    marked = {n for n in numbers if keep_every and n % keep_every == 0}
    assert left == newest | marked


def test_retention_on_disk_follows_a_list_as_model(tmp_path):
    rng = np.random.default_rng(0)
    with manager.Manager(tmp_path, keep=2, keep_every=20) as m:
        model, step = [], 0
        for _ in range(12):
            step += int(rng.integers(1, 9))
            m.save(step, jnp.full(3, step), {}, wait=True)
            model.append(step)
            model = [s for s in model if s in model[-2:] or s % 20 == 0]
            assert m.all_steps() == steps.present(tmp_path) == model
        for step in model:
            assert (np.asarray(m.restore(jnp.zeros(3, int), step)[0]) == step).all()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("notes.txt", "tmp.txt", "best", "12", "0000000x"):
        (tmp_path / name).write_text("mine")
    with manager.Manager(tmp_path) as m:
        m.save(1, jnp.ones(1), {}, wait=True)
        assert m.all_steps() == [1]
    assert (tmp_path / "tmp.txt").read_text() == "mine"
    assert len(os.listdir(tmp_path)) == 6


def test_leftovers_are_cleared_at_the_start(tmp_path):
    with manager.Manager(tmp_path) as m:
        m.save(4, jnp.ones(1), {}, wait=True)
    for name in ("tmp.5", "trash.3", "old.4"):
        shutil.copytree(steps.path(tmp_path, 4), tmp_path / name)
    with manager.Manager(tmp_path) as m:
        assert m.all_steps() == [4] and os.listdir(tmp_path) == ["00000004"]


def test_a_deletion_that_fails_does_not_fail_the_save(tmp_path, monkeypatch):
    said, real = [], steps.delete

    def stuck(folder, step):
        raise PermissionError(13, "held open")

    with manager.Manager(tmp_path, keep=1, say=said.append) as m:
        m.save(1, jnp.ones(1), {}, wait=True)
        monkeypatch.setattr(steps, "delete", stuck)
        m.save(2, jnp.ones(1), {}, wait=True)
        assert m.all_steps() == [1, 2] and "cannot delete step 1" in said[0]
        monkeypatch.setattr(steps, "delete", real)
        m.save(3, jnp.ones(1), {}, wait=True)
        assert m.all_steps() == [3]


@pytest.mark.parametrize("name", ["00000001", "123456789"])
def test_step_names_are_numbers(tmp_path, name):
    (tmp_path / name).mkdir()
    assert steps.present(tmp_path) == [int(name)]
    assert steps.path(tmp_path, int(name)).name == name
