# SPDX-License-Identifier: Apache-2.0
"""`bench pages`: traces worth what they should, memory counted right, equal twice."""

import json

import pytest

from qwen_jax import cli, config
from qwen_jax.bench import pages as bench
from qwen_jax.serve import pages as pages_lib

SMALL = ["--requests=250", "--units=512", "--seeds=2"]


@pytest.mark.slow
def test_a_small_run_is_the_same_twice(tmp_path, capsys):
    records = []
    for number in range(2):
        out = tmp_path / f"{number}.json"
        assert cli.main(["bench", "pages", *SMALL, f"--json={out}"]) == 0
        records.append(json.loads(out.read_text()))
    text = capsys.readouterr().out
    rows = records[0]["rows"]
    assert rows == records[1]["rows"] and len(rows) == 4 * 6
    for row in rows:
        assert f"\n{row['way']}" in text
        if "error" in row:
            assert row["way"] == "pages of 1" and row["trace"] in ("states", "sessions")
            continue
        assert row["left_over_units"] == 0  # all that was given came back
        total = row["finished"] * 250 + row["refused"] + row["cut"]
        assert total == pytest.approx(250)
        assert 0 <= row["internal"] < 1 and 0 < row["used"] <= 1
        assert 8 <= row["log_bytes_an_operation"] < 12
        assert row["again"] < row["again_in_order"]
    by = {(row["trace"], row["way"]): row for row in rows}
    for trace in ("lognormal", "shifting"):
        # One small page wastes part of a page at most, and never fails for its place.
        one, large = by[trace, "pages of 1"], by[trace, "pages of 16"]
        assert one["external"] == large["external"] == 0
        assert one["internal"] < by[trace, "morph"]["internal"] < large["internal"]
        assert one["pages_a_request"] > 3 * by[trace, "morph"]["pages_a_request"]
    assert by["sessions", "eager"]["morphs"] > 0 == by["sessions", "static"]["morphs"]
    assert by["sessions", "fixed"]["emptied"] == 0 < by["sessions", "static"]["emptied"]


def test_traces_ask_for_the_load_and_differ_by_seed_and_name():
    args = bench.parse(["--requests=2000", "--load=1.5"])
    seen = []
    for name in bench.TRACES:
        trace = bench.make(name, args, 0)
        worth = sum(asked.token_steps(16) for asked in trace)
        memory = 4096 * 16
        assert worth / (trace[-1].step * memory) == pytest.approx(1.5, rel=0.1)
        assert bench.make(name, args, 0) == trace != bench.make(name, args, 1)
        assert [asked.step for asked in trace] == sorted(asked.step for asked in trace)
        seen.append(trace)
    lengths = sorted(asked.prompt for asked in seen[0])
    assert 200 < lengths[1000] < 320 and lengths[-20] > 8 * lengths[1000]
    halves = [sum(a.prompt > 700 for a in seen[1][i : i + 333]) for i in (0, 333)]
    assert halves[0] > 2 * halves[1]  # long documents, then short chats
    assert {asked.state_units for asked in seen[3]} == {0, 16}
    assert 0.02 < sum(asked.rest > 0 for asked in seen[3]) / 2000 < 0.08


def run(trace, way, units=64, **flags_):
    args = bench.parse([f"--{k}={v}" for k, v in flags_.items()])
    way = next(w for w in bench.WAYS if w.name == way)
    arena = pages_lib.Pages(units, way.settings(args.slab_units, 6))
    made = bench.Simulation(arena, way, args)
    made.run(trace)
    return made


def test_memory_over_time_by_hand():
    """A prompt of 20 and an answer of 30 tokens in pages of 16: 2 pages for 12 steps
    (32 tokens), 3 for 16 more, 4 for the last 2; then 10 steps of rest."""
    made = run([bench.Asked(5.0, 20, 30, rest=10)], "pages of 1")
    assert made.finished == 1 and made.held_pages == 4
    assert made.area_units == 2 * 12 + 3 * 16 + 4 * 2 + 4 * 10
    assert made.area_payload == sum(20 + k + 0.5 for k in range(30)) + 50 * 10
    assert made.served == made.area_payload and made.payload == 0 == made.running


def test_classes_take_the_largest_pages_that_fit_and_grow_by_a_quarter():
    # 317 + 1 tokens are 20 units: 16 and 4. Full at 320, it takes a quarter: 4 units.
    made = run([bench.Asked(0.0, 317, 4)], "morph", units=256)
    assert made.held_pages == 3
    assert made.area_units == 20 * 3 + 24 * 1


def test_who_finds_no_room_is_refused_or_cut():
    first, second = bench.Asked(0.0, 16 * 40 - 1, 400), bench.Asked(1.0, 600, 1)
    made = run([first, second], "pages of 1")
    # Of 64 units the second asks 38 where 24 are left; the first ends at 1,024 tokens.
    assert (made.refused, made.cut, made.finished, made.failed) == (1, 1, 0, 2)
    assert made.external == 0 and made.arena.used == 0
    assert made.step == 1024 - 639 and made.payload == 0


def test_failures_with_enough_units_free_are_external():
    spread = [bench.Asked(0.0, 10, 50) for _ in range(60)]
    made = run([*spread, bench.Asked(1.0, 255, 1)], "static", units=128, slab_units=64)
    assert made.refused == 0
    made = run([*spread, bench.Asked(1.0, 255, 1)], "static", units=64, slab_units=64)
    assert made.refused == 1 and made.external == 0
    spread = [bench.Asked(0.0, 10, 5 if i % 8 else 50) for i in range(64)]
    made = run([*spread, bench.Asked(20.0, 255, 1)], "static", units=64, slab_units=64)
    assert made.refused == made.failed == made.external == 1
    smaller = [*spread, bench.Asked(20.0, 255, 1)]
    args = bench.parse(["--smaller"])
    arena = pages_lib.Pages(64, pages_lib.Settings(turnover="empty"))
    made = bench.Simulation(arena, bench.WAYS[2], args)
    made.run(smaller)
    assert made.refused == 0 and made.finished == 65


def test_a_state_is_one_page_in_a_row():
    state = [bench.Asked(0.0, 10, 1, state_units=2)]
    assert run(state, "morph", units=256).area_units == 2 + 1
    assert run(state, "pages of 16", units=256).area_units == 16 + 16


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--load=0"], "--load is 0.0, wanted above 0"),
        (["--seeds=0"], "--seeds is 0, wanted at least 1"),
        (["--traces=lognormul"], "did you mean 'lognormal'"),
        (["--units=1000"], "units=1000: wanted a multiple of slab_units=64"),
        (["--slab_units=8"], "--slab_units is 8, wanted at least 16"),
        (["--slab_units=48"], "slab_units=48: wanted a power of two"),
        (["--request=3"], "did you mean '--requests'"),
    ],
)
def test_flags_that_do_not_fit_are_told(words, told):
    with pytest.raises(config.InputError, match=told):
        bench.parse(words)
