# SPDX-License-Identifier: Apache-2.0
"""The order of documents: epochs, lanes, shares, stages."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import config
from qwen_jax.data import mixture


def made(num_records=(30,), weights=None, num_bytes=None, **fields):
    names = [f"s{i}" for i in range(len(num_records))]
    return mixture.make(
        names,
        weights or [1.0] * len(names),
        num_records,
        num_bytes or num_records,
        **fields,
    )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 60),
    st.integers(1, 9),
    st.integers(0, 2**31 - 1),
    st.sampled_from([0, 1 << 16]),
)
def test_lanes_share_every_epoch(num_records, lanes, seed, small):
    with pytest.MonkeyPatch.context() as patch:  # both ways of shuffling
        patch.setattr(mixture, "_SMALL", small)
        check_lanes(num_records, lanes, seed)


def check_lanes(num_records, lanes, seed):
    one = made((num_records,), seed=seed)
    draws = [one.lane(0, lane, lanes, [0]) for lane in range(lanes)]
    for epoch in range(2):
        places = range(epoch * num_records, (epoch + 1) * num_records)
        records = [draws[p % lanes][p // lanes][1] for p in places]
        assert sorted(records) == list(range(num_records))


def test_order_depends_on_seed_and_name_and_differs_between_epochs():
    def order(one, first=0):
        lane = one.lane(0, 0, 1, [0] * len(one.names))
        return [lane[i] for i in range(first, first + 30)]

    assert order(made(seed=1)) == order(made(seed=1))
    assert order(made(seed=1)) != order(made(seed=2))
    assert order(made(seed=1)) != order(made(seed=1), first=30)
    one, two = (made((30, 30), w, seed=1) for w in ([1.0, 0.0], [0.0, 1.0]))
    assert [r for _, r in order(one)] != [r for _, r in order(two)]


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (5, 0, 1)])
def test_shares_are_of_documents_or_of_bytes(weights):
    def shares(**fields):
        one = made((100, 200, 300), list(weights), (1000, 20_000, 3000), **fields)
        lane = one.lane(0, 2, 4, [0, 0, 0])
        counts = collections.Counter(lane[i][0] for i in range(6000))
        return [counts[i] / 6000 for i in range(3)]

    wanted = [w / sum(weights) for w in weights]
    assert shares(weight_by="documents") == pytest.approx(wanted, abs=0.01)
    # Mean documents of 10, 100 and 10 bytes: the share of the text is draws * mean.
    text = [s * mean for s, mean in zip(shares(), (10, 100, 10), strict=True)]
    assert [t / sum(text) for t in text] == pytest.approx(wanted, abs=0.02)


def test_a_stage_goes_on_where_each_source_stood():
    stages = ((10, {"s0": 1.0}), (20, {"s0": 1.0, "s1": 1.0}), (30, {"s1": 1.0}))
    one = made((40, 40), stages=stages)
    assert [one.stage_at(s) for s in (0, 9, 10, 19, 20, 29, 1000)] == [
        *(0, 0, 1, 1, 2, 2, 2),
    ]
    first = [one.lane(0, 0, 1, [0, 0])[i] for i in range(12)]
    second = [one.lane(1, 0, 1, [12, 0])[i] for i in range(56)]
    seen = [record for source, record in first + second if source == 0]
    assert sorted(seen) == list(range(40))


def test_the_stages_of_the_batches_before_a_step():
    one, two, both = {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 2.0}
    stages = ((4, one | {"b": 0.0}), (9, two), (12, both))
    for step, wanted in {
        0: (),
        1: ((1, one),),
        4: ((4, one),),
        5: ((4, one), (5, two)),
        9: ((4, one), (9, two)),
        10: ((4, one), (9, two), (10, both)),
        99: ((4, one), (9, two), (99, both)),  # the last holds on
    }.items():
        assert mixture.begun(stages, step) == wanted
    assert mixture.begun(((0, both),), 7) == ((7, both),)


def test_mistakes():
    with pytest.raises(config.InputError, match="no source is named 's9'"):
        made((3,), stages=((5, {"s9": 1.0}),))
    with pytest.raises(config.InputError, match=r"\[5, 5\]: wanted rising"):
        made((3,), stages=((5, {"s0": 1.0}), (5, {"s0": 1.0})))
    for weights in ([0.0], [-1.0], [float("nan")]):
        with pytest.raises(config.InputError, match="wanted numbers of 0 or more"):
            made((3,), weights)
    with pytest.raises(config.InputError, match="weight_by='tokens'"):
        made((3,), weight_by="tokens")
