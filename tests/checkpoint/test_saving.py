# SPDX-License-Identifier: Apache-2.0
"""Saves that fail, and saves that are killed: loud, and nothing finished is lost."""

import concurrent.futures
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.checkpoint import arrays, manager, manifest, saving, steps

WORKER = pathlib.Path(__file__).with_name("worker_kill.py")


def tree_of(step):
    rng = np.random.default_rng(step)
    return {f"w{i}": rng.normal(size=(128, 256)).astype(np.float32) for i in range(8)}


def assert_restores(m, step):
    got, meta = m.restore(tree_of(0), step)
    assert meta["step"] == step
    for name, want in tree_of(step).items():
        assert got[name].tobytes() == want.tobytes()


@pytest.fixture
def small_disk(tmp_path):
    """A function making a folder on a file system of so many KiB."""
    mounted = []

    def mount(kib):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root")
        mounted.append(folder)
        return folder

    yield mount
    gc.collect()
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def unlimited(monkeypatch):
    """The look before the save sees room, as when the space goes during the save."""
    monkeypatch.setattr(saving, "_no_room", lambda job: "")


def test_too_little_space_is_refused_before_writing(tmp_path, monkeypatch):
    with manager.Manager(tmp_path) as m:
        m.save(1, tree_of(1), {}, wait=True)
        usage = shutil._ntuple_diskusage(1 << 30, 0, 1_000_000)
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(manager.SaveError) as caught:
            m.save(2, tree_of(2), {})
        text = str(caught.value)
        assert "step 2 was not saved" in text and "1,000,000 are free" in text
        assert "needs 5,242,880 bytes" in text and "checkpoint.keep" in text
        assert os.listdir(tmp_path) == ["00000001"]
        m.check()
        monkeypatch.undo()
        m.save(3, tree_of(3), {}, wait=True)
        assert m.all_steps() == [1, 3]


# When one of Orbax's writes fails, the exceptions of the others are never looked at.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_at_any_point_of_a_save(small_disk, monkeypatch):
    """1 MiB of arrays per step, two steps saved, then 0 KiB to 1.3 MiB left."""
    disk = small_disk(5000)
    outcomes = set()
    unlimited(monkeypatch)
    with manager.Manager(disk / "c", keep=9) as m:
        for step in (1, 2):
            m.save(step, tree_of(step), {"at": step}, wait=True)
        for left_kib in (0, 4, 300, 900, 1060, 1100, 1140, 1180, 1300):
            filler = disk / "filler"
            stat = os.statvfs(disk)
            free = stat.f_bavail * stat.f_frsize
            filler.write_bytes(bytes(max(0, free - left_kib * 1024)))
            outcome = "saved"
            try:
                m.save(3, tree_of(3), {"at": 3})
                deadline = time.monotonic() + 30
                while m._thread is not None and time.monotonic() < deadline:
                    m.check()  # as a training loop: raised at a poll, not a save later
                    time.sleep(0.005)
            except manager.SaveError as error:
                outcome = "refused"
                assert "step 3 was not saved" in str(error)
                assert "disk full (1,048,576 bytes needed" in str(error), str(error)
                assert m.all_steps() == [1, 2] == steps.present(disk / "c")
                assert sorted(os.listdir(disk / "c")) == ["00000001", "00000002"]
            else:
                assert_restores(m, 3)
                m.drop_after(2)
            outcomes.add(outcome)
            filler.unlink()
            assert_restores(m, 2)
        m.save(
            4, tree_of(4), {}, wait=True
        )  # with room again, training has lost nothing
        assert m.all_steps() == [1, 2, 4]
    assert outcomes == {"saved", "refused"}


def test_a_full_disk_at_the_start_is_an_input_error(small_disk):
    disk = small_disk(64)
    (disk / "filler").write_bytes(bytes(64 * 1024))
    with pytest.raises(config.InputError, match="full: free some space"):
        manager.Manager(disk / "c")


@pytest.mark.parametrize(
    "module, function",
    [
        (arrays, "start_write"),
        (arrays, "finish_write"),
        (manifest, "flush"),
        (manifest, "write"),
        (steps, "commit"),
    ],
)
def test_a_failure_anywhere_surfaces_at_the_next_poll(
    tmp_path, monkeypatch, module, function
):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    with manager.Manager(tmp_path) as m:
        m.save(1, tree_of(1), {}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(saving, "_CLEAR_PAUSES_S", (0.0, 0.1))
            patch.setattr(module, function, fail)
            m.save(2, tree_of(2), {})
            m._thread.join()
        assert m.latest() == 1
        with pytest.raises(manager.SaveError, match="step 2 .*Input/output error"):
            m.check()
        m.check()  # once only
        assert os.listdir(tmp_path) == ["00000001"]
        m.save(3, tree_of(3), {}, wait=True)
        assert_restores(m, 3)


def test_a_disk_that_is_too_slow_is_told_with_the_time_that_was_given(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(saving, "_CLEAR_PAUSES_S", (0.0,))
    never = concurrent.futures.Future()
    monkeypatch.setattr(arrays, "start_write", lambda *args, **kwargs: [never])
    m = manager.Manager(tmp_path, timeout_s=0.05)
    with pytest.raises(manager.SaveError, match=r"checkpoint\.timeout_s=0\.05"):
        m.save(1, tree_of(1), {}, wait=True)
    assert os.listdir(tmp_path) == []


def test_a_failure_is_not_lost_when_nobody_polls(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    m = manager.Manager(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", fail)
        m.save(1, tree_of(1), {})
        m._thread.join()
    m.save(2, tree_of(2), {})  # does its own work
    with pytest.raises(manager.SaveError, match="step 1"):
        m.close()
    assert m.all_steps() == [2]


def test_a_lost_lock_stops_the_save_before_it_is_visible(tmp_path):
    held = [True]

    def guard():
        if not held[0]:
            raise config.InputError("pid 7 on host h took the folder over")

    with manager.Manager(tmp_path, guard=guard) as m:
        m.save(1, tree_of(1), {}, wait=True)
        held[0] = False
        with pytest.raises(manager.SaveError, match="took the folder over"):
            m.save(2, tree_of(2), {})
        with pytest.raises(config.InputError, match="took the folder over"):
            m.drop_after(0)
    assert steps.present(tmp_path) == [1]


def test_checking_costs_nothing(tmp_path):
    with manager.Manager(tmp_path) as m:
        start = time.perf_counter()
        for _ in range(2000):
            m.check()
        assert (time.perf_counter() - start) / 2000 < 50e-6


def run_kills(folder, kills, seed):
    command = [sys.executable, WORKER, folder, str(kills), str(seed)]
    env = os.environ | {"PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=env
    )
    assert done.returncode == 0 and done.stdout.startswith("ok"), (
        done.stdout + done.stderr
    )


def test_sigkill_while_saving(tmp_path):
    run_kills(tmp_path / "c", 6, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_sigkill_while_saving_many_times(tmp_path, seed):
    run_kills(tmp_path / "c", 50, seed)


def test_arrays_are_as_saved_when_nothing_else_runs(tmp_path):
    """A plain oracle for the helpers of this file."""
    with manager.Manager(tmp_path) as m:
        m.save(1, {k: jnp.asarray(v) for k, v in tree_of(1).items()}, {}, wait=True)
        assert_restores(m, 1)
