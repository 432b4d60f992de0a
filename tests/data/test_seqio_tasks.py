# SPDX-License-Identifier: Apache-2.0
"""SeqIO through the adapter: with the real library where it is installed (3 GB)."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.data import loader, seqio_tasks, source, tokenizer

TEXTS = [f"question {i} is {'long ' * (i % 5)}" for i in range(40)]


def test_without_seqio_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(config.InputError, match=r"pip install 'qwen_jax\[seqio\]'"):
        seqio_tasks.sources("any", tmp_path)


def test_the_core_imports_no_extra():
    program = (
        "import sys; from qwen_jax.data import corpus, loader, preview, seqio_tasks; "
        "extras = {'seqio', 'tensorflow', 'pyarrow', 'transformers', 'torch'}; "
        "print(sorted(extras & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train(TEXTS * 3, 320)


@pytest.fixture(scope="module")
def registered(vocabulary):
    """Two tasks of ids (one with prompts), one of text, and a mixture."""
    seqio = pytest.importorskip("seqio")
    tf = pytest.importorskip("tensorflow")
    ours = seqio_tasks.vocabulary(vocabulary)

    def examples(split, shuffle_files, seed=None, *, first, prompts):
        del split, shuffle_files, seed
        texts = TEXTS[first : first + 20]
        columns = {"targets": texts}
        if prompts:
            columns["inputs"] = [f"prompt {text[:11]}" for text in texts]
        return tf.data.Dataset.from_tensor_slices(columns)

    def add(name, first, prompts, features, preprocessors):
        make = functools.partial(examples, first=first, prompts=prompts)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(make, splits=["train", "test"]),
            preprocessors=preprocessors,
            output_features=features,
        )

    feature = seqio.Feature(ours, add_eos=True)
    ids = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    both = {"inputs": seqio.Feature(ours, add_eos=False), "targets": feature}
    add("qwen_prompts", 0, True, both, ids)
    add("qwen_plain", 20, True, both, ids)
    text = seqio.Feature(
        seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0
    )
    add("qwen_text", 0, False, {"targets": text}, [])
    seqio.MixtureRegistry.add("qwen_mix", [("qwen_prompts", 3), ("qwen_plain", 1)])
    return seqio


def test_a_task_of_ids_with_prompts(registered, vocabulary, tmp_path):
    (one,) = seqio_tasks.sources("qwen_prompts", tmp_path)
    with open(one.path) as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 20
    for text, line in zip(TEXTS, lines, strict=False):
        prompt = vocabulary.encode(f"prompt {text[:11]}")
        assert line["prompt_tokens"] == len(prompt)
        assert line["tokens"] == [*prompt, *vocabulary.encode(text)]
    before = (tmp_path / one.path).stat().st_mtime_ns
    assert seqio_tasks.sources("qwen_prompts", tmp_path) == (one,)
    assert (tmp_path / one.path).stat().st_mtime_ns == before
    seqio_tasks.sources("qwen_prompts", tmp_path, refresh=True)
    assert (tmp_path / one.path).stat().st_mtime_ns > before
    other = seqio_tasks.sources("qwen_prompts", tmp_path, split="test")
    assert other[0].path != one.path


def test_a_task_of_text(registered, vocabulary, tmp_path):
    (one,) = seqio_tasks.sources("qwen_text", tmp_path, text_feature="targets")
    data = source.DataConfig(sources=(one,), cache_dir=str(tmp_path / "cache"))
    documents = source.open_sources(data)[0].read(range(20))
    assert [document.text for document in documents] == TEXTS[:20]


def test_a_mixture_through_the_loader(registered, vocabulary, tmp_path):
    sources = seqio_tasks.sources("qwen_mix", tmp_path)
    assert {one.name: one.weight for one in sources} == {
        "qwen_prompts": 3.0,
        "qwen_plain": 1.0,
    }
    data = source.DataConfig(
        sources=sources,
        weight_by="documents",
        seq_tokens=64,
        holdout_share=0.0,
        window_docs=32,
        cache_dir=str(tmp_path / "cache"),
    )
    one = loader.Loader(data, vocabulary, batch_rows=4, seed=0)
    batches = [next(one) for _ in range(30)]
    counted = one.counters()
    share = counted["documents/qwen_prompts"] / counted["documents"]
    assert share == pytest.approx(0.75, abs=0.02)
    targets = np.concatenate([b["targets_bt"][b["mask_bt"] == 1] for b in batches])
    told = vocabulary.decode(targets)
    assert "question" in told and "prompt" not in told


def test_mistakes(registered, tmp_path):
    with pytest.raises(config.InputError, match="'qwen_mixx'; did you mean 'qwen_mix'"):
        seqio_tasks.sources("qwen_mixx", tmp_path)
    with pytest.raises(
        config.InputError, match="no split 'trian'; did you mean 'train'"
    ):
        seqio_tasks.sources("qwen_mix", tmp_path, split="trian")
    with pytest.raises(config.InputError, match="no feature 'tex'"):
        seqio_tasks.sources("qwen_text", tmp_path, text_feature="tex")
    with pytest.raises(config.InputError, match="'targets' holds .* not ids"):
        seqio_tasks.sources("qwen_text", tmp_path)
    with pytest.raises(config.InputError, match="holds ndarray, not text"):
        seqio_tasks.sources("qwen_prompts", tmp_path, text_feature="targets")
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_inside_seqio(registered, vocabulary):
    ours = seqio_tasks.vocabulary(vocabulary)
    assert ours == seqio_tasks.vocabulary(vocabulary)
    assert ours.encode("question 7") == vocabulary.encode("question 7")
    ids = ours.encode_tf("question 7")
    assert ids.numpy().tolist() == vocabulary.encode("question 7")
    assert ours.decode(ids) == "question 7"
    assert ours.decode_tf(ids).numpy() == b"question 7"
