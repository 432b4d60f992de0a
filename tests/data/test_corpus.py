# SPDX-License-Identifier: Apache-2.0
"""Held-out batches and the run's tokenizer: fixed order, nothing trained on."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.data import corpus, loader, packing, source, tokenizer
from tests.oracles import packing as oracle

TEXTS = [f"document {i}: " + "word " * (i % 30) + "é" for i in range(400)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources that share fifty documents, and a broken line."""
    path = tmp_path_factory.mktemp("corpus")
    for name, texts in (("a", TEXTS[:225]), ("b", TEXTS[175:])):
        lines = [json.dumps({"text": text}) for text in texts] + ["{broken"]
        (path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = tuple(source.SourceConfig(path=str(path / f"{n}.jsonl")) for n in "ab")
    return source.DataConfig(
        sources=sources,
        seq_tokens=48,
        holdout_share=0.15,
        window_docs=32,
        cache_dir=str(path / "cache"),
        vocab_size=320,
    )


@pytest.fixture(scope="module")
def vocabulary(data, tmp_path_factory):
    return corpus.prepare_tokenizer(data, tmp_path_factory.mktemp("run"))


def texts_in(batches, vocabulary):
    pieces = [p for batch in batches for p in oracle.pairs_of_rows(batch)]
    end = vocabulary.eos_id
    whole = [p for p in pieces if p[0][0] == end and p[-1][1] == end]
    return {vocabulary.decode([pair[1] for pair in p[:-1]]) for p in whole}


def test_held_out_and_trained_on_are_disjoint_and_complete(data, vocabulary):
    sources = source.open_sources(data)
    out = {d.text for d in corpus.documents(data, sources, held_out=True)}
    rest = {d.text for d in corpus.documents(data, sources, held_out=False)}
    assert out | rest == set(TEXTS) and not out & rest
    assert 30 < len(out) < 90
    assert set(corpus.texts(data, sources=sources)) == rest
    one = loader.Loader(data, vocabulary, batch_rows=8, seed=3)
    trained = texts_in([next(one) for _ in range(120)], vocabulary)
    assert one.epoch > 2 and not trained & out
    # A larger share holds out what a smaller one did, and more.
    more = dataclasses.replace(data, holdout_share=0.3)
    assert out < {d.text for d in corpus.documents(more, sources, held_out=True)}


def test_batches_bytes_and_any_process_count(data, vocabulary):
    whole = corpus.heldout(data, vocabulary, batch_rows=6)
    again = corpus.heldout(data, vocabulary, batch_rows=6)
    text = corpus.heldout_bytes(data)
    assert whole.num_bytes == len(text) == len(corpus.heldout_bytes(data, vocabulary))
    assert len(gzip.compress(text, 9)) < len(text)
    # Every token but the end marks stands for the bytes that are counted.
    targets = np.concatenate(
        [b["targets_bt"][b["mask_bt"] == 1] for b in whole.batches]
    )
    assert vocabulary.token_bytes[targets].sum() == whole.num_bytes
    assert (targets == vocabulary.eos_id).sum() == whole.num_documents
    for count in (2, 3):
        parts = [
            corpus.heldout(
                data, vocabulary, batch_rows=6, process_index=i, process_count=count
            )
            for i in range(count)
        ]
        for number, batch in enumerate(whole.batches):
            joined = packing.join([part.batches[number] for part in parts])
            for key in batch:
                np.testing.assert_array_equal(joined[key], batch[key])
                np.testing.assert_array_equal(again.batches[number][key], batch[key])
    assert all(b["tokens_bt"].shape == (6, 48) for b in whole.batches)


def test_a_part_of_the_held_out_text(data, vocabulary):
    little = dataclasses.replace(data, holdout_max_bytes=600)
    part = corpus.heldout(little, vocabulary, batch_rows=2)
    assert 600 <= part.num_bytes < 800
    whole = corpus.heldout_bytes(data)
    assert whole.startswith(corpus.heldout_bytes(little))


def test_a_share_that_chooses_nothing(data, vocabulary):
    none = dataclasses.replace(data, holdout_share=1e-9)
    with pytest.raises(config.InputError, match="452 records chose no document"):
        corpus.heldout(none, vocabulary, batch_rows=2)
    off = dataclasses.replace(data, holdout_share=0.0)
    assert corpus.heldout(off, vocabulary, batch_rows=2) == corpus.Heldout((), 0, 0)
    with pytest.raises(config.InputError, match="5 rows for 2 processes"):
        corpus.heldout(data, vocabulary, batch_rows=5, process_count=2)


def test_the_runs_tokenizer(data, vocabulary, tmp_path, monkeypatch):
    first = corpus.prepare_tokenizer(data, tmp_path / "run")
    assert first.vocab_size <= 320 and first.fingerprint == vocabulary.fingerprint
    # Learning it is not done twice for the same text and size.
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "train", None)
        again = corpus.prepare_tokenizer(data, tmp_path / "next")
        with pytest.raises(TypeError):
            smaller = dataclasses.replace(data, vocab_size=310)
            corpus.prepare_tokenizer(smaller, tmp_path / "smaller")
        with pytest.raises(TypeError):
            other = dataclasses.replace(data, sources=data.sources[:1])
            corpus.prepare_tokenizer(other, tmp_path / "one")
    assert again.fingerprint == first.fingerprint
    # What the run folder keeps is used again, whatever the corpus is by now.
    kept = corpus.prepare_tokenizer(
        dataclasses.replace(data, vocab_size=300), tmp_path / "run"
    )
    assert kept.fingerprint == first.fingerprint
    named = dataclasses.replace(data, tokenizer=str(tmp_path / "run"))
    copied = corpus.prepare_tokenizer(named, tmp_path / "other")
    assert copied.fingerprint == first.fingerprint
    assert tokenizer.load(tmp_path / "other").fingerprint == first.fingerprint
    wrong = dataclasses.replace(data, tokenizer=str(tmp_path / "nothing"))
    with pytest.raises(config.InputError, match="no tokenizer at"):
        corpus.prepare_tokenizer(wrong, tmp_path / "third")
    assert sum(map(len, corpus.texts(data, 1000))) < 1500
