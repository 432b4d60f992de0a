# SPDX-License-Identifier: Apache-2.0
"""The loader: one global order for any processes and workers, exact state, counters."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import config
from qwen_jax.data import corpus, loader, packing, source, tokenizer
from tests.oracles import packing as oracle

SEQ = 32


def texts_of(name, count, scale=1):
    """Documents that all differ; their only letter is the name's."""
    letter = name[0]
    return [
        f"{letter * 3} {i}: "
        + " ".join(f"{letter}{(i * 7 + j) % 97}" for j in range(i % 40 * scale))
        for i in range(count)
    ]


TEXTS = {"one": texts_of("one", 960), "two": texts_of("two", 90, scale=2)}


def letters(batch, vocabulary):
    """Which sources the rows of a batch are from, by their letters."""
    return set(vocabulary.decode(batch["targets_bt"].ravel(), True)) & set("ot")


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train([*TEXTS["one"], *TEXTS["two"]], 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources as jsonl shards."""
    path = tmp_path_factory.mktemp("corpus")
    for name, texts in TEXTS.items():
        (path / name).mkdir()
        for shard in range(3):
            lines = [json.dumps({"text": text}) for text in texts[shard::3]]
            (path / name / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return path


def data_config(folder, **fields):
    defaults = {
        "sources": (
            source.SourceConfig(path=str(folder / "one")),
            source.SourceConfig(path=str(folder / "two")),
        ),
        "seq_tokens": SEQ,
        "holdout_share": 0.1,
        "window_docs": 24,
        "cache_dir": str(folder / "cache"),
        "streams": 8,
    }
    return source.DataConfig(**{**defaults, **fields})


def make(data, vocabulary, batch_rows=8, seed=5, **fields):
    return loader.Loader(data, vocabulary, batch_rows=batch_rows, seed=seed, **fields)


def take(one, count):
    return [next(one) for _ in range(count)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() == packing.DTYPES.keys()
        assert {type(array) for array in x.values()} == {np.ndarray}
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def documents_in(batches, vocabulary):
    """The texts of all whole documents, from the pairs of the rows."""
    pieces = [p for batch in batches for p in oracle.pairs_of_rows(batch)]
    end = vocabulary.eos_id
    heads = [p for p in pieces if p[0][0] == end and p[-1][1] == end]
    return [vocabulary.decode([pair[1] for pair in p[:-1]]) for p in heads]


def test_an_epoch_has_every_document_once_and_no_held_out_one(folder, vocabulary):
    # 960 documents in 8 lanes: a window of 120 draws is a lane's share of an epoch.
    data = data_config(folder, window_docs=120, seq_tokens=256)
    data = dataclasses.replace(data, sources=data.sources[:1])
    one = make(data, vocabulary)
    batches = []
    while one.counters()["records"] <= 960:
        state = one.state()
        batches.append(next(one))
    batches.pop()  # it has rows of the second epoch
    met = collections.Counter(documents_in(batches, vocabulary))
    left = corpus.documents(data, one.sources, held_out=True)
    held_out = [document.text for document in left]
    assert 60 < len(held_out) < 140
    assert not set(met) & set(held_out)
    assert max(met.values()) == 1
    assert len(met) > 0.75 * (960 - len(held_out))
    assert state["step"] == len(batches)
    rest = set(TEXTS["one"]) - set(held_out) - set(met)
    again = make(data, vocabulary)
    again.restore(state)
    later = documents_in(take(again, 40), vocabulary)
    assert rest <= set(later)


@pytest.mark.parametrize("batch_rows", [8, 24])
def test_any_number_of_processes_gives_the_same_batches(folder, vocabulary, batch_rows):
    data = data_config(folder)
    whole = take(make(data, vocabulary, batch_rows), 12)
    for count in (2, 3, 8):
        if batch_rows % count:
            continue
        parts = [
            make(data, vocabulary, batch_rows, process_index=i, process_count=count)
            for i in range(count)
        ]
        joined = [packing.join([next(p) for p in parts]) for _ in range(12)]
        same(joined, whole)
    assert whole[0]["tokens_bt"].shape == (batch_rows, SEQ)


def test_a_process_reads_only_the_lanes_its_rows_need(folder, vocabulary):
    part = make(data_config(folder), vocabulary, process_index=1, process_count=4)
    next(part)
    assert sorted(part.state()["lanes"]) == ["2", "3"]
    odd = make(data_config(folder), vocabulary, 7)  # one lane, for 7 rows
    assert next(odd)["tokens_bt"].shape == (7, SEQ)
    assert list(odd.state()["lanes"]) == ["0"]


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_restore_at_any_step_by_any_processes(folder, vocabulary, runs, data):
    """A run killed after each of `runs` batches, gone on with by other processes."""
    config_ = data_config(folder)
    wanted = take(make(config_, vocabulary, 24), sum(runs))
    state, got = None, []
    for length in runs:
        count = data.draw(st.sampled_from([1, 2, 3, 8]))
        threads = data.draw(st.sampled_from([0, 2]))
        config_ = data_config(folder, read_threads=threads)
        parts = [
            make(config_, vocabulary, 24, process_index=i, process_count=count)
            for i in range(count)
        ]
        for part in parts:
            if state is not None:
                part.restore(state)
        for _ in range(length):
            got.append(packing.join([next(part) for part in parts]))
        states = [json.loads(json.dumps(part.state())) for part in parts]
        state = loader.merge_states(states)
        assert state["step"] == len(got)
        for part in parts:
            part.close()
    same(got, wanted)


def test_counters_survive_a_restore_and_sum_over_processes(folder, vocabulary):
    data = data_config(folder)
    whole = make(data, vocabulary)
    batches = take(whole, 300)
    counted = whole.counters()
    tokens = sum(int(batch["mask_bt"].sum()) for batch in batches)
    padding = sum(int((batch["segments_bt"] == 0).sum()) for batch in batches)
    assert (counted["tokens"], counted["padding_tokens"]) == (tokens, padding)
    assert tokens + padding == 300 * 8 * SEQ
    assert counted["documents"] + counted["held_out"] == counted["records"]
    assert counted["documents"] == counted["documents/one"] + counted["documents/two"]
    assert counted["split_documents"] > 0 and counted["bad_records"] == 0
    assert counted["epochs"] == int(whole.epoch) >= 1
    parts = [make(data, vocabulary, process_index=i, process_count=2) for i in range(2)]
    for part in parts:
        take(part, 125)
    state = loader.merge_states([part.state() for part in parts])
    for part in parts:
        part.restore(state)
        take(part, 175)
    sums = collections.Counter()
    for part in parts:
        sums.update(part.counters())
    for name in ("records", "documents", "tokens", "padding_tokens", "held_out"):
        assert sums[name] == counted[name]


def test_state_is_of_the_batch_returned_last(folder, vocabulary):
    """Reading ahead does not show in the state, before and after start()."""
    data = data_config(folder)
    one, two = make(data, vocabulary), make(data, vocabulary)
    assert one.state() == two.state()
    one.start()
    assert one.state() == two.state()
    next(one), next(two)
    assert one.state() == two.state()
    one.close()
    assert one.state() == two.state()
    same([next(one)], [next(two)])  # close stops the reading, not the stream


def test_stages_switch_at_their_step(folder, vocabulary):
    stages = ((6, {"one": 1.0}), (15, {"two": 1.0}), (20, {"one": 1.0}))
    data = data_config(folder, stages=stages, window_docs=16, seq_tokens=128)
    whole = make(data, vocabulary)
    batches = take(whole, 25)
    for step, batch in enumerate(batches):
        assert letters(batch, vocabulary) == ({"t"} if 6 <= step < 15 else {"o"})
    counted = whole.counters()
    dropped = counted["dropped_tokens"]
    read = counted["tokens/one"] + counted["tokens/two"]
    assert 0 < dropped <= read - counted["tokens"]
    # The third stage goes on in "one" where the first stood: no document comes twice.
    first = documents_in(batches[:6], vocabulary)
    third = documents_in(batches[15:18], vocabulary)
    assert first and third and not set(first) & set(third)
    # Restored in the middle of stages, and by other processes.
    for stop in (3, 6, 10, 15, 16):
        one = make(data, vocabulary)
        take(one, stop)
        states = loader.merge_states([one.state()])
        parts = [
            make(data, vocabulary, process_index=i, process_count=2) for i in range(2)
        ]
        for part in parts:
            part.restore(states)
        joined = [packing.join([next(p) for p in parts]) for _ in range(25 - stop)]
        same(joined, batches[stop:])
        assert sum(p.counters()["dropped_tokens"] for p in parts) == dropped


def test_weights_may_change_on_resume(folder, vocabulary):
    """New weights are a new stage: each source goes on where it stood."""

    def of(name):
        stages = ((100, {name: 1.0}),)
        data = data_config(folder, stages=stages, window_docs=8, seq_tokens=256)
        return make(data, vocabulary)

    one, other, back = of("one"), of("two"), of("one")
    before = documents_in(take(one, 2), vocabulary)
    other.restore(one.state())
    assert letters(next(other), vocabulary) == {"t"}
    back.restore(other.state())
    after = take(back, 2)
    assert all(letters(batch, vocabulary) == {"o"} for batch in after)
    assert before and not set(before) & set(documents_in(after, vocabulary))


def test_mixture_shares_of_the_text(folder, vocabulary):
    sources = tuple(
        source.SourceConfig(path=str(folder / name), weight=weight)
        for name, weight in (("one", 3.0), ("two", 1.0))
    )
    one = make(data_config(folder, sources=sources), vocabulary)
    take(one, 150)
    counted = one.counters()
    share = counted["tokens/one"] / (counted["tokens/one"] + counted["tokens/two"])
    assert share == pytest.approx(0.75, abs=0.03)


def test_workers_give_the_same_batches(folder, vocabulary):
    wanted = take(make(data_config(folder), vocabulary), 6)
    one = make(data_config(folder, num_workers=2), vocabulary)
    same(take(one, 6), wanted)
    one.close()


@pytest.mark.slow
def test_workers_resume_what_other_workers_began(folder, vocabulary):
    wanted_loader = make(data_config(folder), vocabulary)
    wanted = take(wanted_loader, 40)
    one = make(data_config(folder, num_workers=2), vocabulary)
    got = take(one, 17)
    state = one.state()
    one.close()
    other = make(data_config(folder, num_workers=5), vocabulary)  # 4 divide 8 lanes
    other.restore(json.loads(json.dumps(state)))
    got += take(other, 23)
    assert other.state() == wanted_loader.state()
    assert other.counters() == wanted_loader.counters()
    other.close()
    same(got, wanted)


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_users_own(folder, vocabulary, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS["one"]))
    sources = (source.SourceConfig(path=str(path)),)
    data = data_config(
        folder, sources=sources, num_workers=1, cache_dir=str(tmp_path / "cache")
    )
    one = make(data, vocabulary)
    os.utime(path, ns=(5, 5))
    with pytest.raises(config.InputError, match=r"a.jsonl' changed since"):
        take(one, 20)
    one.close()


@pytest.mark.slow
def test_workers_of_a_killed_process_end(folder, vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    program = f"""
import multiprocessing, time
from qwen_jax.data import loader, source, tokenizer
if __name__ == "__main__":
    facts = source.SourceConfig(path={str(folder / "one")!r})
    data = source.DataConfig(
        sources=(facts,), num_workers=2, seq_tokens=64, cache_dir={str(tmp_path)!r}
    )
    one = loader.Loader(data, tokenizer.load({str(tmp_path)!r}), batch_rows=8, seed=1)
    next(one)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""
    (tmp_path / "main.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    main = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, env=environment
    )
    try:
        workers = main.stdout.readline().decode().split()
    finally:
        main.kill()
        main.wait()
        main.stdout.close()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "the workers outlive the run"
        time.sleep(0.1)


def broken(tmp_path, count=200, bad=10, **fields):
    lines = [json.dumps({"text": text}) for text in texts_of("b", count)]
    for i in range(bad):
        lines[i * 7] = "{no json"
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    defaults = {"window_docs": 24, "cache_dir": str(tmp_path / "cache")}
    return source.DataConfig(
        sources=(source.SourceConfig(path=str(tmp_path / "b.jsonl")),),
        seq_tokens=SEQ,
        holdout_share=0.0,
        **{**defaults, **fields},
    )


def test_broken_records_are_counted_and_listed_once(vocabulary, tmp_path):
    data = broken(tmp_path, max_bad_share=0.06)
    listed = tmp_path / "run" / "bad_records.jsonl"
    one = make(data, vocabulary, bad_records_path=listed)
    while one.epoch < 3:
        next(one)
    assert one.counters()["bad_records"] >= 20  # met again in each epoch
    assert one.counters()["bad_records/bad_json"] == one.counters()["bad_records"]
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    content = (tmp_path / "b.jsonl").read_bytes()
    assert len(rows) == 10 and rows == one.bad_records()
    for row in rows:
        assert content[row["offset"] :].startswith(b"{no json")
        assert row["reason"] == "bad_json" and row["file"].endswith("b.jsonl")
        assert row["source"] == "b.jsonl"
    # A killed run left half a line; the next one lists the rest and nothing twice.
    half = listed.read_text().splitlines(keepends=True)[:4]
    listed.write_text("".join(half) + '{"source": "b.js')
    again = make(data, vocabulary, bad_records_path=listed)
    while again.epoch < 3:
        next(again)
    again_rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert again_rows[:4] == rows[:4] and len(again_rows) == 10
    assert {row["offset"] for row in again_rows} == {row["offset"] for row in rows}


def test_a_corpus_of_one_short_document(vocabulary, tmp_path):
    (tmp_path / "a.txt").write_text("one short text")
    facts = source.SourceConfig(path=str(tmp_path / "a.txt"))
    data = source.DataConfig(
        sources=(facts,), seq_tokens=64, holdout_share=0.0, window_docs=8
    )
    batch = next(make(data, vocabulary))
    assert set(documents_in([batch], vocabulary)) == {"one short text"}


def test_too_many_broken_records_stop_the_run(vocabulary, tmp_path):
    data = broken(tmp_path, max_bad_share=0.04)
    listed = tmp_path / "bad_records.jsonl"
    one = make(data, vocabulary, bad_records_path=listed)
    with pytest.raises(config.InputError) as error:
        take(one, 100)
    message = str(error.value)
    assert "(200 in all) are broken (bad_json" in message
    assert "more than data.max_bad_share=0.04" in message
    assert "b.jsonl" in message and "bad_records.jsonl" in message
    # One of few records is no more than the share, in however small a corpus.
    small = broken(tmp_path, count=20, bad=1, max_bad_share=0.06)
    one = make(small, vocabulary)
    while one.epoch < 4:
        next(one)


def test_a_corpus_without_a_usable_document_stops(vocabulary, tmp_path):
    data = broken(tmp_path, max_bad_share=1.0)
    nothing = dataclasses.replace(data, holdout_share=1.0)
    with pytest.raises(config.InputError, match="no document to train on in 10"):
        next(make(nothing, vocabulary))


def test_a_shard_that_changed_or_went_since_the_state_is_named(vocabulary, tmp_path):
    for i in range(3):
        lines = [json.dumps({"text": t}) for t in texts_of(f"s{i}", 60)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    data = source.DataConfig(
        sources=(source.SourceConfig(path=str(tmp_path), include=("*.jsonl",)),),
        seq_tokens=SEQ,
        cache_dir=str(tmp_path / "cache"),
    )
    one = make(data, vocabulary)
    next(one)
    state = one.state()
    old = (tmp_path / "1.jsonl").read_bytes()
    # The same content, copied anew, is the same corpus.
    (tmp_path / "1.jsonl").unlink()
    (tmp_path / "1.jsonl").write_bytes(old)
    make(data, vocabulary).restore(state)
    (tmp_path / "1.jsonl").write_bytes(old.replace(b"sss 7:", b"sss 8:"))
    with pytest.raises(config.InputError, match=r"'1.jsonl' of source .* changed"):
        make(data, vocabulary).restore(state)
    (tmp_path / "1.jsonl").unlink()
    with pytest.raises(config.InputError, match=r"'1.jsonl' of source .* is gone"):
        make(data, vocabulary).restore(state)
    (tmp_path / "1.jsonl").write_bytes(old)
    (tmp_path / "3.jsonl").write_bytes(old)
    with pytest.raises(config.InputError, match=r"'3.jsonl' of source .* is new"):
        make(data, vocabulary).restore(state)
    elsewhere = dataclasses.replace(data, cache_dir=str(tmp_path / "other"))
    with pytest.raises(config.InputError, match="which file is not known"):
        make(elsewhere, vocabulary).restore(state)


def test_a_state_of_another_run_is_refused(folder, vocabulary):
    data = data_config(folder)
    one = make(data, vocabulary)
    next(one)
    state = one.state()
    cases = (
        (make(data, vocabulary, seed=6), "seed was 5, is 6"),
        (make(data, vocabulary, 16), "batch_rows was 8, is 16"),
        (make(data_config(folder, seq_tokens=64), vocabulary), "seq_tokens was 32"),
        (make(data_config(folder, holdout_share=0.2), vocabulary), "holdout_share"),
    )
    for other, message in cases:
        with pytest.raises(config.InputError, match=message):
            other.restore(state)
    with pytest.raises(config.InputError, match="version None"):
        one.restore({})
    part = make(data, vocabulary, process_index=0, process_count=2).state()
    with pytest.raises(config.InputError, match=r"lacks the lanes \[4, 5, 6, 7\]"):
        make(data, vocabulary).restore(part)
    with pytest.raises(config.InputError, match="process 0 and 1 differ in step"):
        loader.merge_states([state, part])
    with pytest.raises(config.InputError, match="8 rows for 3 processes"):
        make(data, vocabulary, process_index=0, process_count=3)


def test_ready_ids_and_their_prompts(folder, vocabulary, tmp_path):
    ids = [vocabulary.encode(text) for text in TEXTS["one"][5:60]]
    lines = [json.dumps({"ids": one, "prompt_tokens": 3}) for one in ids]
    (tmp_path / "ids.jsonl").write_text("\n".join(lines))
    facts = source.SourceConfig(path=str(tmp_path / "ids.jsonl"), tokens_field="ids")
    data = data_config(folder, sources=(facts,), holdout_share=0.0, seq_tokens=256)
    one = make(data, vocabulary, 4)
    batches = take(one, 10)
    assert set(documents_in(batches, vocabulary)) <= set(TEXTS["one"])
    for batch in batches:
        inside = batch["segments_bt"] > 0
        np.testing.assert_array_equal(
            batch["mask_bt"][inside] == 0, batch["positions_bt"][inside] < 3
        )
    size = vocabulary.vocab_size
    (tmp_path / "ids.jsonl").write_text(json.dumps({"ids": [1, size]}))
    with pytest.raises(config.InputError, match=rf"holds {size}; .* 0\.\.{size - 1}"):
        next(make(data, vocabulary, 4))


@pytest.mark.parametrize("seq_tokens", [512, 2048])
def test_fill_on_real_documents(vocabulary, tmp_path, seq_tokens):
    import sysconfig

    facts = source.SourceConfig(
        path=sysconfig.get_path("stdlib"),
        include=("*.py",),
        exclude=(*source.files.DEFAULT_EXCLUDE, "site-packages", "test", "lib2to3"),
    )
    data = source.DataConfig(
        sources=(facts,), seq_tokens=seq_tokens, cache_dir=str(tmp_path)
    )
    one = make(data, vocabulary)
    batches = take(one, 120_000 // seq_tokens)
    fill = packing.fill(packing.join(batches))
    assert fill >= 0.97
