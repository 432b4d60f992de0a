# SPDX-License-Identifier: Apache-2.0
"""A save by time comes when its time has passed, and processes ask rarely for it."""

import random
import types

import hypothesis
import hypothesis.strategies as st
import pytest

from qwen_jax.checkpoint import timing


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def exchanged(monkeypatch):
    """Two processes: what process 0 said by tag, for the other to read."""
    said = {}
    index = [0]

    def from_primary(tag, value, timeout_s):
        if index[0] == 0:
            assert tag not in said
            said[tag] = value
        return said[tag]

    facts = types.SimpleNamespace(
        process_index=lambda: index[0], process_count=lambda: 2
    )
    monkeypatch.setattr(timing, "jax", facts)
    monkeypatch.setattr(timing.agree, "from_primary", from_primary)
    monkeypatch.setattr(timing.agree, "forget", lambda tag: None)
    said["become"] = lambda process: index.__setitem__(0, process)
    return said


def saves(timer, clock, took_s):
    """[(step, seconds since the last save)] of a run whose steps take so long."""
    found, saved_s = [], clock.now_s
    for step, step_s in enumerate(took_s, 1):
        clock.now_s += step_s
        if timer.due(step):
            found.append((step, clock.now_s - saved_s))
            timer.restart(step)
            saved_s = clock.now_s
    return found


def test_one_process_saves_at_the_first_step_past_the_time():
    clock = Clock()
    timer = timing.Timer(10.0, clock=clock)
    assert [step for step, _ in saves(timer, clock, [3.0] * 12)] == [4, 8, 12]


def test_no_time_is_never_due():
    clock = Clock()
    timer = timing.Timer(0.0, clock=clock)
    assert saves(timer, clock, [1e9] * 3) == []


def test_processes_save_at_the_first_step_past_the_time_with_few_looks(exchanged):
    clock = Clock()
    timer = timing.Timer(900.0, clock=clock)
    found = saves(timer, clock, [0.125] * 20_000)
    assert [step for step, _ in found] == [7200, 14_400]
    assert len(exchanged) < 3 * 2 * 14  # of 20,000 steps


@hypothesis.given(st.integers(0, 2**32), st.floats(0.1, 60))
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    deadline=None,
)
def test_the_other_process_says_the_same_whatever_its_clock(exchanged, seed, every_s):
    draw = random.Random(seed)
    both = []
    for process in (0, 1):
        exchanged["become"](process)
        clock = Clock()
        timer = timing.Timer(every_s, clock=clock)
        timer._tag = f"timer/{seed}/{every_s}"  # made together, so numbered alike
        took = [draw.choice([0.001, 0.1, 2.0]) for _ in range(300)]
        both.append(saves(timer, clock, took))
        for tag in [tag for tag in exchanged if process and tag.startswith("timer/")]:
            del exchanged[tag]
    first, second = ([step for step, _ in found] for found in both)
    assert first == second
    assert all(waited_s >= every_s for _, waited_s in both[0])


def test_steps_that_seem_to_take_nothing_at_first_do_not_put_the_looks_off(exchanged):
    """The first step after a save is dispatched and not waited for."""
    clock = Clock()
    timer = timing.Timer(10.0, clock=clock)
    found = saves(timer, clock, ([1e-5] + [0.1] * 101) * 5)
    assert len(found) == 5 and all(10 <= waited_s < 10.2 for _, waited_s in found)


def test_steps_that_become_longer_delay_a_save_by_half_as_much_at_most(exchanged):
    """Ten times as long from some step on: the look ahead was for the short ones."""
    for change in range(1, 400, 7):
        clock = Clock()
        timer = timing.Timer(40.0, clock=clock)
        took = [0.1] * change + [1.0] * 200
        (_, waited_s), *_ = saves(timer, clock, took)
        assert 40.0 <= waited_s <= 40.0 * 10 / 2 + 2
