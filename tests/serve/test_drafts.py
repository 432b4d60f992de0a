# SPDX-License-Identifier: Apache-2.0
"""With drafts an engine takes fewer steps, and says what it says without, id by id.

The oracle is the engine without drafts, which has its own tests against decoding by
hand; for distributions the full forward pass.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from scipy import special, stats

from qwen_jax import config, models
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.serve import device, drafts, engine, scheduler
from qwen_jax.serve import request as request_lib
from tests.serve import test_engine

# Few ids: what stood there before comes again, and drafts are right now and then.
SPEC = dataclasses.replace(test_engine.SPEC, vocab_size=8, init_std=0.25)
SETTINGS = device.Settings(rows=4, page_tokens=8, piece=8, max_tokens=96, pages=33)
LOOKUP = dataclasses.replace(SETTINGS, drafts="lookup", draft_rows=4, draft_cost=0.0)
Request, ids_of = request_lib.Request, test_engine.ids_of
GREEDY = sampling_lib.Sampling()
WISH = sampling_lib.Sampling(temperature=0.8, top_p=0.95, seed=5)


@functools.cache
def weights(spec):
    return models.init(spec, 3)


@functools.cache
def engine_of(settings, spec=SPEC):
    """An engine that tests use one after another, in their own thread."""
    return engine.Engine(spec, weights(spec), settings=settings, stop_ids=())


@functools.cache
def plainly(prompt, wish=GREEDY, spec=SPEC):
    """The answer without drafts, 40 ids."""
    request = Request("plain", prompt, 40, sampling=wish)
    return ids_of(engine_of(SETTINGS, spec).run([request])["plain"])


def prompts(lengths, seed=0, vocab=8):
    draw = np.random.default_rng(seed)
    return [tuple(map(int, draw.integers(0, vocab, n))) for n in lengths]


def drafting(answers, monkeypatch, wrong=lambda at: False, settings=LOOKUP):
    """An engine whose drafts are ids of known answers, by prompt; changed where `wrong`
    says so of their number in the answer."""
    made = engine_of(settings)

    def ids(row, most):
        at = len(row.ids) - len(row.request.prompt)
        known = answers[row.request.prompt][at : at + most]
        return [(x + wrong(at + i)) % 8 for i, x in enumerate(known)]

    monkeypatch.setattr(made._drafts, "ids", ids)
    return made


def since(before, after):
    names = ("drafts", "drafted", "accepted")
    return tuple(getattr(after, k) - getattr(before, k) for k in names)


def test_drafts_that_are_right_take_the_steps_that_they_should(monkeypatch):
    (prompt,) = prompts([6])
    made = drafting({prompt: plainly(prompt)}, monkeypatch)
    for most, steps in ((1, 1), (2, 2), (5, 2), (6, 3), (24, 7), (40, 11)):
        # One for the prompt and the first id, then four ids in each, the last ones too.
        before, begun = made.load(), made.steps
        told = made.run([Request("r", prompt, most, salt=str(most))])["r"]
        assert ids_of(told) == plainly(prompt)[:most]
        assert made.steps - begun == steps
        drafted = most - 1 - (steps - 1)
        assert since(before, made.load()) == (
            -(-drafted // 3),
            drafted,
            drafted,
        )
        assert told[-1].usage == request_lib.Usage(6, 0, most)
        assert [piece.finish for piece in told] == [None] * (most - 1) + ["length"]


def test_drafts_that_are_wrong_cost_no_token(monkeypatch):
    (prompt,) = prompts([6])
    made = drafting({prompt: plainly(prompt)}, monkeypatch, wrong=lambda at: True)
    before, begun = made.load(), made.steps
    told = made.run([Request("r", prompt, 40, salt="wrong")])["r"]
    assert ids_of(told) == plainly(prompt)
    rounds, drafted, accepted = since(before, made.load())
    assert accepted == 0 and drafted > 3 and made.steps - begun == 40


def test_every_other_draft_is_cut_where_it_is_wrong(monkeypatch):
    (prompt,) = prompts([6])
    answer = plainly(prompt)
    # Ids 3, 6, 9 ... are drafted wrong: of each three drafts two are right.
    made = drafting({prompt: answer}, monkeypatch, wrong=lambda at: at % 3 == 0)
    begun, before = made.steps, made.load()
    told = made.run([Request("r", prompt, 40, salt="some")])["r"]
    assert ids_of(told) == answer
    assert made.steps - begun == 1 + 13 and since(before, made.load())[2] == 26


def test_an_answer_ends_inside_a_run(monkeypatch):
    (prompt,) = prompts([11])
    answer = plainly(prompt, WISH)
    made = drafting({prompt: answer}, monkeypatch)
    end = answer[7]
    first = answer.index(end)
    request = Request("r", prompt, 40, sampling=WISH, stop_ids=(end,))
    told = made.run([request])["r"]
    assert ids_of(told) == answer[: first + 1]
    assert (told[-1].finish, told[-1].stopped_by) == ("stop", end)
    assert told[-1].usage.answer == first + 1 and made.load().pages_used == 0
    # A caller that gives up gets no more, and leaves nothing.
    pieces = []
    made.submit(Request("c", prompt, 40, sampling=WISH), pieces.append)
    for _ in range(4):
        made.step()
    made.cancel("c")
    made.step()
    found = ids_of(pieces)
    assert pieces[-1].finish == "cancelled" and made.load().pages_used == 0
    assert 4 < len(found) < 20 and found == answer[: len(found)]


@pytest.mark.parametrize("wish", [GREEDY, WISH], ids=["greedy", "warm"])
def test_answers_are_those_without_drafts_whatever_the_schedule(wish):
    """Several rows, prefix hits, cancelled and preempted ones, some with extras."""
    made = engine_of(LOOKUP)
    every = prompts((3, 9, 16, 30, 41, 24, 7, 50), 2)
    every += [every[3 + i][:20] + prompts((9,), 3 + i)[0] for i in range(5)]
    draw, preempted, cached = np.random.default_rng(7), made.load().preempted, 0
    before = made.load()
    for turn in range(6):
        chosen = draw.permutation(len(every))[: draw.integers(4, 9)]
        told = {f"{turn}-{i}": [] for i in chosen}
        gone = set()
        # Some pages are away, so that rows have to give way now and then.
        held = [made._scheduler._page() for _ in range(int(draw.integers(0, 18)))]
        for i in chosen:
            name = f"{turn}-{i}"
            full = {"logprobs": 2} if draw.random() < 0.2 else {}
            most = int(draw.integers(1, 41))
            made.submit(
                Request(name, every[i], most, sampling=wish, **full), told[name].append
            )
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
            found, wanted = ids_of(pieces), plainly(every[i], wish)
            if f"{turn}-{i}" not in gone:
                assert pieces[-1].finish == "length"
                assert len(found) == pieces[-1].usage.answer
            assert found == wanted[: len(found)]
            logprobs = [one.token for piece in pieces for one in piece.logprobs]
            assert logprobs in ([], found)
            cached += pieces[-1].usage.cached
        assert made.load().pages_used == 0
    rounds, drafted, accepted = since(before, made.load())
    assert cached > 50 and made.load().preempted > preempted
    assert 20 < accepted < drafted - 20


def test_draws_have_the_distribution_of_the_model(monkeypatch):
    """Chi-square over the second and third ids of answers, drawn against drafts."""
    (prompt,) = prompts([7], 4)
    pairs = itertools.product(range(8), repeat=2)
    rows = np.array([prompt + pair for pair in pairs], np.int32)
    logits = np.asarray(models.forward(SPEC, weights(SPEC), rows), np.float64)
    first, second, third = (
        special.softmax(logits[:, at], axis=1).reshape(8, 8, 8) for at in (-3, -2, -1)
    )
    chances = np.einsum("a,ab,abc->bc", first[0, 0], second[:, 0], third)
    likely = [int(np.argmax(chances.sum(axis=1))), int(np.argmax(chances.sum(axis=0)))]
    made, count = engine_of(LOOKUP), 1500
    monkeypatch.setattr(made._drafts, "ids", lambda row, most: likely[:most])
    wishes = [sampling_lib.Sampling(1.0, seed=seed) for seed in range(count)]
    before = made.load()
    told = made.run([Request(f"{w.seed}", prompt, 4, sampling=w) for w in wishes])
    seen = np.zeros((8, 8))
    for pieces in told.values():
        seen[tuple(ids_of(pieces)[1:3])] += 1
    wanted = chances * count
    few = wanted < 5
    cells = [*zip(seen[~few], wanted[~few], strict=True)]
    cells.append((seen[few].sum(), wanted[few].sum()))
    found, expected = np.array(cells).T
    assert len(found) > 20 and stats.chisquare(found, expected).pvalue > 0.01
    rounds, _, accepted = since(before, made.load())
    assert rounds > 1000 and 0.1 * rounds < accepted < 0.9 * rounds


def plain_lookup(ids, most):
    """As `Lookup.after`, from its description."""
    for n in drafts.GRAMS:
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:]:
                grown = list(ids)
                for i in range(most):
                    grown.append(grown[end + i])
                return grown[len(ids) :]
    return []


def test_what_followed_before_is_found():
    draw = np.random.default_rng(0)
    for _ in range(200):
        ids = draw.integers(0, int(draw.integers(1, 9)), 40).tolist()
        lookup, at = drafts.Lookup(), int(draw.integers(1, 20))
        while at <= 40:
            most = int(draw.integers(0, 6))
            assert lookup.after(ids[:at], most) == plain_lookup(ids[:at], most)
            at += int(draw.integers(1, 6))


def test_rows_draft_while_it_pays():
    def row(i, **fields):
        made = scheduler.Row(Request(str(i), (1, 2), 90, **fields), 0, 12)
        made.ids.append(3)
        made.answer = type("Answer", (), {"matcher": None})
        return made

    one, other, full = row(0), row(1), row(2, logprobs=1)
    some = drafts.Drafts(LOOKUP, lambda rows: 0.5, lambda row, most: [7] * most)
    room = {one: 3, other: 1}
    rows, count_b, drafts_bi = some.plan([one, other], lambda row, most: room[row])
    assert rows == [one, other] and count_b.tolist() == [3, 1]
    assert drafts_bi.tolist() == [[7, 7, 7], [7, 0, 0]]
    # 0.8 + 0.64 + 0.512 ids are expected of each, and one more pass is needed for a row
    # that cannot be checked: 1.952 * 2 < (0.5 + 1) * 3.
    assert some.plan([one, other, full], lambda row, most: most) is None
    some.came(one, 3, 3)
    some.came(other, 3, 1)  # one of two that are known of
    assert drafts.track_of(one).right == pytest.approx(0.86)
    assert drafts.track_of(other).right == pytest.approx(0.71)
    # Wrong three times: it pays no more, and again after a while.
    for _ in range(3):
        some.came(other, 3, 0)
    assert not some.hopes([other]) and some.hopes([one, other])
    assert some.plan([other], lambda row, most: most) is None
    plain = 0
    while not some.hopes([other]):
        some.came(other, 0, 0)
        plain += 1
    assert 5 < plain < 50
    # Ids that are not known yet, too many rows, and the last id of an answer.
    one.ahead = 1
    assert some.plan([one], lambda row, most: most) is None
    assert not some.hopes([row(i) for i in range(5)])
    one.ids, one.ahead = [1, 2] + [3] * 89, 0
    assert not some.hopes([one])
    assert (some.rounds, some.drafted, some.accepted) == (5, 15, 4)


def test_where_nothing_is_found_it_is_looked_for_less():
    row = scheduler.Row(Request("r", (1, 2), 90), 0, 12)
    row.ids.append(3)
    row.answer = type("Answer", (), {"matcher": None})
    asked, found = [], []
    some = drafts.Drafts(LOOKUP, lambda rows: 0.5, lambda row, most: found[:])
    for number in range(80):
        if some.hopes([row]):
            asked.append(number)
            found = [7] if number > 50 else []
            now = some.plan([row], lambda row, most: most)
            assert (now is None) == (not found)
        some.came(row, *((1, 1) if found else (0, 0)))
    # One id later, then 2, 4, 8 and 16; at every id once something was there.
    assert asked == [0, 1, 3, 7, 15, 31, 47, *range(63, 80)]


def test_nothing_is_compiled_after_warming():
    made = engine_of(LOOKUP)
    made.warm()
    assert made._device.draft_cost(1) == 0.0  # as it is told
    measured = made._device._draft_costs
    assert list(measured) == [1, 4] and all(0 <= x < 50 for x in measured.values())
    before, mark = made.load().compiled, made.load()
    for name, count in itertools.product("ab", (1, 2, 3, 4, 7)):
        some = prompts((9, 30, 5, 17, 3, 8, 40)[:count], count)
        told = made.run(
            [
                Request(f"{i}", one, 12, salt=name, logprobs=i if name == "b" else None)
                for i, one in enumerate(some)
            ]
        )
        assert [len(ids_of(told[f"{i}"])) for i in range(count)] == [12] * count
    assert made.load().compiled == before and since(mark, made.load())[2] > 10


def test_what_cannot_be_is_refused():
    with pytest.raises(config.InputError, match="drafts='lookups'.*'lookup'"):
        device.Settings(drafts="lookups")
    with pytest.raises(config.InputError, match="no MTP head.*'lookup'"):
        engine_of(dataclasses.replace(LOOKUP, drafts="mtp"))
    with pytest.raises(config.InputError, match="draft_tokens=0"):
        device.Settings(draft_tokens=0)
    with pytest.raises(config.InputError, match="draft_tokens=17: wanted at most 16"):
        device.Settings(draft_tokens=17)
    with pytest.raises(config.InputError, match="draft_cost=-1"):
        device.Settings(draft_cost=-1)
