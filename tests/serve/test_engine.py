# SPDX-License-Identifier: Apache-2.0
"""Answers of the engine are those of decoding by hand, whatever else it does.

The oracle for ids is `decode.generate`, one prompt at a time, which has its own tests
against transformers; for log-probabilities the full forward pass.
"""

import dataclasses
import functools
import threading
import time

import jax
import numpy as np
import pytest

from qwen_jax import config, mesh, models, params
from qwen_jax.data import tokenizer as tokenizer_lib
from qwen_jax.models import decode, decoder
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import device, engine, scheduler
from qwen_jax.serve import request as request_lib

SPEC = spec_lib.Spec(
    vocab_size=300,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    max_positions=512,
    init_std=0.4,  # so that the likeliest id is likely
)
HYBRID = dataclasses.replace(
    SPEC,
    mixers=("delta", "attention"),
    delta=spec_lib.Delta(2, 4, 8, 8),
    output_gate=True,
    norm_offset=True,
    rotary_share=0.5,
)
SLOW = pytest.param(HYBRID, marks=pytest.mark.slow)
Piece, Request = request_lib.Piece, request_lib.Request
SETTINGS = device.Settings(rows=4, page_tokens=8, piece=32, max_tokens=128)


@functools.cache
def weights(spec=SPEC):
    return models.init(spec, 0)


@functools.cache
def shared(spec=SPEC, settings=SETTINGS):
    """An engine that tests use one after another, in their own thread."""
    made = engine.Engine(spec, weights(spec), settings=settings, stop_ids=())
    made.warm()
    return made


def prompts(seed=0, lengths=(5, 40, 17, 90, 33, 1, 64, 65, 8)):
    draw = np.random.default_rng(seed)
    return [tuple(map(int, draw.integers(0, 300, n))) for n in lengths]


@functools.cache
def by_hand(prompt, max_tokens, spec=SPEC, wish=None):
    how = {"sampling": wish, "stop_ids": ()}
    return decode.generate(spec, weights(spec), [prompt], max_tokens=max_tokens, **how)[
        0
    ]


def ids_of(pieces):
    return [token for piece in pieces for token in piece.ids]


def asked(some, max_tokens=12, **fields):
    return [
        Request(id=f"r{i}", prompt=one, max_tokens=max_tokens, **fields)
        for i, one in enumerate(some)
    ]


@pytest.mark.parametrize("spec", [SPEC, HYBRID], ids=["dense", "hybrid"])
def test_answers_are_those_by_hand_and_nothing_is_compiled(spec):
    made = shared(spec)
    before = made.load()
    requests = asked(prompts())
    told = made.run(requests)
    for request in requests:
        pieces = told[request.id]
        assert ids_of(pieces) == by_hand(request.prompt, 12, spec)
        assert [piece.finish for piece in pieces] == [None] * 11 + ["length"]
        usage = pieces[-1].usage
        assert (usage.prompt, usage.answer) == (len(request.prompt), 12)
    after = made.load()
    assert (after.running, after.waiting, after.pages_used) == (0, 0, 0.0)
    assert after.compiled == before.compiled


@pytest.mark.parametrize("spec", [SPEC, SLOW], ids=["dense", "hybrid"])
def test_bursts_are_steps_one_after_the_other(spec):
    """Steps that are given to the device at once, greedy and drawn, with rows that end
    inside of a burst and others that wait."""
    settings = dataclasses.replace(SETTINGS, burst=4)
    made = engine.Engine(spec, weights(spec), settings=settings, stop_ids=())
    compiled = made.warm() and made.load().compiled
    some, told = prompts(1), {}
    wishes = [sampling_lib.Sampling(), sampling_lib.Sampling(temperature=0.8, seed=5)]
    for i, prompt in enumerate(some):
        told[str(i)] = []
        one = Request(str(i), prompt, 9 + i, sampling=wishes[i % 2])
        made.submit(one, lambda piece: told[piece.request].append(piece))
    while made.in_flight:
        made.step()
    for i, prompt in enumerate(some):
        want = by_hand(prompt, 9 + i, spec, wishes[i % 2])
        assert ids_of(told[str(i)]) == want
    assert made.load().compiled == compiled
    # Alone: the prompt with its first id, and then bursts of four as far as they fit.
    before, one = made.steps, Request("alone", some[0], 10, salt="new")
    assert ids_of(made.run([one])["alone"]) == by_hand(some[0], 10, spec)
    assert made.steps - before == 1 + 2 + 1


def test_a_prompt_that_was_there_is_not_computed_again(monkeypatch):
    made = engine.Engine(SPEC, weights(), settings=SETTINGS, stop_ids=())
    seen = []
    prefill = made._device.prefill
    monkeypatch.setattr(
        made._device, "prefill", lambda now: (seen.append(now.count), prefill(now))[1]
    )
    prompt = prompts()[3]  # 90 ids: eleven pages of 8, and two ids
    first = made.run([Request(id="a", prompt=prompt, max_tokens=9)])["a"]
    assert sum(seen) == 90 and first[-1].usage.cached == 0
    seen.clear()
    again = made.run([Request(id="b", prompt=prompt, max_tokens=9)])["b"]
    assert seen == [2] and again[-1].usage.cached == 88
    assert ids_of(again) == ids_of(first) == by_hand(prompt, 9)
    # The answer is in pages, too: the next turn goes on from there.
    turn = (*prompt, *ids_of(first)[:6], 7, 8, 9)
    seen.clear()
    last = made.run([Request(id="c", prompt=turn, max_tokens=4)])["c"]
    assert seen == [3] and ids_of(last) == by_hand(turn, 4)
    # Another salt shares nothing.
    other = made.run([Request(id="d", prompt=prompt, max_tokens=4, salt="x")])["d"]
    assert other[-1].usage.cached == 0
    assert ids_of(other) == ids_of(first)[:4]


def test_hybrid_models_go_on_where_a_state_was_kept():
    made = engine.Engine(HYBRID, weights(HYBRID), settings=SETTINGS, stop_ids=())
    made.warm()
    compiled = made.load().compiled
    (prompt, *ends) = prompts(13, (45, 9, 12, 17))

    def ask(name, prompt):
        told = made.run([Request(name, prompt, 8)])[name]
        assert ids_of(told) == by_hand(prompt, 8, HYBRID)
        return told[-1].usage.cached

    assert ask("a", prompt) == 0
    assert ask("b", prompt) == 40  # five whole pages of 8
    assert ask("c", (*prompt, *ends[0])) == 40
    # Another end behind 28 ids: pages are there and no state. One is kept on the way.
    assert ask("d", (*prompt[:28], *ends[1])) == 0
    assert ask("e", (*prompt[:28], *ends[2])) == 24
    # Beside a row with a grammar, whose ids must be known before the next step.
    told, pieces = [], []
    made.submit(Request("f", ends[0], 60, grammar=Evens(60)), told.append)
    for _ in range(4):
        made.step()
    made.submit(Request("g", (*prompt, *ends[2]), 8), pieces.append)
    while made.in_flight:
        made.step()
    assert ids_of(pieces) == by_hand((*prompt, *ends[2]), 8, HYBRID)
    assert pieces[-1].usage.cached == 40 and len(ids_of(told)) == 60
    assert made.load().compiled == compiled


def test_answers_do_not_depend_on_the_schedule():
    """Fifty schedules drawn at random: alone, many at once, in pieces of either size,
    found in the cache or not, cancelled beside, preempted for want of pages."""
    settings = dataclasses.replace(SETTINGS, rows=16, pages=32)
    made = shared(SPEC, settings)
    draw = np.random.default_rng(3)
    every = prompts(1, draw.integers(1, [8] * 16 + [60] * 8))
    before, cached, largest = made.load().preempted, 0, 0
    for turn in range(50):
        made._scheduler.piece = int(draw.choice([8, 32]))
        chosen = draw.choice(24, draw.integers(1, 20), replace=False)
        counts = draw.integers(1, 25, len(chosen))
        if turn == 0:  # sixteen at once
            chosen, counts = np.argsort([len(one) for one in every])[:16], [24] * 16
        requests = [
            Request(f"{turn}-{i}", every[i], int(count), salt="ab"[i % 2])
            for i, count in zip(chosen, counts, strict=True)
        ]
        told: dict[str, list[Piece]] = {request.id: [] for request in requests}
        gone = set()
        for request in requests:
            made.submit(request, told[request.id].append)
            for _ in range(draw.integers(0, 4) if turn else 0):
                made.step()
            largest = max(largest, made.load().running)
            if turn and draw.random() < 0.1:
                made.cancel(request.id)
                gone.add(request.id)
        while made.in_flight:
            made.step()
            largest = max(largest, made.load().running)
        for request in requests:
            found = ids_of(told[request.id])
            wanted = by_hand(request.prompt, 24)[: request.max_tokens]
            if request.id in gone:
                wanted = wanted[: len(found)]
            assert found == wanted
            cached += told[request.id][-1].usage.cached
        assert made.load().pages_used == 0
    assert made.load().preempted > before + 10
    assert cached > 500 and largest == 16


def test_draws_are_by_seed_and_number_whatever_else_runs():
    wish = sampling_lib.Sampling(temperature=0.9, top_p=0.9, top_k=40, seed=11)
    made = shared()
    some = prompts(5)[:5]
    alone = [by_hand(one, 12, wish=wish) for one in some]
    told = made.run(asked(some, sampling=wish))
    assert [ids_of(told[f"r{i}"]) for i in range(5)] == alone
    # Several answers to one prompt: seeds one after another.
    several = made.run([Request("n", some[1], 12, sampling=wish, n=3)])["n"]
    for index in range(3):
        mine = ids_of(piece for piece in several if piece.index == index)
        seeded = dataclasses.replace(wish, seed=11 + index)
        assert mine == by_hand(some[1], 12, wish=seeded)


@functools.cache
def forward():
    return jax.jit(functools.partial(models.forward, SPEC))


def reference(prompt, count, change):
    """Greedy ids of the full forward pass, its scores changed by hand each time."""
    ids, told = list(prompt), []
    for _ in range(count):
        tokens, real = np.zeros((2, 1, 64), np.int32)
        tokens[0, : len(ids)], real[0, : len(ids)] = ids, 1
        logits = forward()(weights(), tokens, segments=real)
        scores = np.asarray(logits[0, len(ids) - 1]).astype(np.float64)
        top = scores - scores.max()
        told.append(top - np.log(np.sum(np.exp(top))))
        ids.append(int(np.argmax(change(scores.copy(), ids[len(prompt) :], prompt))))
    return ids[len(prompt) :], told


def penalties(scores, answer, prompt):
    for token in {*answer, *prompt}:
        scores[token] = (
            scores[token] / 1.3 if scores[token] > 0 else scores[token] * 1.3
        )
    for token in set(answer):
        scores[token] -= 0.7 + 0.4 * answer.count(token)
    return scores


def biased(scores, answer, prompt):
    scores[:150] -= 100
    scores[7] += 3
    return scores


def test_penalties_biases_and_logprobs_are_those_of_the_formulas():
    made, prompt = shared(), prompts(8)[2]
    wish = sampling_lib.Sampling(
        repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4
    )
    bias = dict.fromkeys(range(150), -100.0)
    bias[7] += 3.0
    told = made.run(
        [
            Request("penalties", prompt, 10, sampling=wish, logprobs=3),
            Request("bias", prompt, 10, logit_bias=bias, logprobs=0),
            Request("plain", prompt, 10),
        ]
    )
    wanted, probs = reference(prompt, 10, penalties)
    assert ids_of(told["penalties"]) == wanted
    assert ids_of(told["bias"]) == reference(prompt, 10, biased)[0]
    assert ids_of(told["plain"]) == by_hand(prompt, 10)
    for piece, one, token in zip(told["penalties"], probs, wanted, strict=True):
        (found,) = piece.logprobs
        assert found.token == token
        np.testing.assert_allclose(found.logprob, one[token], atol=1e-4)
        order = np.argsort(-one, kind="stable")[:3]
        assert [name for name, _ in found.top] == order.tolist()
        np.testing.assert_allclose([x for _, x in found.top], one[order], atol=1e-4)
    assert told["bias"][0].logprobs[0].top == ()
    assert told["plain"][0].logprobs == ()


def test_logprobs_of_a_prompt():
    made, prompt = shared(), prompts(9)[1]  # 40 ids: two pieces
    told = made.run([Request("p", prompt, 2, prompt_logprobs=2)])["p"]
    logits = models.forward(SPEC, weights(), np.array([prompt], np.int32))[0]
    wanted = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    found = told[0].prompt_logprobs
    assert [one.token for one in found] == list(prompt[1:])
    np.testing.assert_allclose(
        [one.logprob for one in found],
        wanted[np.arange(39), prompt[1:]],
        atol=1e-4,
    )
    assert [one.top[0][0] for one in found] == wanted[:39].argmax(-1).tolist()
    assert told[1].prompt_logprobs is None


class Evens:
    """A grammar: even ids only, four of them or as many as are asked for."""

    def __init__(self, most=4):
        self.most = most

    def start(self):
        return EvenMatcher(self.most)


class EvenMatcher:
    def __init__(self, most=4):
        self.count, self.most = 0, most

    def allowed(self):
        return np.full(10, 0x55555555, np.uint32)

    def accept(self, token):
        assert token % 2 == 0
        self.count += 1

    def done(self):
        return self.count == self.most


def test_a_grammar_masks_its_own_row():
    made, some = shared(), prompts(4)[:3]
    told = made.run(
        [
            Request("even", some[0], 12, grammar=Evens()),
            Request("free", some[1], 12),
            Request("sampled", some[2], 12, sampling=sampling_lib.Sampling(1.0)),
        ]
    )

    def even(scores, *_):
        scores[1::2] = -np.inf
        return scores

    assert ids_of(told["even"]) == reference(some[0], 4, even)[0]
    assert told["even"][-1].finish == "stop"
    assert ids_of(told["free"]) == by_hand(some[1], 12)


@pytest.fixture(scope="module")
def vocabulary():
    text = [
        " ".join(f"word{i} größer 日本語 {i * 7}" for i in range(k)) for k in range(40)
    ]
    return tokenizer_lib.train(text, 300)


def test_texts_stop_where_they_should(vocabulary):
    made = engine.Engine(SPEC, weights(), vocabulary, settings=SETTINGS, stop_ids=())
    prompt = tuple(vocabulary.encode("word3 größer 日本語"))
    whole = made.run([Request("w", prompt, 60)])["w"]
    text = "".join(piece.text for piece in whole)
    assert text == vocabulary.decode(by_hand(prompt, 60))
    # A stop text from the middle, over the borders of ids.
    stop = next(
        text[i : i + 3] for i in range(5, len(text)) if text.find(text[i : i + 3]) == i
    )
    told = made.run([Request("s", prompt, 60, stop=("never there", stop))])["s"]
    assert "".join(piece.text for piece in told) == text[: text.find(stop)]
    assert (told[-1].finish, told[-1].stopped_by) == ("stop", stop)
    assert told[-1].usage.answer == len(ids_of(told)) < 60
    # An id that ends the answer is counted and not told.
    end = ids_of(whole)[7]
    first = ids_of(whole).index(end)
    told = made.run([Request("i", prompt, 60, stop_ids=(end,))])["i"]
    assert (told[-1].finish, told[-1].stopped_by) == ("stop", end)
    assert ids_of(told) == ids_of(whole)[: first + 1]
    texts = "".join(piece.text for piece in told)
    assert texts == vocabulary.decode(ids_of(told)[:-1])
    # Weights that are laid out for decoding already are taken as they are.
    laid = decode.laid_out(SPEC, weights())
    made = engine.Engine(SPEC, laid, vocabulary, settings=SETTINGS, stop_ids=())
    assert made.generate(["word3 größer 日本語"], max_tokens=60) == [text]


def test_cancelled_in_one_step_and_pages_are_back():
    made, pieces = shared(), []
    settings_before = made.load().pages_used
    for name in ("a", "b", "c", "d", "e"):
        made.submit(Request(name, prompts(6)[3], 30), pieces.append)
    for _ in range(12):
        made.step()
    assert made.load().pages_used > settings_before
    for name in ("a", "b", "c", "d", "e", "unknown"):
        made.cancel(name)
    made.step()
    load = made.load()
    assert (load.running, load.waiting, load.pages_used) == (0, 0, settings_before)
    ends = {piece.request: piece.finish for piece in pieces if piece.finish}
    assert ends == dict.fromkeys("abcde", "cancelled")
    again = made.run([Request("a", prompts(6)[3], 30)])["a"]
    assert ids_of(again) == by_hand(prompts(6)[3], 30)


def test_faults_end_what_they_concern(monkeypatch, caplog):
    made, some = shared(), prompts(7)[:3]

    class Broken(Evens):
        def start(self):
            raise OSError("/secret/path")

    class Late(EvenMatcher):
        def accept(self, token):
            raise KeyError("/secret/path")

    class Later(Evens):
        def start(self):
            return Late()

    told = made.run(
        [
            Request("broken", some[0], 5, grammar=Broken()),
            Request("later", some[1], 5, grammar=Later()),
            Request("fine", some[2], 5),
        ]
    )
    assert told["broken"][-1].finish == told["later"][-1].finish == "error"
    assert "secret" not in told["broken"][-1].error + told["later"][-1].error
    assert ids_of(told["fine"]) == by_hand(some[2], 5)

    def bad(piece):
        raise RuntimeError("a caller's own")

    pieces = []
    made.submit(Request("bad", some[0], 50), bad)
    made.submit(Request("good", some[1], 8), pieces.append)
    while made.in_flight:
        made.step()
    assert ids_of(pieces) == by_hand(some[1], 8)
    # The device fails once: all in flight are told, and the next are answered.
    real = made._device.decode
    monkeypatch.setattr(made._device, "decode", lambda rows: 1 / 0)
    told = made.run(asked(some, 5))
    assert {told[f"r{i}"][-1].finish for i in range(3)} == {"error"}
    monkeypatch.setattr(made._device, "decode", real)
    told = made.run(asked(some, 5))
    assert [ids_of(told[f"r{i}"]) for i in range(3)] == [by_hand(x, 5) for x in some]
    assert made.load().pages_used == 0


def test_a_device_that_is_gone_ends_all_and_takes_no_more(monkeypatch):
    made = engine.Engine(SPEC, weights(), settings=SETTINGS, stop_ids=())
    monkeypatch.setattr(made._device, "prefill", lambda now: 1 / 0)
    monkeypatch.setattr(made._device, "empty", lambda: 1 / 0)
    told = made.run(asked(prompts()[:2], 5))
    assert {told[f"r{i}"][-1].finish for i in range(2)} == {"error"}
    with pytest.raises(engine.Closed):
        made.submit(Request("late", (1,), 1), print)


def test_the_thread_serves_many_callers_and_closes():
    made = engine.Engine(
        SPEC,
        weights(),
        settings=dataclasses.replace(SETTINGS, max_waiting=3),
        stop_ids=(),
    )
    made.start()
    some = prompts(10)
    found, refused = {}, []

    def caller(i):
        over, pieces = threading.Event(), []

        def tell(piece):
            pieces.append(piece)
            if piece.finish:
                over.set()

        while True:
            try:
                made.submit(Request(f"c{i}", some[i], 20), tell)
            except engine.Overloaded as error:
                refused.append(error.retry_after_s)
                time.sleep(0.01)
                continue
            over.wait(60)
            found[i] = ids_of(pieces)
            return

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(len(some))]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert [found[i] for i in range(len(some))] == [by_hand(one, 20) for one in some]
    pieces = []
    made.submit(Request("last", some[0], 100), pieces.append)
    made.close(timeout_s=0.0)
    assert pieces[-1].finish in ("cancelled", "length")
    with pytest.raises(engine.Closed):
        made.submit(Request("late", some[0], 1), pieces.append)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": (1,) * 120}, "pass the 128"),
        ({"prompt": (1, 300)}, "id 300"),
        ({"prompt": (-1, 3)}, "id -1"),
        ({"logit_bias": {5000: 1.0}}, "logit_bias holds id 5000"),
        ({"stop": ("x",)}, "tokenizer"),
    ],
)
def test_what_can_never_be_answered_is_refused(change, says):
    fields = {"id": "x", "prompt": (1, 2), "max_tokens": 20} | change
    with pytest.raises(config.InputError, match=says):
        shared().submit(Request(**fields), print)
    assert shared().load().waiting == 0


def test_vectors_of_documents():
    made, some = shared(), prompts(2, (5, 33, 40))
    found = made.embed(some)
    for row, one in zip(found, some, strict=True):
        x = np.asarray(decoder.hidden(SPEC, weights(), np.array([one]))[0][0, -1])
        np.testing.assert_allclose(row, x / np.linalg.norm(x), atol=1e-5)
    with pytest.raises(config.InputError, match="a document of 0 tokens"):
        made.embed([()])
    bare = dataclasses.replace(SPEC, head="none", tie_embedding=True)
    only = engine.Engine(bare, weights(bare), settings=SETTINGS)
    assert only.warm() == 3  # rows of 32, 64 and 128 tokens
    assert only.embed(some).shape == (3, 32) and only.warm() == 0
    with pytest.raises(config.InputError, match="no head"):
        only.submit(Request("x", (1,), 1), print)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(config.InputError, match="multiple of page_tokens"):
        device.Settings(piece=20, page_tokens=8)
    with pytest.raises(config.InputError, match="growth=1: wanted 2"):
        device.Settings(growth=1)
    with pytest.raises(config.InputError, match="burst=-1: wanted 0"):
        device.Settings(burst=-1)
    with pytest.raises(config.InputError, match="holds no page"):
        engine.Engine(SPEC, weights(), settings=device.Settings(memory_bytes=100))
    with pytest.raises(config.InputError, match="512 positions"):
        engine.Engine(SPEC, weights(), settings=device.Settings(max_tokens=600))
    with pytest.raises(config.InputError, match="max_tokens=0"):
        Request("x", (1,), 0)


@pytest.mark.slow
def test_on_a_mesh():
    rules = mesh.Rules(batch=None)
    device_mesh = mesh.make(mesh.MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    layout = params.shardings(decoder.decoder_params(SPEC), device_mesh, rules)
    with jax.set_mesh(device_mesh):
        tree = jax.tree.map(jax.device_put, weights(), layout)
        settings = dataclasses.replace(SETTINGS, rows=2)
        made = engine.Engine(SPEC, tree, settings=settings, rules=rules, stop_ids=())
    some = prompts(12)[:3]
    told = made.run(asked(some, 8))
    assert [ids_of(told[f"r{i}"]) for i in range(3)] == [by_hand(x, 8) for x in some]


def test_rows_are_admitted_in_the_order_they_came():
    plan = scheduler.Scheduler(rows=2, pages=9, page_tokens=4, piece=4, sharing=True)
    rows = [
        scheduler.Row(Request(str(i), (1, 2, 3, 4, 5, i), 4), 0, 8) for i in range(3)
    ]
    for row in rows:
        plan.add(row)
    now = plan.plan()
    assert (now.prefill.row, now.prefill.start, now.prefill.count) == (rows[0], 0, 4)
    assert plan.running == rows[:2] and list(plan.waiting) == rows[2:]
    rows[0].length = 4
    plan.share(rows[0])
    assert rows[0].nodes[0].page == rows[0].table[0] and len(rows[0].pages) == 1
    assert plan.plan().prefill.count == 2
    plan.end(rows[0])
    assert plan.plan().prefill.row is rows[1]
    assert plan.running == [rows[1], rows[2]]
    assert rows[2].cached == 4 and rows[1].cached == 0
