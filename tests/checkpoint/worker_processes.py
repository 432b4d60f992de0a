# SPDX-License-Identifier: Apache-2.0
"""One of two processes that restore, save, fail and fall back together.

Called by test_processes as `worker_processes.py RANK PORT FOLDER`, where the folder
holds step 1, written by one process; prints lines "RANK: fact" that the test compares.
With a fourth argument it checks what is there and then saves until it is killed.
"""

import hashlib
import os
import pathlib
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import config
from qwen_jax.checkpoint import arrays, manager, manifest, steps, timing

NUM_PROCESSES = 2


def host_tree(step):
    """The same values in every process; also used by the test itself."""
    rng = np.random.default_rng(step)
    return {
        "w": rng.normal(size=(8, 16)).astype(np.float32),
        "mu": rng.normal(size=(16, 8)).astype(jnp.bfloat16),
        "count": np.int32(step),
    }


SPECS = {"w": P("data", "tensor"), "mu": P("tensor"), "count": P()}


def placed(tree, mesh):
    """Global arrays, each process giving the shards it owns."""
    return {
        name: jax.make_array_from_callback(
            value.shape,
            NamedSharding(mesh, SPECS[name]),
            lambda index, value=value: np.asarray(value)[index],
        )
        for name, value in tree.items()
    }


def abstract(tree, mesh):
    return {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, SPECS[name])
        )
        for name, x in tree.items()
    }


def shards_equal(tree, want):
    return all(
        np.asarray(shard.data).tobytes()
        == np.ascontiguousarray(np.asarray(want[name])[shard.index]).tobytes()
        for name, leaf in tree.items()
        for shard in leaf.addressable_shards
    )


def read_of(paths, folder, step):
    """The paths below a step's folder, relative to it."""
    top = pathlib.Path(folder, step)
    return [p.relative_to(top).as_posix() for p in paths if p.is_relative_to(top)]


def main(rank, folder):
    def tell(*facts):
        print(f"{rank}:", *facts, flush=True)

    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    like = abstract(host_tree(0), mesh)
    said = []
    m = manager.Manager(folder, keep=9, say=said.append, timeout_s=60)
    tree, meta = m.restore(like)
    tell("from one process", meta, shards_equal(tree, host_tree(1)))

    reads, real_digest = [], manifest.digest

    def digest(path, **kwargs):
        reads.append(path)
        return real_digest(path, **kwargs)

    manifest.digest = digest  # tells which process looks at which file
    for step in (2, 3):
        m.save(
            step,
            placed(host_tree(step), mesh),
            {"at": step},
            local={"rank": rank, "step": step},
        )
    m.wait()
    tell("digested", read_of(reads, folder, "tmp.3"))
    tell("steps", m.all_steps(), m.read_meta()["local"])
    reads.clear()
    m.newest_intact()
    tell("verified", read_of(reads, folder, "00000003"))
    manifest.digest = real_digest

    # The second process cannot write: both give the step up, and the next one is fine.
    real = arrays.start_write
    if rank == 1:
        arrays.start_write = lambda *a, **k: 1 / 0
    m.save(4, placed(host_tree(4), mesh), {})
    try:
        m.wait()
    except manager.SaveError as error:
        tell("failed", error)
    arrays.start_write = real
    # The second process cannot read what it is to digest, or says something else.
    real = manifest.flush
    broken = [lambda *_: 1 / 0, lambda folder, paths: real(folder, paths[1:])]
    for flush in broken:
        if rank == 1:
            manifest.flush = flush
        m.save(4, placed(host_tree(4), mesh), {})
        try:
            m.wait()
        except manager.SaveError as error:
            tell("failed", error)
    manifest.flush = real
    m.save(5, placed(host_tree(5), mesh), {}, wait=True)
    tell("steps", m.all_steps())

    # The first process finds no room: refused at once in both.
    usage = manager.saving._no_room
    manager.saving._no_room = lambda job: "no room at all"
    try:
        m.save(6, placed(host_tree(6), mesh), {})
    except manager.SaveError as error:
        tell("refused", error)
    manager.saving._no_room = usage

    # A file that only the second process's share of the digests covers is damaged.
    if rank == 0:
        path = steps.path(pathlib.Path(folder), 5)
        content, _ = manifest.read(path, 5)
        sizes = {name: size for name, (size, _) in content["files"].items()}
        _, second = manifest.deal(sizes, NUM_PROCESSES)
        victim = next(name for name in second if name.startswith("arrays/w/c"))
        data = (path / victim).read_bytes()
        (path / victim).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    tree, meta = m.restore(like)
    tell("fell back", meta["step"], shards_equal(tree, host_tree(3)), m.latest())
    if rank == 0:
        tell("said", said)
    try:
        m.restore({**like, "extra": like["count"]})
    except config.InputError as error:
        tell("mismatch", hashlib.sha256(str(error).encode()).hexdigest())
    m.save(7, tree, {"at": 7})
    m.close()
    tell("due", due_steps(rank))
    tell("done", m.all_steps())


def due_steps(rank):
    """Steps at which a save by time is due, though the second clock runs away."""
    timer = timing.Timer(
        0.2, timeout_s=60, clock=lambda: time.monotonic() * (1000 if rank else 1)
    )
    due = []
    for step in range(1, 201):
        time.sleep(0.003 + 0.002 * rank)
        if timer.due(step):
            due.append(step)
            jax.experimental.multihost_utils.sync_global_devices(f"due {step}")
            timer.restart(step)
    return due


def save_until_killed(rank, folder):
    """Print "saved N" after each step that is visible."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    m = manager.Manager(folder, keep=2, timeout_s=60)
    left = sorted(os.listdir(folder))
    if not all(name.isdigit() for name in left):
        raise RuntimeError(f"leftovers: {left}")
    latest = m.latest() or 0
    if latest:
        tree, meta = m.restore(abstract(host_tree(0), mesh))
        if meta["step"] != latest or not shards_equal(tree, host_tree(latest)):
            raise RuntimeError(f"step {latest} came back as {meta}")
    print(f"{rank}: saved {latest}", flush=True)
    for step in range(latest + 1, 10**6):
        m.save(step, placed(host_tree(step), mesh), {}, local={"rank": rank}, wait=True)
        print(f"{rank}: saved {step}", flush=True)


if __name__ == "__main__":
    rank, port = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", NUM_PROCESSES, rank)
    try:
        (save_until_killed if len(sys.argv) > 4 else main)(rank, sys.argv[3])
        code = 0
    except BaseException:  # noqa: BLE001 - an ordinary exit would wait for the peer
        traceback.print_exc()
        code = 1
    if code:
        sys.stderr.flush()
        os._exit(code)
    jax.distributed.shutdown()
