# SPDX-License-Identifier: Apache-2.0
"""Tables of ticks: the simulator's orders, and every operation finds what it needs."""

import dataclasses
import itertools

import numpy as np
import pytest

from qwen_jax.train import bubbles
from qwen_jax.train.pipeline import batches, ticks


def replay(plan, micros, parts=1):
    """Go through a table with names in place of arrays; operations of each device.

    A row's slots are checked against what was put there: nothing is looked up in the
    order that the table was made from.
    """
    rows, (length, devices) = plan.rows, plan.rows["kind"].shape
    stages = devices * parts
    x, d, s, g = ([{} for _ in range(devices)] for _ in range(4))
    done = [[] for _ in range(devices)]
    for t in range(length):
        up, down = [None] * devices, [None] * devices
        for p in range(devices):
            row = {name: int(column[t, p]) for name, column in rows.items()}
            if row["kind"] == ticks.IDLE:
                continue
            i, stage = row["micro"], row["part"] * devices + p
            one, back = micros[i], row["kind"] == ticks.BACKWARD
            assert row["grouped"] == (one.group is not None)
            if stage and not (back and row["grouped"]):
                assert x[p][row["x_from"]] == (i, stage)
            if row["grouped"]:
                assert row["number"] == one.number and row["g"] < plan.slots["g"]
                members = [m.number for m in micros if m.group == one.group]
                assert row["ends"] == (one.number == max(members))
                keys = g[p].get(row["g"])
                if row["kind"] == ticks.FORWARD and one.number == 0:
                    keys = (one.group, 0)  # those of an earlier group are done with
                assert keys[0] == one.group and keys[1] >= one.number
                g[p][row["g"]] = (one.group, max(keys[1], one.number + 1))
                if back:
                    assert s[p][row["s"]] == (i, stage) and row["s"] < plan.slots["s"]
                else:
                    s[p][row["s"]] = (i, stage)
            if back:
                assert stage == stages - 1 or d[p][row["d_from"]] == (i, stage)
                down[p] = (i, stage - 1)
            else:
                up[p] = (i, stage + 1) if row["kind"] == ticks.FORWARD else None
            done[p].append(bubbles.Op(ticks.KINDS[row["kind"]], i, row["part"]))
        for p in range(devices):
            x[p][int(rows["x_into"][t, p])] = up[p - 1]
            d[p][int(rows["d_into"][t, p])] = down[(p + 1) % devices]
    return done


@pytest.mark.parametrize(
    ("count", "stages", "parts"),
    [(4, 4, 1), (7, 3, 1), (1, 4, 1), (16, 2, 1), (3, 1, 1), (8, 4, 2), (6, 2, 3)],
)
def test_a_table_is_the_order_of_the_simulator(count, stages, parts):
    name = "1f1b" if parts == 1 else "interleaved"
    plan, micros = batches.table(count, stages, parts, name), count * [None]
    micros = [bubbles.Micro(1.0) for _ in micros]
    if parts == 1:
        order = bubbles.one_f_one_b(micros, stages)
    else:
        order = bubbles.interleaved(count, stages, parts)
    assert replay(plan, micros, parts) == order == plan.order()
    wait = (stages - 1) / parts
    bubble = bubbles.simulate(micros, plan.order(), parts).bubble
    assert bubble == pytest.approx(wait / (count + wait))


def test_the_published_case_and_what_ticks_cost():
    """Four micro-batches on four stages: 42.86 % for devices that wait for nothing but
    what they need. In ticks, forward passes stand beside backward ones."""
    plan = batches.table(4, 4, 1, "1f1b")
    line = bubbles.simulate([bubbles.Micro(2.0)] * 4, plan.order())
    assert (line.makespan, round(100 * line.bubble, 2)) == (42, 42.86)
    assert plan.rows["kind"].shape == (14, 4)
    assert plan.seconds({"F": 1, "B": 1}) == 14 == 2 * (4 + 4 - 1)
    # Of 14 ticks the first 4 have no backward pass in them.
    assert plan.seconds({"F": 2, "B": 4}) == 4 * 2 + 10 * 4
    assert plan.rows["kind"].T.tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 2, 0, 2, 0, 2, 0, 2],
        [0, 1, 1, 1, 0, 0, 2, 1, 2, 0, 2, 0, 2, 0],
        [0, 0, 1, 1, 0, 2, 1, 2, 1, 2, 0, 2, 0, 0],
        [0, 0, 0, 1, 2, 1, 2, 1, 2, 1, 2, 0, 0, 0],
    ]


@pytest.mark.parametrize(("count", "stages"), [(4, 4), (16, 4), (3, 4), (8, 2), (2, 1)])
def test_eager_1f1b_waits_no_longer_in_ticks_than_1f1b_without(count, stages):
    """Whatever a backward pass costs: (P - 1) / (M + P - 1) of the time; in its own
    ticks 1F1B waits longer, for some go forward while others go backward."""
    micros = [bubbles.Micro(1.0)] * count
    plan = batches.table(count, stages, 1, "eager")
    assert replay(plan, micros) == plan.order()
    assert plan.order() == bubbles.one_f_one_b(micros, stages, ahead=2)
    kinds = plan.rows["kind"]
    assert not (kinds[0::2] == ticks.BACKWARD).any()
    assert not (kinds[1::2] == ticks.FORWARD).any()
    for back in (2.0, 3.0):
        costs = {"F": 1.0, "B": back}
        ideal = (count + stages - 1) * (1 + back)
        assert plan.seconds(costs) == ideal
        line = bubbles.simulate(micros, bubbles.one_f_one_b(micros, stages), 1, back)
        assert line.makespan == ideal
        plain = batches.table(count, stages, 1, "1f1b").seconds(costs)
        assert plain > ideal if min(count, stages) > 1 else plain == ideal
    assert plan.slots["x"] <= 2 * (stages - 1)


def test_slots_are_of_what_is_under_way():
    """However many micro-batches there are: as many as there are stages, at most."""
    for stages, count in itertools.product((2, 4), (4, 8, 32)):
        slots = batches.table(count, stages, 1, "1f1b").slots
        assert (slots["x"], slots["d"], slots["s"], slots["g"]) == (stages, 1, 0, 0)
    deep = [batches.table(n, 4, 2, "interleaved").slots for n in (8, 16, 64)]
    assert deep[0] == deep[1] == deep[2] and deep[0]["x"] == 10


@pytest.mark.parametrize("seed", range(12))
def test_chunks_find_what_they_need(seed):
    rng = np.random.default_rng(seed)
    groups = [[1.0] * rng.integers(1, 6) for _ in range(rng.integers(1, 7))]
    micros = bubbles.chunks(groups, live=int(rng.integers(1, 4)))
    stages = int(rng.integers(1, 5))
    order = bubbles.one_f_one_b(micros, stages, ahead=int(rng.integers(1, 3)))
    for turns in (False, True):
        made = ticks.table(micros, order, turns=turns)
        assert replay(made, micros) == order
        kinds = made.rows["kind"]
        wrong = (kinds[1::2] % 2).any() or (kinds[::2] == ticks.BACKWARD).any()
        assert not turns or not wrong
    again = sum(op.kind == bubbles.AGAIN for op in order[0])
    assert again == sum(not one.stays for one in micros)


def test_a_table_that_is_wrong_is_seen():
    """The replay above does see a slot that is taken too early."""
    plan = batches.table(8, 4, 1, "1f1b")
    rows = plan.rows | {"x_into": np.minimum(plan.rows["x_into"], 2)}
    with pytest.raises(AssertionError):
        replay(dataclasses.replace(plan, rows=rows), [bubbles.Micro(1.0)] * 8)
