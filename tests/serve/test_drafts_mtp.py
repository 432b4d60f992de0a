# SPDX-License-Identifier: Apache-2.0
"""Drafts of the MTP head in the engine: the passes that `draft.generate` takes, and the
ids that plain decoding gives.

`draft.generate` keeps its caches in another way and has tests of its own against plain
decoding; greedy, both must agree pass by pass.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qwen_jax import mesh, params
from qwen_jax.models import decode, decoder, draft
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.serve import device, engine
from qwen_jax.serve import request as request_lib
from tests.models import test_draft
from tests.serve import test_engine

SETTINGS = device.Settings(
    rows=1,
    page_tokens=8,
    piece=8,
    max_tokens=96,
    drafts="mtp",
    draft_rows=4,
    draft_cost=0.0,
)
Request, ids_of = request_lib.Request, test_engine.ids_of
SPECS, weights = test_draft.SPECS, test_draft.weights
WARM = sampling_lib.Sampling(temperature=1.0, top_k=6, seed=3)


@functools.cache
def engine_of(name, settings=SETTINGS):
    return engine.Engine(SPECS[name], weights(name), settings=settings, stop_ids=())


def prompts(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [tuple(map(int, draw.integers(0, 8, n))) for n in lengths]


def played(made, some, salt, **fields):
    """Each prompt by itself: (ids, steps behind its own, times drafted, accepted)."""
    found = []
    for i, one in enumerate(some):
        begun, before = made.steps, made.load()
        told = made.run([Request(f"{i}", one, 25, salt=salt, **fields)])[f"{i}"]
        now, pieces = made.load(), -(-len(one) // 8)
        rounds, right = now.drafts - before.drafts, now.accepted - before.accepted
        found.append((ids_of(told), made.steps - begun - pieces, rounds, right))
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("qwen3_next", marks=pytest.mark.slow),
        pytest.param("qwen3_5", marks=pytest.mark.slow),
        "attention alone",
    ],
)
def test_passes_are_those_of_draft_generate(name, monkeypatch):
    """Prompts in one piece and in several, up to a page's border and behind it."""
    spec, some = SPECS[name], prompts((5, 8, 13, 24, 31))
    made = engine_of(name)
    wanted = draft.generate(spec, weights(name), some, max_tokens=25, draft_tokens=3)
    found = played(made, some, "greedy")
    assert [ids for ids, *_ in found] == wanted.ids
    passes = sum(steps for _, steps, *_ in found)
    assert passes / len(some) == wanted.passes and wanted.acceptance > 1.05
    # Drawn: the same engine without drafts is the oracle. Draws of their own, among six
    # ids about as likely, would agree once in six; the model's noise makes them right
    # more often.
    warm = played(made, some, "warm", sampling=WARM)
    monkeypatch.setattr(made._drafts, "hopes", lambda rows: False)
    plain = played(made, some, "plain", sampling=WARM)
    assert [one[0] for one in warm] == [one[0] for one in plain]
    assert [one[1] for one in plain] == [24] * 5
    assert sum(one[3] for one in warm) > 0.3 * sum(one[2] for one in warm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wish", [sampling_lib.Sampling(), WARM], ids=["greedy", "warm"]
)
def test_answers_are_those_by_hand_whatever_the_schedule(wish):
    name, settings = "qwen3_5", dataclasses.replace(SETTINGS, rows=4, pages=33)
    made = engine_of(name, settings)
    made.warm()
    compiled = made.load().compiled
    every = prompts((3, 9, 16, 30, 41, 24, 7, 50), 2)
    every += [every[3 + i][:20] + prompts((9,), 3 + i)[0] for i in range(5)]
    answers = decode.generate(
        SPECS[name], weights(name), every, max_tokens=40, sampling=wish, stop_ids=()
    )
    draw, cached, before = np.random.default_rng(7), 0, made.load()
    for turn in range(8):
        chosen = draw.permutation(len(every))[: draw.integers(4, 9)]
        told, gone = {f"{turn}-{i}": [] for i in chosen}, set()
        held = [made._scheduler._page() for _ in range(int(draw.integers(0, 14)))]
        for i in chosen:
            name = f"{turn}-{i}"
            full = {"logprobs": 2} if draw.random() < 0.2 else {}
            request = Request(
                name, every[i], int(draw.integers(1, 41)), sampling=wish, **full
            )
            made.submit(request, told[name].append)
            for _ in range(draw.integers(0, 5)):
                made.step()
            if draw.random() < 0.15:
                made.cancel(name)
                gone.add(name)
        while made.in_flight:
            made.step()
        made._scheduler._back([page for page in held if page is not None])
        for i in chosen:
            pieces = told[f"{turn}-{i}"]
            found = ids_of(pieces)
            assert found == answers[i][: len(found)]
            if f"{turn}-{i}" not in gone:
                assert pieces[-1].finish == "length"
            cached += pieces[-1].usage.cached
        assert made.load().pages_used == 0
    after = made.load()
    assert cached > 50 and after.preempted > before.preempted
    assert after.accepted > before.accepted + 20 and after.compiled == compiled


@pytest.mark.slow
@pytest.mark.parametrize("drafts", ["mtp", "lookup"])
def test_on_a_mesh(drafts):
    spec, rules = SPECS["qwen3_5"], mesh.Rules(batch=None)
    device_mesh = mesh.make(mesh.MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    layout = params.shardings(decoder.decoder_params(spec), device_mesh, rules)
    settings = dataclasses.replace(SETTINGS, rows=2, drafts=drafts)
    tree = weights("qwen3_5")  # of no mesh, whichever test asks first
    with jax.set_mesh(device_mesh):
        tree = jax.tree.map(jax.device_put, tree, layout)
        made = engine.Engine(spec, tree, settings=settings, rules=rules, stop_ids=())
    some = prompts((5, 8, 13))
    told = made.run([Request(f"{i}", one, 16) for i, one in enumerate(some)])
    wanted = decode.generate(spec, weights("qwen3_5"), some, max_tokens=16, stop_ids=())
    assert [ids_of(told[f"{i}"]) for i in range(3)] == wanted
    # What is looked up is hardly ever right in random text, and soon no more tried.
    assert made.load().drafts > (5 if drafts == "mtp" else 0)
