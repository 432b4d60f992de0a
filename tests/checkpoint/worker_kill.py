# SPDX-License-Identifier: Apache-2.0
"""Saves steps in a loop while its parent kills it at random instants (test_saving).

The parent process is a small fork server: it imports everything once and forks one
child a round, so that fifty kills cost seconds. Called as `worker_kill.py FOLDER KILLS
SEED`; prints one line "ok ..." or a traceback.
"""

import os
import pathlib
import random
import signal
import sys
import time
import traceback

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401 - imported once, before the forks

from qwen_jax.checkpoint import manager, steps

KEEP = 3


def tree_of(step):
    rng = np.random.default_rng(step)
    tree = {f"w{i}": rng.normal(size=(64, 256)).astype(np.float32) for i in range(6)}
    return tree | {"step": np.int32(step)}


def child(folder, ready_fd, claim):
    """Recover, prove that nothing is lost, then save until killed."""
    jax.config.update("jax_num_cpu_devices", 2)
    with manager.Manager(folder, keep=KEEP, say=print) as m:
        left = sorted(os.listdir(folder))
        assert all(name.isdigit() for name in left), f"leftovers: {left}"
        assert m.all_steps() == steps.present(pathlib.Path(folder)), "damaged steps"
        latest = m.latest() or 0
        finished = int(claim.read_text() or 0)
        assert latest >= finished, f"finished step {finished} lost, newest {latest}"
        assert latest == 0 or len(m.all_steps()) >= min(KEEP, latest), (
            "lost by retention"
        )
        if latest:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree_of(0)
            )
            got, meta = m.restore(like)
            assert meta == {"step": latest, "twice": 2 * latest}
            for name, want in tree_of(latest).items():
                assert got[name].tobytes() == want.tobytes(), name
        os.write(ready_fd, b"r")
        step = latest
        while True:
            step += 1
            arrays = jax.tree.map(jax.numpy.asarray, tree_of(step))
            m.save(step, arrays, {"twice": 2 * step}, wait=True)
            os.pwrite(claim_fd(claim), b"%d" % step, 0)


def claim_fd(claim, opened={}):  # noqa: B006 - one file for the process's life
    if claim not in opened:
        opened[claim] = os.open(claim, os.O_WRONLY)
    return opened[claim]


def main(folder, kills, seed):
    rng = random.Random(seed)
    claim = pathlib.Path(folder).with_suffix(".claim")
    claim.write_text("0")
    for _ in range(kills):
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(folder, write_fd, claim)
            except BaseException:  # noqa: BLE001 - a forked child must not go on
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(write_fd)
        if os.read(read_fd, 1) != b"r":
            os.waitpid(pid, 0)
            raise SystemExit("the child failed")
        os.close(read_fd)
        time.sleep(rng.uniform(0, 1.0))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print("ok", kills, "kills, newest finished step", claim.read_text())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
