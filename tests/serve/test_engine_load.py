# SPDX-License-Identifier: Apache-2.0
"""What an engine knows of time: whom it refuses, and what it tells of waits.

The device is a simulated one: steps take as long as it is told, by a clock of its own,
so that waits are known. Nothing is compiled.
"""

import dataclasses
import functools
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from qwen_jax import models
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import device, engine
from qwen_jax.serve import request as request_lib

SPEC = spec_lib.Spec(
    vocab_size=64,
    width=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_width=8,
    ffn_width=8,
    max_positions=128,
)
SETTINGS = device.Settings(rows=4, page_tokens=8, piece=32, max_tokens=128, pages=65)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Device:
    """Takes its time, and says 7. prefill_s: a token; decode_s: a step."""

    def __init__(self, real, clock):
        self.pool, self.table_pages = real.pool, real.table_pages
        self.max_tokens, self.state_units = real.max_tokens, real.state_units
        self.draft_cost = real.draft_cost
        self._clock = clock
        self.prefill_s, self.decode_s = 0.001, 0.004

    def prefill(self, now):
        self._clock.now_s += now.count * self.prefill_s
        return None, None

    def first(self, row, logits):
        return np.array([7]), None

    def burst_of(self, rows):
        return 1

    def decode(self, rows, count):
        self._clock.now_s += self.decode_s
        return np.full(len(rows), 7), None


@functools.cache
def real_device():
    return engine.Engine(SPEC, models.init(SPEC, 0), settings=SETTINGS)._device


def made(**how):
    """An engine with a simulated device; (engine, device, clock)."""
    clock = Clock()
    sim = Device(real_device(), clock)
    settings = dataclasses.replace(SETTINGS, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.device_lib, "Device", lambda *_: sim)
        one = engine.Engine(SPEC, None, settings=settings, stop_ids=(), clock=clock)
    return one, sim, clock


def asked(name, tokens, answer=5, n=1):
    draw = random.Random(name)
    prompt = tuple(draw.randrange(64) for _ in range(tokens))
    return request_lib.Request(str(name), prompt, answer, n=n)


def ignore(piece):
    pass


def finish(one):
    while one.in_flight:
        one.step()


def test_times_of_queue_and_prefill():
    """The fifth answer has a slot when the first is over; prompts go in one by one."""
    one, sim, clock = made()
    told = {}
    for i in range(5):
        one.submit(
            asked(i, 32, answer=3), lambda p: told.setdefault(p.request, []).append(p)
        )
        clock.now_s += 1.0
    finish(one)
    first = {int(name): pieces[0] for name, pieces in told.items()}
    assert all(piece.queue_s is None for x in told.values() for piece in x[1:])
    assert all(piece.prefill_s is None for x in told.values() for piece in x[1:])
    # All but the last have slots at once, at 5 s.
    assert [first[i].queue_s for i in range(4)] == [5.0, 4.0, 3.0, 2.0]
    assert first[0].prefill_s == pytest.approx(0.032)
    assert first[1].prefill_s == pytest.approx(2 * 0.032 + 0.004)
    assert first[4].queue_s > 1.0 + 3 * 0.032
    assert first[4].prefill_s == pytest.approx(0.032, abs=0.005)


def test_a_request_that_would_wait_too_long_is_refused_at_once():
    one, _, _ = made(max_wait_s=1.0)
    # 10 ms for a token of a prompt, 300 ms from one end of a row to the next.
    one._pace.piece_s, one._pace.piece_tokens, one._pace.end_s = 0.3, 30.0, 0.3
    one.submit(asked("a", 40), ignore)  # waits for nobody
    assert one.load().wait_s == pytest.approx(0.4)
    one.submit(asked("b", 40), ignore)  # 0.4 s
    assert one.refusal() is None
    one.submit(asked("c", 40), ignore)  # 0.8 s
    with pytest.raises(engine.Overloaded) as refused:
        one.submit(asked("d", 40), ignore)
    assert refused.value.retry_after_s == pytest.approx(1.2)
    assert one.refusal().retry_after_s == pytest.approx(1.2)
    one._pace.piece_s = 0.03
    one.submit(asked("e", 40), ignore)  # four rows
    assert one.refusal() is None  # one more answer would have to wait for one end
    with pytest.raises(engine.Overloaded) as refused:
        one.submit(asked("f", 40, n=4), ignore)
    assert refused.value.retry_after_s == pytest.approx(0.16 + 4 * 0.3)
    finish(one)
    assert one._pace.end_s > 0


def test_nobody_is_refused_where_nobody_is_before_him():
    """Whatever was measured before, and however many answers are wanted."""
    one, _, _ = made(max_wait_s=1.0)
    one._pace.piece_s = one._pace.piece_tokens = one._pace.end_s = 1e6
    for n in (1, 4, 16):
        assert one.refusal() is None
        one.submit(asked(n, 8, n=n), ignore)
        with pytest.raises(engine.Overloaded):
            one.submit(asked("late", 8), ignore)
        finish(one)


def test_the_piece_that_is_being_computed_counts():
    """A request that comes in the midst of a step waits for it."""
    one, sim, _ = made(max_wait_s=0.001)
    one.submit(asked("a", 32), ignore)
    finish(one)
    seen = []
    first = sim.first

    def during(*given):
        seen.append((one.refusal(), one.load().wait_s))
        return first(*given)

    sim.first = during
    one.submit(asked("b", 32), ignore)
    finish(one)
    (refusal, wait_s), *_ = seen
    assert isinstance(refusal, engine.Overloaded)
    assert wait_s == pytest.approx(0.032)
    assert one.load().wait_s == 0.0


def test_a_full_queue_tells_when_to_come_again():
    one, _, _ = made(max_waiting=2)
    one._pace.piece_s, one._pace.piece_tokens = 1.0, 10.0
    one.submit(asked("a", 20), ignore)
    one.submit(asked("b", 20), ignore)
    with pytest.raises(engine.Overloaded) as refused:
        one.submit(asked("c", 20), ignore)
    assert refused.value.retry_after_s == pytest.approx(4.0)
    assert one.refusal().retry_after_s == pytest.approx(4.0)
    finish(one)


def overload(one, clock, arrivals):
    """Requests at their times; (those that were taken, waits of those in the queue)."""
    taken, waits_s = 0, []

    def tell(piece):
        if piece.queue_s is not None:
            waits_s.append(piece.queue_s)

    for i, (due_s, tokens, answer) in enumerate(arrivals):
        while one.in_flight and clock.now_s < due_s:
            one.step()
        clock.now_s = max(clock.now_s, due_s)
        # What the server asks before it reads a body says what `submit` says then.
        before = one.refusal()
        try:
            one.submit(asked(f"{id(arrivals)}-{i}", tokens, answer), tell)
            taken += 1
            assert before is None
        except engine.Overloaded as refused:
            assert one.in_flight and before is not None
            assert 0 < refused.retry_after_s
    finish(one)
    return taken, waits_s


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    seed=strategies.integers(0, 2**32),
    slow=strategies.sampled_from([1.0, 5.0, 100.0, 1e4]),
    limit_s=strategies.sampled_from([0.005, 0.03, 0.1, 0.5]),
    times=strategies.sampled_from([0.5, 2.0, 5.0, 20.0]),
)
def test_a_limit_of_waits_does_not_shut(seed, slow, limit_s, times):
    """After a time of slow steps as many requests are taken as by a new engine, but for
    a few; and those that are taken wait no longer than about the limit."""
    draw = random.Random(seed)

    def arrivals(count, begin_s):
        due_s, some = begin_s, []
        for _ in range(count):
            due_s += draw.expovariate(times / 0.03)  # about 30 ms each
            some.append((due_s, draw.randrange(1, 60), draw.randrange(1, 9)))
        return some

    one, sim, clock = made(max_wait_s=limit_s)
    overload(one, clock, arrivals(30, 0.0))
    sim.prefill_s, sim.decode_s = 0.001 * slow, 0.004 * slow
    overload(one, clock, arrivals(60, clock.now_s))
    sim.prefill_s, sim.decode_s = 0.001, 0.004
    last = arrivals(300, clock.now_s)
    taken, waits_s = overload(one, clock, last)
    new, _, other = made(max_wait_s=limit_s)
    begin_s = last[0][0]
    other.now_s = begin_s
    by_new, _ = overload(new, other, list(last))
    assert taken >= 0.7 * by_new - 10
    # The rest of a step, and what was not yet known of how long things take.
    assert np.percentile(waits_s, 90) <= 1.5 * limit_s + 0.08
