# SPDX-License-Identifier: Apache-2.0
"""Small texts exchanged between the processes of one run, off the device network.

The processes of a run must reach the same verdict about a save or a damaged step. A
device collective cannot carry it: a save ends in a background thread, and a collective
there would interleave differently with the training step's on each process. So the
exchange goes through the coordination service of `jax.distributed`.

With one process every function returns at once and nothing is contacted.
Invariants: every process calls the same functions with the same tags in the same order;
a tag is used once.
Raises: TimeoutError naming the processes that did not answer in time.
"""

import json
import time
from typing import Any

import jax


def gather(tag: str, value: Any, timeout_s: float) -> list[Any]:
    """[value of process 0, value of process 1, ...] on every process (JSON values)."""
    if jax.process_count() == 1:
        return [value]
    client = _client()
    client.key_value_set(f"{tag}/from/{jax.process_index()}", json.dumps(value))
    values = None
    if jax.process_index() == 0:
        deadline = time.monotonic() + timeout_s
        values = [
            json.loads(_get(f"{tag}/from/{process}", deadline, process))
            for process in range(jax.process_count())
        ]
    # Process 0 collects for all: n + n messages instead of n * n.
    return from_primary(f"{tag}/all", values, timeout_s + 30)


def from_primary(tag: str, value: Any, timeout_s: float) -> Any:
    """Process 0's value (JSON) on every process; the others' argument is ignored."""
    if jax.process_count() == 1:
        return value
    if jax.process_index() == 0:
        _client().key_value_set(tag, json.dumps(value))
        return value
    return json.loads(_get(tag, time.monotonic() + timeout_s, 0))


def forget(tag: str) -> None:
    """Drop a finished exchange's texts; every process must be past it (process 0)."""
    if jax.process_count() > 1 and jax.process_index() == 0:
        _client().key_value_delete(f"{tag}/")


def _get(key: str, deadline: float, process: int) -> str:
    left_ms = max(1, int((deadline - time.monotonic()) * 1000))
    try:
        return _client().blocking_key_value_get(key, left_ms)
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f"process {process} of {jax.process_count()} did not answer ({key}): it "
            "died, hangs, or cannot reach the coordinator"
        ) from error


def _client() -> Any:
    # JAX has no public name for the coordination service's key-value store; Orbax and
    # Flax reach it the same way.
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise RuntimeError(
            f"{jax.process_count()} processes without a coordination service: call "
            "jax.distributed.initialize() before opening checkpoints"
        )
    return distributed.global_state.client
