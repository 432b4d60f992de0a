# SPDX-License-Identifier: Apache-2.0
"""The published bubbles of ChunkFlow, and the closed forms of 1F1B."""

import pytest

from qwen_jax import config
from qwen_jax.train import bubbles

# A document of 4 units as chunks of 2 (c1, c2), one of 2 (c3), two of 1 packed (c4).
CHUNKS = ((2, 2), (2,), (2,))
C1, C2, C3, C4 = range(4)


def run(micros, devices, **orders):
    return bubbles.simulate(micros, bubbles.one_f_one_b(micros, devices, **orders))


def test_the_published_cases():
    """Four stages, a backward pass twice a forward one: 42.86, 57.14 and 47.83 %."""
    alike = run([bubbles.Micro(2)] * 4, 4)
    assert (alike.makespan, round(100 * alike.bubble, 2)) == (42, 42.86)
    for lengths in ((4, 1, 2, 1), (4, 2, 1, 1)):
        uneven = run([bubbles.Micro(n) for n in lengths], 4)
        assert (uneven.makespan, round(100 * uneven.bubble, 2)) == (56, 57.14)
    forward = [C3, C4, C1, C2]
    chunked = run(bubbles.chunks(CHUNKS, live=2), 4, forward=forward)
    assert bubbles.backward_order(chunked.micros, forward) == [C3, C4, C2, C1]
    assert (chunked.makespan, round(100 * chunked.bubble, 2)) == (46, 47.83)


@pytest.mark.parametrize(
    ("count", "devices"), [(4, 4), (8, 4), (7, 3), (1, 5), (12, 2)]
)
def test_plain_1f1b_is_its_closed_form(count, devices):
    made = run([bubbles.Micro(1.0)] * count, devices)
    assert made.bubble == pytest.approx((devices - 1) / (count + devices - 1))


@pytest.mark.parametrize(
    ("count", "devices", "parts"), [(8, 4, 2), (8, 4, 4), (6, 3, 2)]
)
def test_interleaved_1f1b_is_its_closed_form(count, devices, parts):
    micros = [bubbles.Micro(1.0)] * count
    ops = bubbles.interleaved(count, devices, parts)
    made = bubbles.simulate(micros, ops, parts)
    wait = (devices - 1) / parts
    assert made.bubble == pytest.approx(wait / (count + wait))
    assert all(len(one) == 2 * count * parts for one in ops)


def test_what_does_not_stay_is_computed_again_before_it_is_needed():
    micros = bubbles.chunks(((1, 1, 1, 1), (1,)), live=2)
    made = run(micros, 3)
    for ops in made.devices:
        kinds = [(op.kind, op.micro) for op, _, _ in ops]
        again = [i for kind, i in kinds if kind == bubbles.AGAIN]
        assert again == [1, 0]
        for i in again:
            assert kinds.index(("B", i)) == kinds.index(("R", i)) + 1
        down = [i for kind, i in kinds if kind == "B" and i < 4]
        assert down == [3, 2, 1, 0]
    alone = [run(bubbles.chunks(((1, 1, 1, 1),), live=k), 3).makespan for k in (1, 4)]
    assert alone == [
        21,
        18,
    ]  # three more forward passes of the last device; others wait


def test_nothing_overlaps_and_nothing_comes_before_what_it_needs():
    micros = bubbles.chunks(((3, 3, 1), (2,), (3, 2), (3,)), live=1)
    made = run(micros, 4)
    began, ended = ({}, {})
    for p, ops in enumerate(made.devices):
        for (_, _, end), (_, begin, _) in zip(ops, ops[1:], strict=False):
            assert begin >= end
        for op, begin, end in ops:
            began[op.kind, op.micro, p], ended[op.kind, op.micro, p] = begin, end
    for (kind, i, p), begin in began.items():
        if kind == "F" and p:
            assert begin >= ended["F", i, p - 1]
        if kind == "B":
            assert begin >= ended["F" if micros[i].stays else "R", i, p]
            assert p == 3 or begin >= ended["B", i, p + 1]


def test_orders_that_cannot_be_are_refused():
    micros = bubbles.chunks(CHUNKS, live=2)
    with pytest.raises(config.InputError, match="chunks of group 0 go up"):
        bubbles.one_f_one_b(micros, 4, forward=[C2, C1, C3, C4])
    with pytest.raises(config.InputError, match="chunks of group 0 go down"):
        bubbles.one_f_one_b(micros, 4, backward=[C1, C2, C3, C4])
    with pytest.raises(config.InputError, match="each of 0 to 3 once"):
        bubbles.one_f_one_b(micros, 4, forward=[0, 1, 2, 2])
    with pytest.raises(config.InputError, match="5 micro-batches on 4 devices"):
        bubbles.interleaved(5, 4, 2)
    ops = [[bubbles.Op("B", 0), bubbles.Op("F", 0)]]
    with pytest.raises(RuntimeError, match="wait for each other"):
        bubbles.simulate([bubbles.Micro(1)], ops)
    with pytest.raises(RuntimeError, match="wait for each other"):  # it did not stay
        bubbles.simulate([bubbles.Micro(1, stays=False)], [ops[0][::-1]])
