# SPDX-License-Identifier: Apache-2.0
"""The head: its equations in NumPy loops, learning, streams, debounce, files."""

import json
import math
import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from qwen_jax import config, params
from qwen_jax.serve import (
    guard,
    guard_data,
    guard_head,
    guard_text,
    guard_train,
    guard_trunk,
    guard_verdict,
)

SIZES = guard_trunk.Sizes(vocab=2048, width=32, inner=16)
SETTINGS = guard_train.Settings(steps=240, batch_rows=24)


@pytest.fixture(scope="module")
def model():
    rows = list(guard_data.synthetic(400, seed=0))
    return guard_train.train(rows, SIZES, SETTINGS)


@pytest.fixture(scope="module")
def checker(model):
    return guard_trunk.HeadChecker(model)


# --- equations ---


def random_head(role, seed=0, width=6, inner=5):
    """Weights with nothing at its beginning value."""
    declared = guard_head.declare(width, inner)[role]
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=p.shape).astype(np.float32) for k, p in declared.items()}


def slow_head(p, h):
    """Of one hidden state, in float64: (probabilities of risks, of categories)."""
    z = [sum(h[i] * float(p["pre_df"][i, j]) for i in range(len(h))) for j in range(5)]
    mean = sum(z) / len(z)
    var = sum((x - mean) ** 2 for x in z) / len(z)
    z = [
        (x - mean) / math.sqrt(var + 1e-5) * float(s) + float(b)
        for x, s, b in zip(z, p["scale_f"], p["bias_f"], strict=True)
    ]

    def softmax(w, bias):
        y = [
            sum(z[i] * float(w[i, k]) for i in range(5)) + float(bias[k])
            for k in range(len(bias))
        ]
        top = [math.exp(v - max(y)) for v in y]
        return [v / sum(top) for v in top]

    return (
        softmax(p["risk_fy"], p["risk_bias_y"]),
        softmax(p["category_fy"], p["category_bias_y"]),
    )


@pytest.mark.parametrize("role", guard_head.ROLES)
def test_the_head_and_its_loss_beside_loops(role):
    p = random_head(role)
    rng = np.random.default_rng(1)
    b, t, y = 2, 4, len(guard_head.CATEGORIES[role])
    hidden = rng.normal(size=(b, t, 6)).astype(np.float32)
    risk = rng.integers(0, 3, (b, t))
    category = rng.integers(0, y, (b, t))
    mask = rng.integers(0, 2, (b, t))
    assert {0, 1, 2} <= set(risk.ravel()) and 0 < mask.sum() < mask.size
    logits = jax.jit(guard_head.head)(p, hidden)
    total, count = 0.0, 0
    for i in range(b):
        for j in range(t):
            risks, categories = slow_head(p, hidden[i, j].astype(float))
            np.testing.assert_allclose(
                jax.nn.softmax(logits[0][i, j]), risks, rtol=2e-5
            )
            np.testing.assert_allclose(
                jax.nn.softmax(logits[1][i, j]), categories, rtol=2e-5
            )
            if mask[i, j]:
                count += 1
                total -= math.log(risks[risk[i, j]])
                if guard_head.RISKS[risk[i, j]] != "safe":
                    total -= math.log(categories[category[i, j]])
    made = guard_head.loss(p, hidden, risk, category, mask)
    np.testing.assert_allclose(made, (total, count), rtol=1e-5)


def test_the_two_heads_have_the_published_categories():
    """Order of the published weights; Jailbreak of what is asked alone."""
    query, response = (guard_head.CATEGORIES[r] for r in guard_head.ROLES)
    assert query == (*response, "Jailbreak") and len(response) == 8
    assert response[0] == "Violent" and response[6] == "Non-violent Illegal Acts"
    assert set(query) == set(guard_verdict.NAMES)
    assert guard_head.RISKS == ("safe", "unsafe", "controversial")


def test_a_safe_token_teaches_no_category():
    p = random_head("query")
    hidden = np.ones((1, 2, 6), np.float32)
    risk, mask = np.array([[0, 0]]), np.ones((1, 2))
    grads = jax.grad(lambda p: guard_head.loss(p, hidden, risk, risk, mask)[0])(p)
    assert not np.any(grads["category_fy"]) and np.any(grads["risk_fy"])


def test_the_head_of_a_batch_is_that_of_each_row():
    """As it stands at the end of a decoding step: hidden [b, d] in bfloat16."""
    p = random_head("response")
    hidden_bd = jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)), jnp.bfloat16)
    risk, category = jax.jit(guard_head.head)(p, hidden_bd)
    assert (risk.shape, category.shape) == ((5, 3), (5, 8))
    assert risk.dtype == category.dtype == jnp.float32
    for i in range(5):
        np.testing.assert_allclose(
            guard_head.head(p, hidden_bd[i])[0], risk[i], rtol=1e-5, atol=1e-5
        )


def test_debounce():
    """Flagged at the second of two tokens in a row, at the lesser of their levels."""
    safe, less, more = range(3)
    logits = np.eye(3)[[0, 1, 2]]  # safe, unsafe, controversial
    assert guard_head.severity(logits).tolist() == [safe, more, less]
    assert guard_head.severity(jnp.asarray(logits)).tolist() == [safe, more, less]
    levels = [safe, more, safe, less, more, more, safe]
    flagged, before = [], safe
    for now in levels:
        flagged.append(int(guard_head.debounce(before, now)))
        before = now
    assert flagged == [safe, safe, safe, safe, less, more, safe]
    batch = guard_head.debounce(jnp.array([0, 2, 1]), jnp.array([2, 1, 1]))
    assert batch.tolist() == [0, 1, 1]


# --- trunk ---


def test_the_recurrence_beside_loops():
    p = guard_trunk.init(SIZES, 0)
    p["in_bias_f"] = p["in_bias_f"] + 0.3
    p["state_bias_f"] = p["state_bias_f"] - 0.2
    ids = [9, 77, 300]
    h_bd = jnp.zeros((1, SIZES.width))
    for token in ids:
        h_bd = guard_trunk.step(p, h_bd, jnp.array([token]))
    d = SIZES.width
    w = {k: np.asarray(v, np.float64) for k, v in p.items() if k != "head"}
    h = np.zeros(d)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for token in ids:
        x = w["embed_vd"][token] @ w["in_df"] + w["in_bias_f"]
        s = h @ w["state_df"] + w["state_bias_f"]
        r, u = sigmoid(x[:d] + s[:d]), sigmoid(x[d : 2 * d] + s[d : 2 * d])
        h = (1 - u) * np.tanh(x[2 * d :] + r * s[2 * d :]) + u * h
    np.testing.assert_allclose(h_bd[0], h, rtol=1e-4, atol=1e-5)
    same = guard_trunk.step(p, h_bd, jnp.array([0]))
    np.testing.assert_array_equal(same, h_bd)


def test_pieces_of_words():
    low = guard_text.fold("Ünder-standing 4111 洗钱!").low
    spans, rest = guard_text.pieces(low)
    assert [low[a:b] for a, b in spans] == [
        "under", "-", "standing", "4111", "洗", "钱", "!",
    ]  # fmt: skip
    assert rest == len(low)
    assert guard_text.pieces("one tw", over=False) == ([(0, 3)], 4)
    assert guard_text.pieces("one abcdefgh", over=False)[1] == 12  # a full piece
    one, two = guard_trunk.ids_of("4111 5222", [(0, 4), (5, 9)], 2048)
    assert one == two >= guard_trunk.RESERVED


@hypothesis.given(st.text("ab é1洗\u200b.ABсx", max_size=40), st.data())
def test_pieces_in_parts_as_whole(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    whole = guard_text.fold(text)
    wanted = [whole.low[a:b] for a, b in guard_text.pieces(whole.low)[0]]
    fold, low, made, origin = guard_text.Fold(), "", [], []
    for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
        new = fold.feed(text[a:b])
        low, origin = low + new.low, [*origin, *new.origin]
        spans, rest = guard_text.pieces(low, over=False)
        made += [low[a:b] for a, b in spans]
        low = low[rest:]
    made += [low[a:b] for a, b in guard_text.pieces(low)[0]]
    assert made == wanted and origin == list(whole.origin)
    assert len(whole.plain) == len(whole.low) == len(origin)


# --- labels ---


def test_labels_of_tokens():
    row = guard_data.Row(
        ({"role": "user", "content": "ok bad thing"},),
        "fine x",
        prompt_level="unsafe",
        prompt_categories=("Jailbreak",),
        prompt_start=3,
    )
    made = guard_train.labels([row], 2048)
    n = 1 + 3 + 1 + 2
    assert made.role_bt[0, :n].tolist() == [0, 1, 1, 1, 0, 2, 2]
    assert made.risk_bt[0, :n].tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert made.category_bt[0, :n].tolist() == [0, 0, 8, 8, 0, 0, 0]
    assert made.ids_bt[0, 0] == guard_trunk.MARKS["user"]
    assert made.ids_bt[0, 4] == guard_trunk.MARKS["assistant"]
    assert not made.ids_bt[0, n:].any() and made.cut == 0
    cut = guard_train.labels([row, row], 2048, max_tokens=4)
    assert cut.cut == 2 and cut.ids_bt[0, :5].tolist()[4] == 0


# --- what was learned ---


def f1(pairs):
    pairs = list(pairs)
    tp = sum(a and b for a, b in pairs)
    return 2 * tp / (sum(a for a, _ in pairs) + sum(b for _, b in pairs))


def test_it_tells_texts_of_another_seed_apart(checker):
    """The bar: F1 >= 0.95 on separable data, prompts and streamed answers."""
    rows = list(guard_data.synthetic(180, seed=1))
    prompts, answers, categories = [], [], []
    for row in rows:
        found = checker.prompt(list(row.messages))
        prompts.append((row.prompt_level != "safe", found.level != "safe"))
        if row.prompt_level != "safe":
            categories.append(row.prompt_categories == tuple(found.risks))
        listener = checker.stream(list(row.messages))
        for i in range(0, len(row.response), 5):
            listener.push(row.response[i : i + 5])
        answers.append((row.response_level != "safe", listener.end().level != "safe"))
    assert min(sum(a for a, _ in prompts), sum(a for a, _ in answers)) > 30
    assert f1(prompts) >= 0.95
    assert f1(answers) >= 0.95
    assert np.mean(categories) >= 0.95


def test_nothing_leaks_after_the_debounce_window(checker):
    """A server that sends what is not held sends nothing of the flagged pair and what
    follows it; one that does not hold, at most the two tokens of the pair."""
    policy_guard = guard.Guard([checker])
    rows = [r for r in guard_data.synthetic(120, 2) if r.response_level != "safe"]
    stopped = 0
    for row in rows:
        watch = policy_guard.stream(list(row.messages))
        words = row.response.split(" ")
        sent = told = ""
        for word in words:
            told += word + " "
            verdict = watch.push(word + " ")
            if verdict.action != "allow":
                break
            sent = told[: len(told) - verdict.hold]
        if verdict.action == "allow":
            continue
        stopped += 1
        first = verdict.where[0].start
        assert len(sent) <= first
        # The words that came from the first of the pair on.
        assert len(told[first:].split()) <= 2 + 8  # an address has up to 8 pieces
        assert verdict.where[0].stop <= len(told)
    assert stopped >= 0.9 * len(rows)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(0, 500), st.data())
def test_in_parts_as_whole_bit_for_bit(checker, seed, data):
    (row,) = guard_data.synthetic(1, seed) if seed % 3 else [_second(seed)]
    text, messages = row.response, list(row.messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    listener = checker.stream(messages)
    for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
        listener.push(text[a:b])
    assert listener.end() == checker.response(messages, text)


def _second(seed):
    return list(guard_data.synthetic(3, seed))[1]


def test_context_matters_not_for_what_was_said_before(checker):
    """A prompt that is not safe does not make a refusal unsafe."""
    row = next(
        r for r in guard_data.synthetic(60, 5) if r.refusal and r.prompt_level != "safe"
    )
    assert checker.prompt(list(row.messages)).level != "safe"
    assert checker.response(list(row.messages), row.response).level == "safe"
    assert checker.prompt([]) == guard_verdict.worst([])
    assert checker.response([], "").level == "safe"


@pytest.mark.slow
def test_training_again_gives_the_same_weights():
    rows = list(guard_data.synthetic(20, seed=3))
    settings = guard_train.Settings(steps=3, batch_rows=4)
    one, two = (guard_train.train(rows, SIZES, settings) for _ in range(2))
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert one.trained_on["rows"] == 20 and one.trained_on["steps"] == 3


@pytest.mark.slow
def test_heads_on_the_states_of_another_model(tmp_path):
    """States in which a direction means unsafe and others the category."""
    rng = np.random.default_rng(0)
    shape = (40, 12)
    made = guard_train.Labels(
        np.zeros(shape, np.int32),
        rng.integers(0, 3, shape).astype(np.int32),
        rng.integers(0, 3, shape).astype(np.int32),
        rng.integers(0, 8, shape).astype(np.int32),
    )
    hidden = 0.1 * rng.normal(size=(*shape, 16)).astype(np.float32)
    hidden[..., :3] += np.eye(3)[made.risk_bt]
    hidden[..., 3:11] += np.eye(8)[made.category_bt]
    settings = guard_train.Settings(steps=150, batch_rows=16, lr_peak=3e-2)
    p = guard_train.train_heads(hidden[:30], made, 12, settings)
    for role, number in guard_train.ROLE_IDS.items():
        risk, category = guard_head.head(p[role], hidden[30:])
        mine = made.role_bt[30:] == number
        assert mine.sum() > 20
        assert np.mean((np.argmax(risk, -1) == made.risk_bt[30:])[mine]) > 0.95
        risky = mine & (made.risk_bt[30:] > 0)
        assert np.mean((np.argmax(category, -1) == made.category_bt[30:])[risky]) > 0.9
    guard_head.save(p, str(tmp_path / "h"))
    again = guard_head.load(str(tmp_path / "h"))
    jax.tree.map(np.testing.assert_array_equal, again, p)
    with pytest.raises(config.InputError, match="wanted 'qwen_jax guard head with"):
        guard_trunk.load(str(tmp_path / "h"))
    change_config(tmp_path / "h", width=True)
    with pytest.raises(config.InputError, match="wanted width and inner"):
        guard_head.load(str(tmp_path / "h"))


# --- files ---


def test_a_folder_gives_the_same_scores(model, checker, tmp_path):
    guard_trunk.save(model, str(tmp_path / "head"))
    again = guard_trunk.load(str(tmp_path / "head"))
    assert again.sizes == model.sizes and again.trained_on == model.trained_on
    text = "please " + " ".join(guard_data.placeholders("Violent", "unsafe"))
    found = guard_trunk.HeadChecker(again).prompt(text)
    assert found == checker.prompt(text) and found.risks == {"Violent": "unsafe"}
    held = safetensors.numpy.load_file(tmp_path / "head" / "model.safetensors")
    assert sum(v.size for v in held.values()) == params.count(
        guard_trunk.declare(SIZES)
    )
    made = guard.load(head=str(tmp_path / "head"))
    assert made.check_prompt(text).action == "block"
    assert [c.name for c in made.checkers] == ["rules", "head"]


@pytest.fixture
def folder(tmp_path):
    small = guard_trunk.Sizes(vocab=16, width=4, inner=3)
    model = guard_trunk.Model(small, guard_trunk.init(small, 0))
    guard_trunk.save(model, str(tmp_path / "head"))
    return tmp_path / "head"


OTHER = {"vocab": 16, "width": 5, "inner": 3}


def change_config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    held = safetensors.numpy.load_file(path)
    change(held)
    safetensors.numpy.save_file(held, path)


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda f: (f / "config.json").unlink(), "qwen-jax guard train"),
        (lambda f: change_config(f, version=2), "version 2: wanted"),
        (lambda f: change_config(f, format="x"), "format 'x'"),
        (lambda f: change_config(f, sizes=OTHER), "wanted F32"),
        (lambda f: change_config(f, sizes={"vocab": 7**9}), "vocab=40353607: w"),
        (lambda f: change_config(f, sizes=3), "wanted a group of keys"),
        (lambda f: change_tensors(f, lambda h: h.pop("in_df")), "do not fit"),
        (lambda f: change_tensors(f, lambda h: h.update(x=np.ones(2))), "do not fit"),
        (lambda f: change_tensors(f, lambda h: h["in_df"].fill(np.nan)), "not finite"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04x"), "pickle"),
    ],
)  # fmt: skip
def test_a_folder_that_is_wrong(folder, spoil, told):
    spoil(pathlib.Path(folder))
    with pytest.raises(config.InputError, match=told):
        guard_trunk.load(str(folder))


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr_peak": 0.0}, {"batch_rows": -1}])
def test_settings_that_are_wrong(change):
    with pytest.raises(config.InputError, match=next(iter(change))):
        guard_train.Settings(**change)
