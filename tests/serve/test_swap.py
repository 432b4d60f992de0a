# SPDX-License-Identifier: Apache-2.0
"""Weights of an engine are exchanged under traffic, and every answer is of one model.

The oracle is `decode.generate` with the weights that were in force when a request came.
"""

import dataclasses

import jax
import pytest

from qwen_jax import config, models
from qwen_jax.models import decode
from qwen_jax.serve import engine
from qwen_jax.serve import request as request_lib
from tests.serve import test_engine as base


def other_weights(spec=base.SPEC):
    return models.init(spec, 1)


@pytest.mark.parametrize(
    "spec",
    [base.SPEC, pytest.param(base.HYBRID, marks=pytest.mark.slow)],
    ids=["dense", "hybrid"],
)
def test_a_swap_drops_nothing_and_no_answer_is_of_two_models(spec):
    """What was asked before is answered by the old weights, what comes later by the
    new ones; pages of the old are not found again, nothing is compiled."""
    made = engine.Engine(spec, base.weights(spec), settings=base.SETTINGS, stop_ids=())
    made.warm()
    before, some = made.load(), base.prompts()
    told = {}

    def ask(name, number):
        request = request_lib.Request(id=name, prompt=some[number], max_tokens=12)
        made.submit(request, lambda piece: told.setdefault(name, []).append(piece))

    for i in range(len(some)):  # more than there are rows, so some only wait
        ask(f"old{i}", i)
    for _ in range(3):
        made.step()
    # The last one to be told asks anew, while the weights are on their way.
    asked_late = []

    def late(piece):
        told.setdefault("first", []).append(piece)
        if piece.finish:
            asked_late.append(made._swap is not None)
            for i in range(len(some)):
                ask(f"new{i}", i)
            made.cancel("new3")

    made.submit(request_lib.Request(id="first", prompt=some[0], max_tokens=2), late)
    made.swap(other_weights(spec))
    while made.in_flight:
        made.step()
    assert asked_late == [True]
    cancelled = told.pop("new3")
    assert [piece.finish for piece in cancelled] == ["cancelled"]
    for name, pieces in told.items():
        number, old = int(name[3:]) if name != "first" else 0, name[:3] != "new"
        tree = base.weights(spec) if old else other_weights(spec)
        limit = 2 if name == "first" else 12
        (wanted,) = decode.generate(
            spec, tree, [some[number]], max_tokens=limit, stop_ids=()
        )
        assert base.ids_of(pieces) == wanted, name
    assert told["new1"][-1].usage.cached == 0
    after = made.load()
    assert after.compiled == before.compiled
    assert after.pages_used == 0


def test_a_swap_refuses_weights_of_another_model():
    made = base.shared()
    wide = models.init(dataclasses.replace(base.SPEC, ffn_width=64), 0)
    with pytest.raises(config.InputError, match=r"mlp.*48.*64|mlp.*64.*48"):
        made.swap(wide)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), base.weights())
    with pytest.raises(config.InputError, match="bfloat16"):
        made.swap(half)
    assert made.generate([base.prompts()[0]], max_tokens=3) is not None


def test_a_swap_beside_the_engines_thread():
    made = engine.Engine(base.SPEC, base.weights(), settings=base.SETTINGS, stop_ids=())
    made.start()
    try:
        (old,) = made.run(base.asked(base.prompts()[:1])).values()
        made.swap(other_weights())
        (new,) = made.run(base.asked(base.prompts()[:1])).values()
    finally:
        made.close(0.0)
    assert base.ids_of(old) == base.by_hand(base.prompts()[0], 12)
    (wanted,) = decode.generate(
        base.SPEC, other_weights(), [base.prompts()[0]], max_tokens=12, stop_ids=()
    )
    assert base.ids_of(new) == wanted
    with pytest.raises(engine.Closed):
        made.swap(other_weights())
