# SPDX-License-Identifier: Apache-2.0
"""A loop that stops when told (test_signals); every phase announces itself on stdout.

Called as `worker_signals.py MODE [RANK PORT]`. MODE: "loop" steps until told to stop;
"stuck" blocks in C code like a collective whose peer is gone; "grace" is stuck with a
time limit of 0.5 s. With RANK and PORT it is one of two processes.
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
    stopper = signals.Stopper(grace_s=0.5 if mode == "grace" else None)
    step = 0
    while not stopper.should_stop():
        step += 1
        if step == 1:
            print("ready", flush=True)
        if mode != "loop":
            # A mutex locked twice: as a collective, no signal interrupts its wait.
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        time.sleep(0.004 if rank == "0" else 0.003)
    print("stopped", step, stopper.reason, flush=True)
    stopper.close()
    if rank is not None:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
