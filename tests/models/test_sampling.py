# SPDX-License-Identifier: Apache-2.0
"""What is drawn is what transformers' logits processors leave, in their shares."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, models
from qwen_jax.models import decode, sampling
from qwen_jax.models import spec as spec_lib

VOCAB = 500


def rows_of(count=1, **settings):
    return sampling.stack([sampling.Sampling(**settings)] * count)


@pytest.fixture(scope="module")
def logits():
    """float32 [6, v]: flat, peaked and in between."""
    draw = np.random.default_rng(0)
    spread = np.array([0.1, 1.0, 2.0, 3.0, 5.0, 10.0])[:, None]
    return (draw.normal(size=(6, VOCAB)) * spread).astype(np.float32)


# --- against transformers ---

SETTINGS = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.9},
    "top_k": {"temperature": 1.0, "top_k": 20},
    "top_k-1": {"temperature": 1.0, "top_k": 1},
    "top_k-beyond": {"temperature": 1.0, "top_k": 10_000},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_p-small": {"temperature": 1.0, "top_p": 0.01},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "qwen": {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    "wide": {"temperature": 1.3, "top_k": 200, "top_p": 0.5, "min_p": 0.001},
    "penalty": {"temperature": 0.8, "repetition_penalty": 1.3, "top_p": 0.9},
    "reward": {"temperature": 0.8, "repetition_penalty": 0.7, "top_k": 7},
}


def theirs(logits_bv, ids_bt, s):
    """Scores of transformers, whose own code puts the processors in order."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    mixin = transformers.generation.GenerationMixin
    wanted = transformers.GenerationConfig(
        do_sample=True,
        temperature=s.get("temperature", 1.0),
        top_k=s.get("top_k", 0),
        top_p=s.get("top_p", 1.0),
        min_p=s.get("min_p"),
        repetition_penalty=s.get("repetition_penalty", 1.0),
    )
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    processors = mixin._get_logits_processor(
        model, wanted, input_ids_seq_length=ids_bt.shape[1], device="cpu"
    )
    return processors(torch.tensor(ids_bt), torch.tensor(logits_bv)).numpy()


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_transformers(logits, name):
    ids_bt = np.random.default_rng(1).integers(0, VOCAB, (6, 40))
    want = theirs(logits, ids_bt, SETTINGS[name])
    rows = rows_of(6, **SETTINGS[name])
    seen_bv = jnp.asarray(sampling.seen_ids(ids_bt, VOCAB))
    got = np.asarray(
        sampling.warped(sampling.penalized(jnp.asarray(logits), seen_bv, rows), rows)
    )
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    kept = np.isfinite(want)
    np.testing.assert_allclose(got[kept], want[kept], rtol=3e-7, atol=0)
    if name not in ("temperature", "hot", "top_k-beyond"):
        assert not kept.all()


def test_rows_have_settings_of_their_own(logits):
    named = list(SETTINGS.values())[:6]
    together = sampling.stack([sampling.Sampling(**s) for s in named])
    got = sampling.warped(jnp.asarray(logits), together)
    for i, s in enumerate(named):
        alone = sampling.warped(jnp.asarray(logits[i : i + 1]), rows_of(1, **s))
        np.testing.assert_array_equal(got[i], alone[0])


# --- draws ---


@jax.jit
def _draw(logits_bv, rows, step_b):
    return sampling.draw(logits_bv, rows, step_b)


def draws(logits, count=4000, **settings):
    """Shares of ids in `count` draws, each of another seed."""
    wishes = [sampling.Sampling(seed=i, **settings) for i in range(count)]
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    ids = _draw(rows, sampling.stack(wishes), jnp.zeros(count, jnp.int32))
    return np.bincount(np.asarray(ids), minlength=len(logits)) / count


CHANCES = np.array([0.1, 0.5, 0.15, 0.25])
NEAR = {"atol": 3 * 0.5 / 4000**0.5}  # three standard errors of 4,000 draws


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"temperature": 1.0}, CHANCES),
        ({"temperature": 0.5}, CHANCES**2 / np.sum(CHANCES**2)),
        ({"temperature": 1.0, "top_k": 2}, np.array([0, 2, 0, 1]) / 3),
        ({"temperature": 1.0, "top_p": 0.7}, np.array([0, 2, 0, 1]) / 3),
        ({"temperature": 1.0, "min_p": 0.25}, np.array([0, 50, 15, 25]) / 90),
        ({"temperature": 1.0, "top_k": 100, "min_p": 0.4}, np.array([0, 2, 0, 1]) / 3),
    ],
)
def test_draws_follow_the_distribution(settings, want):
    got = draws(np.log(CHANCES), **settings)
    np.testing.assert_allclose(got, want, **NEAR)
    assert set(np.flatnonzero(got)) == set(np.flatnonzero(want))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.9, 3), (1.0, 4)]
)
def test_the_nucleus_is_the_smallest_set_that_reaches_its_share(top_p, kept):
    got = draws(np.log(CHANCES), temperature=1.0, top_p=top_p - 1e-4)
    assert set(np.flatnonzero(got)) == set(np.argsort(-CHANCES)[:kept])


def test_steps_of_one_seed_are_drawn_apart():
    count = 4000
    rows = jnp.broadcast_to(jnp.log(jnp.asarray(CHANCES, jnp.float32)), (count, 4))
    same = rows_of(count, temperature=1.0, seed=2**63 + 5)
    ids = np.asarray(_draw(rows, same, jnp.arange(count)))
    np.testing.assert_allclose(np.bincount(ids) / count, CHANCES, **NEAR)
    # Neighbours in time say nothing about each other.
    pairs = np.bincount(4 * ids[:-1] + ids[1:], minlength=16) / (count - 1)
    np.testing.assert_allclose(pairs, np.outer(CHANCES, CHANCES).ravel(), **NEAR)


def test_all_64_bits_of_a_seed_count():
    logits = jnp.zeros((4, VOCAB))
    seeds = [7, 7 + 2**32, 7 + 2**63, 7]
    wishes = [sampling.Sampling(temperature=1.0, seed=seed) for seed in seeds]
    ids = np.asarray(_draw(logits, sampling.stack(wishes), jnp.zeros(4, jnp.int32)))
    assert len(set(ids.tolist())) == 3 and ids[0] == ids[3]


def test_a_draw_does_not_depend_on_the_other_rows(logits):
    """Nor on which of the ways through the vocabulary the batch takes."""
    mixed = [
        *({"temperature": 0.9, "top_k": 8, "top_p": 0.9}, {"temperature": 0.0}),
        *({"temperature": 1.0}, {"temperature": 1.1, "top_k": 300, "min_p": 0.01}),
        *({"temperature": 1.2, "top_p": 0.6}, {"temperature": 1.0, "top_k": 64}),
    ]
    wishes = [sampling.Sampling(seed=9, **s) for s in mixed]
    for step in range(20):
        steps = jnp.full((6,), step)
        together = np.asarray(_draw(logits, sampling.stack(wishes), steps))
        for i, wish in enumerate(wishes):
            alone = _draw(logits[i : i + 1], sampling.stack([wish]), steps[:1])
            assert together[i] == alone[0]
    assert together[1] == logits[1].argmax()


def test_a_caller_that_knows_of_no_cuts_gets_the_same_ids(logits):
    rows = sampling.stack(
        [
            sampling.Sampling(),
            sampling.Sampling(temperature=0.7, seed=3),
            sampling.Sampling(temperature=1.0, seed=2**40),
        ]
    )
    logits_bv = jnp.tile(logits[:1], (3, 1)) * 3
    found = []
    for step in range(30):
        step_b = jnp.full(3, step, jnp.int32)
        ids = sampling.draw(logits_bv, rows, step_b, uncut=True)
        np.testing.assert_array_equal(ids, sampling.draw(logits_bv, rows, step_b))
        assert ids.dtype == jnp.int32
        found.append(np.asarray(ids))
    assert not any(sampling.Sampling(temperature=t).cuts for t in (0.0, 1.0))
    assert not sampling.Sampling(top_k=5).cuts  # greedy
    cuts = {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}
    assert all(sampling.Sampling(temperature=1.0, **one).cuts for one in cuts)
    assert len(set(np.array(found)[:, 0])) == 1 < len(set(np.array(found)[:, 1]))


def test_equal_scores_at_the_edge_of_top_k_are_all_in_the_draw():
    got = draws([2.0, 1.0, 1.0, 1.0, 0.0], temperature=1.0, top_k=2)
    assert set(np.flatnonzero(got)) == {0, 1, 2, 3}


def test_temperature_zero_takes_the_likeliest():
    assert draws([0.0, 1.0, 0.9], count=50)[1] == 1
    assert draws([0.0, 1.0, 0.9], count=50, temperature=1e-45)[1] == 1


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1e9}),
        *({"top_k": -7}, {"top_k": 2.5}, {"top_k": 2**40}, {"top_p": 0.0}),
        *({"top_p": 1.1}, {"min_p": 2.0}, {"min_p": -0.1}, {"seed": 2**70}),
        *({"seed": -1}, {"repetition_penalty": 0.0}, {"temperature": "hot"}),
        *({"repetition_penalty": float("inf")}, {"top_k": True}),
    ],
)
def test_settings_that_cannot_be_are_named(bad):
    with pytest.raises(config.InputError, match=f"^{next(iter(bad))}="):
        sampling.Sampling(**bad)


# --- through a model ---

SPEC = spec_lib.Spec(
    vocab_size=64,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    max_positions=600,
    init_std=0.3,
)
HYBRID = dataclasses.replace(
    SPEC,
    family="qwen3_next",
    mixers=("delta", "attention"),
    delta=spec_lib.Delta(2, 4, 8, 8),
)
PROMPT = [5, 6, 7, 8, 9, 10, 11]


WINDOW = dataclasses.replace(SPEC, window=6, full_layers=1)


@pytest.fixture(
    scope="module",
    params=[
        "attention",
        pytest.param("window apart", marks=pytest.mark.slow),
        "hybrid apart",
    ],
)
def model(request):
    """A spec and its weights, whose layers are stacked or each by itself."""
    spec = {"window": WINDOW, "hybrid": HYBRID}.get(request.param.split()[0], SPEC)
    params = models.init(spec, 0)
    return spec, decode.laid_out(spec, params) if "apart" in request.param else params


def test_a_penalty_counts_prompt_and_answer():
    spec, params = SPEC, models.init(SPEC, 0)
    forward = jax.jit(lambda x: models.forward(spec, params, x))
    ids = list(PROMPT)
    for _ in range(12):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(ids)] = ids
        scores = np.array(forward(row)[0, len(ids) - 1])
        there = sorted(set(ids))
        scores[there] = np.where(
            scores[there] < 0, scores[there] * 1.5, scores[there] / 1.5
        )
        ids.append(int(scores.argmax()))
    wish = sampling.Sampling(repetition_penalty=1.5)
    how = {"max_tokens": 12, "sampling": wish}
    assert decode.generate(spec, params, [PROMPT], **how) == [ids[len(PROMPT) :]]
    assert list(decode.stream(spec, params, PROMPT, **how)) == ids[len(PROMPT) :]
    plain = decode.generate(spec, params, [PROMPT], max_tokens=12)
    assert plain != [ids[len(PROMPT) :]]


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.0, "top_k": 10, "seed": 3}],
    ids=["greedy", "hot"],
)
def test_a_stream_is_what_generate_gives(model, settings):
    spec, params = model
    wish = sampling.Sampling(**settings)
    how = {"max_tokens": 21, "sampling": wish}
    (whole,) = decode.generate(spec, params, [PROMPT], **how)
    assert len(set(whole)) > 5
    assert list(decode.stream(spec, params, PROMPT, **how)) == whole
    end = whole[9]
    cut = whole[: whole.index(end)]
    ended = decode.stream(spec, params, PROMPT, stop_ids=[end], **how)
    assert list(ended) == cut
    assert decode.generate(spec, params, [PROMPT], stop_ids=[end], **how) == [cut]


def test_a_kept_cache_changes_nothing(model):
    """Turns that go on, that go back, that were left in the middle, that are new."""
    spec, params = model
    whole = spec is SPEC  # what attention holds can be cut, a state or a ring cannot
    kept = decode.Kept()

    def turn(prompt, count, take=None):
        how = {"max_tokens": count}
        fresh = list(decode.stream(spec, params, prompt, **how))
        going = decode.stream(spec, params, prompt, kept=kept, **how)
        got = [next(going) for _ in range(take)] if take else list(going)
        going.close()
        assert got == fresh[: len(got)]
        held = [token for token in kept.ids if token is not None]
        assert held == [*prompt, *fresh][: len(held)]
        return got

    first = turn(PROMPT, 12)
    assert kept.reused == 0
    second = [*PROMPT, *first, 1, 2, 3]
    third = [*second, *turn(second, 12), 4]
    assert kept.reused == len(PROMPT) + len(first) - 1
    turn(third, 30, take=5)
    assert kept.reused == len(third) - 2
    turn([*third[:-3], 50, 51], 6)
    assert kept.reused == (len(third) - 3 if whole else 0)
    turn([*third[:-3], 50, 51], 6)  # the same again: its last token alone is computed
    assert kept.reused == (len(third) - 2 if whole else 0)
    turn([40, 41], 4)
    assert kept.reused == 0


def test_a_cache_grows_with_the_conversation(model):
    spec, params = model
    kept = decode.Kept()
    prompt = np.random.default_rng(0).integers(0, 64, 250).tolist()
    got = list(decode.stream(spec, params, prompt, max_tokens=40, kept=kept))
    assert kept.cache.slots == 512
    assert [got] == decode.generate(spec, params, [prompt], max_tokens=40)
    more = [*prompt, *got, 7, 7]
    again = list(decode.stream(spec, params, more, max_tokens=8, kept=kept))
    assert kept.reused == len(prompt) + len(got) - 1
    assert [again] == decode.generate(spec, params, [more], max_tokens=8)


def test_what_a_stream_cannot_take(model):
    spec, params = model
    for prompt, count, told in ((), 3, "empty"), ([64], 3, "id 64"), ([1], 600, "600"):
        with pytest.raises(config.InputError, match=told):
            next(decode.stream(spec, params, prompt, max_tokens=count))
