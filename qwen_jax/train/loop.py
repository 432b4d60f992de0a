# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches in, a trained state out, everything else by arguments.

    (batch -> step -> log the step before -> save -> evaluate -> sample)*  -> final save

The order has reasons. Step k is dispatched before the metrics of step k-1 are read, so
the device never waits for the host. A save comes before an evaluation, so a crash in
the latter loses nothing. The stop flag is read once a step, at the same place on every
process.

Units: `first_step` is the number of steps already made; metrics carry the number of the
step that was made. Times are monotonic seconds; `step_s` is from the end of one step to
the end of the next, `data_s` what the loop waited for its batch.
Raises: TooManySkipped after `max_skipped` non-finite steps in a row (the state and the
last checkpoints are then still good), and whatever the given functions raise.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qwen_jax.train import state as state_lib


class TooManySkipped(RuntimeError):
    """Steps kept coming out non-finite; going on would only burn time."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls; each may be left out.

    log(step, metrics as floats): after every step, one step late.
    save(step, state, position): make a checkpoint; called when `save_due(step)`.
    save_due(step): whether to save after this step.
    evaluate(step, params), sample(step, params): called when `*_every` divides the
    step.
    stop(): true when the run should save and leave; asked once a step.
    profile(step): called before each step (start and stop of a trace).
    """

    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    save: Callable[[int, state_lib.State, Any], None] = lambda step, state, place: None
    save_due: Callable[[int], bool] = lambda step: False
    evaluate: Callable[[int, Any], None] = lambda step, params: None
    evaluate_every: int = 0
    sample: Callable[[int, Any], None] = lambda step, params: None
    sample_every: int = 0
    stop: Callable[[], bool] = lambda: False
    profile: Callable[[int], None] = lambda step: None


def loop(
    state: state_lib.State,
    step_fn: Callable[[state_lib.State, Any], tuple[state_lib.State, dict]],
    batches: Iterator[tuple[Any, Any]],
    *,
    first_step: int,
    num_steps: int,
    hooks: Hooks,
    max_skipped: int = 20,
) -> tuple[state_lib.State, int]:
    """Train from `first_step` to `num_steps`.

    Args:
      state: what to train; donated.
      step_fn: (state, batch) -> (state, metrics), jitted.
      batches: (batch on the mesh, data position after it).
      first_step: steps already made.
      num_steps: steps of the whole run.
      hooks: see Hooks.
      max_skipped: non-finite steps in a row that end the run.
    Returns:
      (state, steps made); fewer than num_steps when `hooks.stop()` said so.
    """
    pending, position = None, None
    skipped_in_a_row, ended_s = 0, time.monotonic()

    def settle(entry):
        """Wait for a step's metrics, time it, log it."""
        nonlocal skipped_in_a_row, ended_s
        number, metrics, data_s = entry
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        now_s = time.monotonic()
        values |= {"step_s": now_s - ended_s, "data_s": data_s}
        ended_s = now_s
        hooks.log(number, values)
        skipped_in_a_row = skipped_in_a_row + 1 if values["skipped"] else 0
        if skipped_in_a_row >= max_skipped:
            raise TooManySkipped(
                f"steps {number - skipped_in_a_row + 1} to {number} all had a "
                "non-finite loss or gradient and were skipped; lower "
                "--config.optim.lr_peak or look at the data of these steps"
            )

    number = first_step
    while number < num_steps:
        hooks.profile(number)
        asked_s = time.monotonic()
        batch, position = next(batches)
        data_s = time.monotonic() - asked_s
        state, metrics = step_fn(state, batch)
        number += 1
        if pending is not None:
            settle(pending)
        pending = (number, metrics, data_s)
        stop = hooks.stop()
        evaluates = hooks.evaluate_every and number % hooks.evaluate_every == 0
        samples = hooks.sample_every and number % hooks.sample_every == 0
        saves = hooks.save_due(number) or stop or number == num_steps
        if evaluates or samples or saves or number == num_steps:
            # What follows reads the state: log this step first, so that neither the
            # step's time nor the order of the lines tells of it.
            settle(pending)
            pending = None
        if saves:
            hooks.save(number, state, position)
        if stop and number < num_steps:
            break  # what is due after this save is made up for after the restore
        if evaluates or (hooks.evaluate_every and number == num_steps):
            hooks.evaluate(number, state.params)
        if samples or (hooks.sample_every and number == num_steps):
            hooks.sample(number, state.params)
        if pending is None:
            ended_s = time.monotonic()
    return state, number


def prefetch(
    batches: Iterator[Any], place: Callable[[Any], Any], position: Callable[[], Any]
) -> Iterator[tuple[Any, Any]]:
    """(place(batch), position after it), made one ahead in a thread of its own.

    An exception in the thread comes out of `next`. Closing the generator ends the
    thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=2)
    closed = threading.Event()

    def put(item) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put((place(batch), position()))
                if closed.is_set():
                    return
            put(StopIteration())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join(timeout=10)
