# SPDX-License-Identifier: Apache-2.0
"""A loop that stops when told (test_signals); every phase announces itself on stdout.

Called as `worker_signals.py MODE [RANK PORT]`. MODE: "loop" steps until told to stop;
"begun" does so too, after a time in which a signal would have ended it at once;
"stuck" blocks in C code like a collective whose peer is gone; "grace" is stuck with a
time limit of 0.5 s; "compiles" is stuck and has not begun to step, and so is the second
process of "late", while its first is stuck in its first step; "fails" has not begun and
fails when the other process has gone. With RANK and PORT it is one of two processes.
"""

import ctypes
import sys
import time

import jax

from qwen_jax.fault import signals


def main(mode, rank=None, port=None):
    jax.config.update("jax_platforms", "cpu")
    if rank is not None:
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    if mode in ("compiles", "late", "fails"):
        before_the_first_step(mode, rank)
    at_once = signals.leave if mode == "begun" else None
    stopper = signals.Stopper(grace_s=0.5 if mode == "grace" else None, at_once=at_once)
    stopper.begin()
    step = 0
    while not stopper.should_stop():
        step += 1
        if step == 1:
            print("ready", flush=True)
        if mode not in ("loop", "begun"):
            be_stuck()
        time.sleep(0.004 if rank == "0" else 0.003)
    print("stopped", step, stopper.reason, flush=True)
    stopper.close()
    if rank is not None:
        jax.distributed.shutdown()


def before_the_first_step(mode, rank):
    def leave(reason):
        print("left", reason, flush=True)
        signals.leave(0)

    with signals.Stopper(at_once=leave) as stopper:
        print("ready", flush=True)
        if mode == "fails" and rank == "0":
            from jax._src import distributed

            client = distributed.global_state.client
            while not client.key_value_dir_get("qwen_jax/stop/0/left/"):
                time.sleep(0.01)
            raise RuntimeError("the other process has gone")
        if mode == "late" and rank == "0":
            stopper.begin()
            stopper.should_stop()
        be_stuck()


def be_stuck():
    """A mutex locked twice: as a collective, no signal interrupts its wait."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


if __name__ == "__main__":
    main(*sys.argv[1:])
