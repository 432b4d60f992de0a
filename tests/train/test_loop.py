# SPDX-License-Identifier: Apache-2.0
"""The loop's order, its stops and its reader thread, with a step that only counts."""

import threading
import time

import numpy as np
import pytest

from qwen_jax.train import loop


class Toy:
    """A step that adds the batch, and hooks that write down when they were called."""

    def __init__(self, stop_at=None, skipped=(), **due):
        self.calls, self.stop_at, self.skipped = [], stop_at, skipped
        self.dispatched = 0
        self.hooks = loop.Hooks(
            log=self.log,
            save=lambda step, state, place: self.say("save", step, state, place),
            save_due=lambda step: due.get("save", 0) and step % due["save"] == 0,
            evaluate=lambda step, params: self.say("evaluate", step, params),
            evaluate_every=due.get("evaluate", 0),
            sample=lambda step, params: self.say("sample", step, params),
            sample_every=due.get("sample", 0),
            stop=lambda: self.dispatched == self.stop_at,
        )

    def say(self, *what):
        self.calls.append(what)

    def log(self, step, values):
        self.say("log", step, values["loss"])
        assert values["step_s"] >= 0 and values["data_s"] >= 0

    def step(self, state, batch):
        self.dispatched += 1
        self.say("step", self.dispatched)
        bad = self.dispatched in self.skipped
        return State(state.params + batch), {"loss": batch, "skipped": bad}

    def run(self, first=0, until=6, **more):
        self.dispatched = first
        stream = ((np.float32(i), {"at": i}) for i in range(first + 1, until + 1))
        state = State(np.float32(100))
        return loop.loop(
            state,
            self.step,
            stream,
            first_step=first,
            num_steps=until,
            hooks=self.hooks,
            **more,
        )

    def of(self, kind):
        return [call[1] for call in self.calls if call[0] == kind]


class State:
    def __init__(self, params):
        self.params = params


def test_every_step_is_made_and_logged_once_one_late():
    toy = Toy()
    state, made = toy.run()
    assert (state.params, made) == (100 + 21, 6)
    assert toy.of("step") == toy.of("log") == [1, 2, 3, 4, 5, 6]
    first = [call[:2] for call in toy.calls[:4]]
    assert first == [("step", 1), ("step", 2), ("log", 1), ("step", 3)]


def test_a_step_is_logged_then_saved_then_evaluated_then_sampled():
    toy = Toy(save=3, evaluate=3, sample=3)
    toy.run(until=4)
    third = [call[:2] for call in toy.calls if call[1] == 3]
    kinds = ["step", "log", "save", "evaluate", "sample"]
    assert third == [(kind, 3) for kind in kinds]
    # The position is the one after this step's batch, not of what was read ahead.
    assert toy.calls[toy.calls.index(("log", 3, 3.0)) + 1][3] == {"at": 3}


def test_the_last_step_is_saved_and_evaluated_whatever_the_intervals():
    toy = Toy(save=4, evaluate=4, sample=4)
    toy.run(until=6)
    for kind in ("save", "evaluate", "sample"):
        assert toy.of(kind) == [4, 6]


def test_a_run_without_evaluation_has_none_at_the_end():
    toy = Toy()
    toy.run()
    assert toy.of("save") == [6] and not toy.of("evaluate") and not toy.of("sample")


def test_a_stop_saves_and_leaves_the_rest_to_the_next_start():
    toy = Toy(stop_at=4, evaluate=4, sample=4)
    state, made = toy.run()
    assert made == 4 and state.params == 110
    assert toy.of("log") == [1, 2, 3, 4] and toy.of("save") == [4]
    assert not toy.of("evaluate") and not toy.of("sample")


def test_a_stop_at_the_last_step_still_finishes():
    toy = Toy(stop_at=6, evaluate=4)
    assert toy.run()[1] == 6
    assert toy.of("evaluate") == [4, 6]


def test_going_on_numbers_steps_from_the_start_of_the_run():
    toy = Toy(save=5)
    _, made = toy.run(first=3)
    assert made == 6 and toy.of("log") == [4, 5, 6] and toy.of("save") == [5, 6]


def test_a_run_that_has_ended_makes_no_step():
    toy = Toy(save=1, evaluate=1)
    state, made = toy.run(first=6)
    assert made == 6 and not toy.calls and state.params == 100


def test_too_many_skipped_steps_in_a_row_end_the_run_naming_them():
    toy = Toy(skipped=(1, 3, 4, 5))
    with pytest.raises(loop.TooManySkipped, match="steps 3 to 5 .*optim.lr_peak"):
        toy.run(until=9, max_skipped=3)
    alternating = Toy(skipped=(1, 3, 5))
    assert alternating.run(max_skipped=2)[1] == 6


def reader_threads():
    return [t for t in threading.enumerate() if t.name == "batches"]


def test_prefetch_gives_batches_in_order_with_the_position_after_each():
    read = []

    def batches():
        for i in range(5):
            read.append(i)
            yield i

    stream = loop.prefetch(batches(), lambda x: 10 * x, lambda: len(read))
    assert list(stream) == [(10 * i, i + 1) for i in range(5)]
    assert not reader_threads()


def test_prefetch_passes_on_what_the_reader_raises_after_the_good_batches():
    def batches():
        yield 1
        raise OSError("disk gone")

    stream = loop.prefetch(batches(), lambda x: x, lambda: 0)
    assert next(stream) == (1, 0)
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
    assert not reader_threads()


def test_prefetch_reads_a_little_ahead_and_ends_its_thread_when_closed():
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield read[-1]

    stream = loop.prefetch(endless(), lambda x: x, lambda: 0)
    next(stream)
    deadline = time.monotonic() + 10
    while len(read) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(read) == 4  # one given, two ready, one in hand
    stream.close()
    assert not reader_threads()
