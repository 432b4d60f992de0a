# SPDX-License-Identifier: Apache-2.0
"""Two processes with two devices each: one checkpoint, one verdict, any topology."""

import ast
import os
import pathlib
import random
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.checkpoint import manager, manifest, steps

WORKER = pathlib.Path(__file__).with_name("worker_processes.py")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_both(folder, *words):
    port = str(free_port())
    env = os.environ | {"PYTHONPATH": str(WORKER.parents[2])}
    return [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), port, folder, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]


def run_both(folder):
    """[facts of process 0, facts of process 1]; Gloo's own lines are left out."""
    both = start_both(folder)
    try:
        outputs = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    for process, (_, err) in zip(both, outputs, strict=True):
        assert process.returncode == 0, err
    return [
        [line[3:] for line in out.splitlines() if line.startswith(f"{rank}: ")]
        for rank, (out, _) in enumerate(outputs)
    ]


def test_one_process_two_processes_one_process(tmp_path):
    sys.path.insert(0, str(WORKER.parent))
    try:
        import worker_processes as worker
    finally:
        sys.path.pop(0)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    with manager.Manager(tmp_path) as m:
        tree = worker.placed(worker.host_tree(1), mesh)
        m.save(1, tree, {"at": 1}, local={"rank": 0}, wait=True)

    first, second = run_both(tmp_path)

    own = ("said ", "digested ", "verified ")
    facts = [line for line in first if not line.startswith(own)]
    assert facts == [line for line in second if not line.startswith(own)]
    local = [{"rank": 0, "step": 3}, {"rank": 1, "step": 3}]
    assert facts[0] == (
        "from one process {'at': 1, 'step': 1, 'local': [{'rank': 0}]} True"
    )
    assert facts[1] == f"steps [1, 2, 3] {local}"
    assert "checkpoint of step 4 was not saved" in facts[2]
    assert "process 1: division by zero" in facts[2]
    assert "step 4 was not saved: process 1: division by zero" in facts[3]
    assert "step 4 was not saved: process 1 digested" in facts[4]
    assert facts[5] == "steps [1, 2, 3, 5]"
    assert "step 6 was not saved: no room at all" in facts[6]
    assert facts[7] == "fell back 3 True 3"
    assert facts[8].startswith("mismatch")
    due = ast.literal_eval(facts[9].removeprefix("due "))
    assert 1 < len(due) < 150  # the second clock would have it at each of 200 steps
    assert facts[10] == "done [1, 2, 3, 7]"
    (said,) = [line for line in first if line.startswith("said ")]
    (notice,) = ast.literal_eval(said.partition("said ")[2])
    assert "step 5" in notice and "arrays/w/c" in notice and "has changed" in notice

    # Every file was read by one of the two, when it was saved and when it was verified.
    content, wrong = manifest.read(steps.path(tmp_path, 3), 3)
    assert not wrong
    for what in ("digested ", "verified "):
        shares = [
            ast.literal_eval(line.removeprefix(what))
            for line in first + second
            if line.startswith(what)
        ]
        assert len(shares) == 2 and abs(len(shares[0]) - len(shares[1])) <= 1
        assert sorted(shares[0] + shares[1]) == sorted(content["files"])

    # Back in one process, on a mesh that neither had.
    assert steps.present(tmp_path) == [1, 2, 3, 5, 7]
    mesh = jax.make_mesh((8,), ("tensor",))
    like = {
        name: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh, P("tensor") if x.ndim else P()),
        )
        for name, x in worker.host_tree(0).items()
    }
    with manager.Manager(tmp_path) as m:
        assert m.all_steps() == [1, 2, 3, 5, 7]  # sizes agree; digests are read below
        got, meta = m.restore(like)
        assert meta == {"at": 7, "step": 7}
        for name, want in worker.host_tree(3).items():
            assert np.asarray(got[name]).tobytes() == want.tobytes()
        _, meta = m.restore(like, 3)
        assert meta["local"] == local


@pytest.mark.slow
def test_killing_either_process_or_both_while_they_save(tmp_path):
    """The survivor of a killed peer must not make a step of half of the shards."""
    rng = random.Random(0)
    newest = 0
    for _ in range(8):
        both = start_both(tmp_path, "loop")
        try:
            line = both[0].stdout.readline()
            while line and not line.startswith("0: saved"):
                line = both[0].stdout.readline()
            assert line, both[0].communicate()[1] + both[1].communicate()[1]
            assert int(line.split()[-1]) >= newest, f"step {newest} was lost"
            time.sleep(rng.uniform(0, 2))
            first = rng.randrange(2)
            both[first].kill()
            time.sleep(rng.choice([0, 0, 0.5]))
        finally:
            for process in both:
                process.kill()
        out = both[0].communicate()[0].splitlines() + [line]
        both[1].communicate()
        steps_saved = [int(x.split()[-1]) for x in out if x.startswith("0: saved")]
        newest = max(newest, *steps_saved)
    assert newest > 0
