# SPDX-License-Identifier: Apache-2.0
"""Turns of children: order, ratios, and what a failing child leaves behind."""

import sys

import pytest

from qwen_jax.bench import rounds

CHILD = """
import json, sys
seconds = float(sys.argv[1])
for text in sys.stdin:
    request = json.loads(text)
    print("a library's chatter", file=sys.stderr, flush=True)
    answer = {"ok": True, "seconds": seconds * request["n"], "cpu_s": 0.0}
    answer["losses"] = [1]
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def child():
    made = []

    def make(code, *argv):
        command = [sys.executable, "-S", "-c", code, *map(str, argv)]
        made.append(rounds.Child(command, {}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def turn(name, number, seconds, losses=(1.0,)):
    return rounds.Turn(name, number, 2, seconds, 0.5, 0.0, losses)


def test_every_round_gives_each_a_turn_in_an_order_of_its_own(child):
    children = {name: child(CHILD, cost) for name, cost in [("a", 1), ("b", 2)]}
    said = []
    turns = rounds.measure(children, {"a": 2, "b": 3}, 8, timeout_s=20, say=said.append)
    orders = ["".join(t.name for t in turns if t.round == r) for r in range(8)]
    assert set(orders) == {"ab", "ba"}
    assert {t.name: t.step_s for t in turns} == {"a": 1.0, "b": 2.0}
    assert len(said) == 8


def test_the_first_step_of_a_turn_is_not_counted(child):
    """A step of its own is asked for, whose answer is dropped."""
    asked = []
    one = child(CHILD, 1)
    ask = one.ask
    one.ask = lambda request, timeout_s: (
        asked.append(request) or ask(request, timeout_s)
    )
    (only,) = rounds.measure({"a": one}, {"a": 5}, 1, timeout_s=20)
    assert [request["n"] for request in asked] == [1, 5] and only.steps == 5


def test_measuring_ends_in_time_but_makes_one_round(child):
    children = {"a": child(CHILD, 1)}
    left = iter([-1.0])
    turns = rounds.measure(
        children, {"a": 1}, 9, timeout_s=20, seconds_left=lambda: next(left)
    )
    assert len(turns) == 1


def test_ratios_are_taken_inside_rounds():
    # The machine halves its speed in round 1: medians of times would give 1.5.
    turns = [
        turn("ours", 0, 2.0),
        turn("peer", 0, 3.0),
        turn("ours", 1, 4.0),
        turn("peer", 1, 6.0),
        turn("ours", 2, 4.0),
        turn("peer", 2, 8.0),
    ]
    ratio = rounds.ratio(turns, "ours", "peer")
    assert ratio.median == 1.5
    assert ratio.low == 1.5
    assert ratio.high == 1.75
    assert rounds.ratio(turns, "peer", "ours").median == pytest.approx(1 / 1.5)


def test_summary_has_median_extremes_and_mean_of_steps():
    turns = [turn("a", 0, 2.0), turn("a", 1, 4.0), turn("a", 2, 12.0, (3.0, 0.5))]
    made = rounds.summarize([*turns, turn("b", 0, 99.0)], "a")
    assert (made.median_s, made.least_s, made.most_s) == (2.0, 1.0, 6.0)
    assert made.mean_s == pytest.approx(3.0)
    assert made.rounds == 3
    assert made.last_loss == 0.5


def test_a_child_that_says_no_is_quoted(child):
    code = (
        "import json\ninput()\n"
        "print(json.dumps({'ok': False, 'error': 'no memory', 'trace': 'deep'}))"
    )
    with pytest.raises(rounds.ChildError, match="no memory") as caught:
        child(code).ask({"do": "build"}, 20)
    assert caught.value.trace == "deep"


def test_a_child_that_dies_leaves_its_last_words(child):
    code = "import sys\ninput()\nprint('core melted', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(rounds.ChildError, match="exit code 3, core melted"):
        child(code).ask({"do": "build"}, 20)


def test_a_silent_child_is_given_up(child):
    with pytest.raises(rounds.ChildError, match=r"no answer in 0 s"):
        child("import time\ntime.sleep(60)").ask({"do": "build"}, 0.2)
