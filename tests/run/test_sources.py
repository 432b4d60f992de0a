# SPDX-License-Identifier: Apache-2.0
"""Where a run's text and first weights come from, and what may change there."""

import contextlib
import json
import shutil

import pytest

from qwen_jax.data import tokenizer
from tests import runs
from tests.run.here import LEAN, back_to


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The words that make a corpus of two sources."""
    folder = tmp_path_factory.mktemp("two")
    paths = [
        runs.corpus(folder / name, seed=i) for i, name in enumerate(("one", "two"))
    ]
    sources = [{"path": str(path)} for path in paths]
    return [
        f"--config.data.sources={sources}",
        *LEAN,
        "--config.checkpoint.every_steps=3",
    ]


def stages(*pairs):
    return f"--config.data.stages={list(pairs)}"


BOTH, ONE, TWO = {"one": 1.0, "two": 1.0}, {"one": 1.0}, {"two": 1.0}


@pytest.mark.parametrize(
    "before, after",
    [
        # No stages yet, and a decay stage that begins later.
        pytest.param([], [(9, BOTH), (10, TWO)], marks=pytest.mark.slow),
        # Cut off exactly where the run stands; a weight of 0 is none.
        ([(4, BOTH), (7, ONE | {"two": 0})], [(4, BOTH), (6, ONE), (10, TWO)]),
        # The last one holds on after its end, until another comes.
        pytest.param(
            [(2, TWO), (4, BOTH)],
            [(2, TWO), (8, BOTH), (10, ONE)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stages_that_have_not_begun_may_change(here, tmp_path, two, before, after):
    code, _, err = here.run(
        tmp_path / "run", *two, stages(*before), "--config.train.num_steps=6"
    )
    assert code == 0, err
    longer = [*two, stages(*after), "--config.train.num_steps=12"]
    for workdir in (tmp_path / "run", tmp_path / "whole"):
        code, _, err = here.run(workdir, *longer)
        assert code == 0, err
    assert runs.steps_made(tmp_path / "run") == runs.steps_made(tmp_path / "whole")


def test_stages_that_have_begun_stay(here, tmp_path, two):
    begun = [*two, stages((4, BOTH), (5, TWO)), "--config.train.num_steps=6"]
    code, _, err = here.run(tmp_path, *begun)
    assert code == 0, err
    for wrong, would in (
        ([], "[[6, {'one': 1.0, 'two': 1.0}]]"),
        ([(5, BOTH), (9, TWO)], "[[5, {'one': 1.0, 'two': 1.0}], [6, {'two': 1.0}]]"),
        ([(4, BOTH), (5, TWO), (9, ONE)], "], [5, {'two': 1.0}], [6, {'one': 1.0}]]"),
    ):
        err = here.refused(tmp_path, *begun, stages(*wrong))
        assert "data.stages: the 6 steps of this run were drawn in the stages" in err
        was = "[[4, {'one': 1.0, 'two': 1.0}], [6, {'two': 1.0}]]; those given would"
        assert was in err and would in err.partition(was)[2]
    err = here.refused(tmp_path, *begun, stages((4, BOTH), (6, TWO), (9, {"three": 1})))
    assert "no source is named 'three'" in err


def test_a_changed_shard_is_named(here, copied, data, tmp_path):
    changed = shutil.copytree(data, tmp_path / "other" / "corpus")
    lines = (changed / "words.jsonl").read_text().splitlines(keepends=True)
    (changed / "words.jsonl").write_text("".join(lines[:-1]))
    stored = ["--config.data.cache_dir=" + str(data.parent / "cache")]
    # The same path, so that only the content differs.
    with moved(data, changed):
        err = here.refused(copied, *stored)
    assert "'words.jsonl' of source 'corpus' changed" in err
    assert "Put the old files back" in err


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("elsewhere/corpus", marks=pytest.mark.slow),
        "elsewhere/renamed",
        pytest.param("relative", marks=pytest.mark.slow),
    ],
)
def test_the_same_corpus_may_stand_elsewhere(
    here, finished, copied, data, tmp_path, monkeypatch, place
):
    """Its name in the mixture came from the path and decides the order: it is kept."""
    back_to(copied, 6)
    if place == "relative":
        monkeypatch.chdir(data.parent)
        folder = data.name
    else:
        folder = shutil.copytree(data, tmp_path / place)
    code, _, err = here.run(copied, *cache_of(data), data=folder)
    assert code == 0, err
    assert runs.steps_made(copied) == runs.steps_made(finished)
    assert runs.evaluations(copied) == runs.evaluations(finished)
    stored = json.loads((copied / "run.json").read_text())["config"]["data"]["sources"]
    assert [one["path"] for one in stored] == [str(folder)]
    # And again from there, at the old place.
    code, _, err = here.run(copied, "--config.train.num_steps=10")
    assert code == 0, err


def cache_of(data):
    return [f"--config.data.cache_dir={data.parent / 'cache'}"]


def test_another_corpus_elsewhere_is_refused_with_the_difference(
    here, copied, data, tmp_path
):
    folder = shutil.copytree(data, tmp_path / "elsewhere" / "corpus")
    (folder / "more.txt").write_text("the model learns")
    err = here.refused(copied, *cache_of(data), data=folder)
    assert "'more.txt' of source 'corpus' is new" in err
    (folder / "more.txt").rename(folder / "words.jsonl")
    err = here.refused(copied, *cache_of(data), data=folder)
    assert "'words.jsonl' of source 'corpus' changed (" in err
    # What is read of it is another matter.
    sources = [{"path": str(data), "text_field": "body"}]
    err = here.refused(copied, f"--config.data.sources={sources}")
    assert "data.sources: [" in err and "another place of the same corpus" in err


@contextlib.contextmanager
def moved(place, other):
    """`other` stands at `place` for a while."""
    aside = place.with_name("aside")
    place.rename(aside)
    shutil.copytree(other, place)
    try:
        yield
    finally:
        shutil.rmtree(place)
        aside.rename(place)


def test_a_model_folder_is_where_a_run_may_begin(here, finished, tmp_path):
    model = f"--config.train.init_from={finished / 'export'}"
    code, _, err = here.run(tmp_path / "next", model, *LEAN)
    assert code == 0, err
    begun = runs.losses(tmp_path / "next")[0]
    assert begun < runs.losses(finished)[0] - 1
    other = here.refused(
        tmp_path / "wrong", model, "--config.model.num_layers=3", *LEAN
    )
    assert "num_layers is 2 there, 3 here" in other
    assert not runs.finished(tmp_path / "wrong")


@pytest.fixture
def pretrained(finished, tmp_path):
    """A model folder whose tokenizer no run would learn from this corpus."""
    folder = shutil.copytree(finished / "export", tmp_path / "pretrained")
    texts = [" ".join(runs.WORDS).upper()] * 9
    tokenizer.train(texts, 310).save(folder)
    return folder


def test_a_model_to_begin_with_brings_its_tokenizer(here, copied, pretrained, tmp_path):
    workdir, its = tmp_path / "next", tokenizer.load(pretrained).fingerprint
    model = f"--config.train.init_from={pretrained}"
    code, out, err = here.run(workdir, model, *LEAN)
    assert code == 0, err
    assert out.count(f"tokenizer: that of {pretrained}\n") == 1
    assert tokenizer.load(workdir / "tokenizer").fingerprint == its
    facts = json.loads((workdir / "run.json").read_text())
    assert facts["tokenizer"] == its and facts["config"]["data"]["tokenizer"] == ""
    # It is the run's own now: the same command goes on when the folder is gone.
    shutil.rmtree(pretrained)
    code, out, err = here.run(workdir, model, *LEAN, "--config.train.num_steps=10")
    assert code == 0 and "tokenizer: that of" not in out, err
    assert tokenizer.load(workdir / "tokenizer").fingerprint == its
    assert len(runs.losses(workdir)) == 10


def test_another_tokenizer_than_that_of_the_weights_is_told(
    here, finished, pretrained, tmp_path
):
    model = f"--config.train.init_from={pretrained}"
    lean = [*LEAN, "--config.train.num_steps=3"]
    for folder, differs in ((finished / "tokenizer", True), (pretrained, False)):
        given = f"--config.data.tokenizer={folder}"
        code, out, err = here.run(tmp_path / folder.name, model, given, *lean)
        assert code == 0 and "tokenizer: that of" not in out, err
        note = f"note: data.tokenizer={folder} is not the tokenizer of {pretrained}"
        assert (note in out) == differs
        used = tokenizer.load(tmp_path / folder.name / "tokenizer").fingerprint
        assert used == tokenizer.load(folder).fingerprint
    (pretrained / "tokenizer.json").write_text("{")
    given = f"--config.data.tokenizer={finished / 'tokenizer'}"
    code, out, err = here.run(tmp_path / "broken", model, given, *lean)
    assert code == 0, err
    assert f"note: data.tokenizer is not compared with that of {pretrained}: " in out
    (pretrained / "tokenizer.json").unlink()
    code, out, err = here.run(tmp_path / "none", model, given, *lean)
    assert code == 0, err
    assert f"note: {pretrained} has no tokenizer.json to compare" in out


def test_a_model_without_a_published_form_is_trained_but_not_exported(here, tmp_path):
    code, _, err = here.run(tmp_path, "--config.model.qk_norm=false", *LEAN)
    assert code == 0, err
    assert len(runs.losses(tmp_path)) == 9 and not (tmp_path / "export").exists()
