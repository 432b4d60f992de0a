# SPDX-License-Identifier: Apache-2.0
"""generate, convert and data preview say what the model, the checkpoint and the loader
have."""

import dataclasses
import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qwen_jax import cli, convert, experiment, models, tools
from qwen_jax.checkpoint import manager
from qwen_jax.data import loader, tokenizer
from tests import runs
from tests.run.here import MESH, SHORT  # programs that are compiled once for both


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """The folder of a run of 9 steps with checkpoints of steps 6 and 9."""
    workdir = tmp_path_factory.mktemp("tools") / "run"
    with pytest.MonkeyPatch.context() as patch:
        folder = jax.config.jax_compilation_cache_dir
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        words = runs.words(workdir, data, *MESH, *SHORT, arg="adamw")
        assert cli.main([*words, "--quiet"]) == 0
    return workdir


@pytest.fixture
def call(capsys):
    """Standard output of a command that must succeed."""

    def call(*words):
        capsys.readouterr()
        code = cli.main([*map(str, words)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


def refused(capsys, *words):
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "Traceback" not in err
    return err


def equal(one, other):
    same = jax.tree.map(np.array_equal, jax.device_get(one), jax.device_get(other))
    return jax.tree.all(same)


# --- generate ---


@pytest.fixture(scope="module")
def greedy(run):
    """(prompt, count) -> (text, number of tokens), by whole forward passes."""
    spec, params = models.load(run / "export", dtype="float32")
    vocabulary = tokenizer.load(run / "export")
    forward = jax.jit(lambda tokens_bt: models.forward(spec, params, tokens_bt))

    def greedy(prompt, count):
        ids = [vocabulary.eos_id, *vocabulary.encode(prompt)]
        begun = len(ids)
        while len(ids) < begun + count:
            row = np.zeros((1, 64), np.int32)  # causal: what follows changes nothing
            row[0, : len(ids)] = ids
            ids.append(int(np.argmax(forward(row)[0, len(ids) - 1])))
            if ids[-1] == vocabulary.eos_id:
                ids.pop()
                break
        return vocabulary.decode(ids[begun:]), len(ids) - begun

    return greedy


PROMPTS = ["the model", "some", "not"]


def test_greedy_is_the_likeliest_token_of_the_whole_model(call, run, greedy):
    words = ["generate", f"--model={run / 'export'}", "--max_tokens=12", "--json"]
    out = call(*words, *[f"--prompt={prompt}" for prompt in PROMPTS])
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        assert (row["text"], row["tokens"]) == greedy(row["prompt"], 12)
    assert rows[0]["text"]


def test_a_prompt_stands_after_the_end_mark_of_the_document_before_it(
    call, run, monkeypatch
):
    """As in training; a special token that is written out is one."""
    got = []

    def generate(spec, weights, ids, **_):
        got.extend(ids)
        return [[]] * len(ids)

    monkeypatch.setattr(tools.decode, "generate", generate)
    vocabulary = tokenizer.load(run / "export")
    end, ids = vocabulary.eos_id, vocabulary.encode("the model")
    prompts = ["--prompt=the model", "--prompt=", "--prompt=<|im_end|>the model"]
    call("generate", f"--model={run / 'export'}", *prompts)
    assert got == [[end, *ids], [end], [end, vocabulary.im_end_id, *ids]]


def test_prompts_come_from_a_file_or_standard_input(
    call, run, greedy, tmp_path, monkeypatch
):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\n\n{PROMPTS[2]}\n")
    words = ["generate", f"--model={run / 'export'}", "--max_tokens=5"]
    want = "".join(f"{p}{greedy(p, 5)[0]}\n" for p in PROMPTS)
    file = f"--prompt_file={tmp_path / 'prompts.txt'}"
    assert call(*words, f"--prompt={PROMPTS[0]}", file) == want
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    assert call(*words, "--prompt_file=-") == want


def test_a_seed_draws_the_same_text_again(call, run):
    words = ["generate", f"--model={run / 'export'}", "--prompt=the", "--max_tokens=16"]
    hot = [*words, "--temperature=1.5"]
    first = call(*hot, "--seed=1")
    assert first == call(*hot, "--seed=1") != call(*hot, "--seed=2")
    # A nucleus of one token is the likeliest token whatever the temperature.
    assert call(*hot, "--top_p=1e-9") == call(*words)


# --- convert ---


def kept(run, step):
    """Parameters of a checkpoint, read by the manager alone."""
    exp = experiment.resolve(f"{runs.EXPERIMENT}:adamw")
    shapes = jax.eval_shape(lambda: models.init(exp.model))
    with manager.Manager(run / "checkpoints", read_only=True) as stored:
        return stored.restore({"params": shapes}, step, subset=True)[0]["params"]


def dtypes(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    return {x.dtype for x in tensors.values()}


def test_a_checkpoint_becomes_a_model_folder_with_its_weights(call, run, tmp_path):
    before = runs.contents(run)
    newest = tmp_path / "newest"
    out = call("convert", run, newest)
    spec, params = models.load(newest)
    assert f"step 9 of {run} -> {newest} (" in out
    assert f"({sum(x.size for x in jax.tree.leaves(params)):,} weights)" in out
    assert equal(params, kept(run, 9))
    assert (newest / "config.json").read_bytes() == (
        run / "export" / "config.json"
    ).read_bytes()
    vocabulary = tokenizer.load(newest)
    assert vocabulary.fingerprint == tokenizer.load(run / "tokenizer").fingerprint
    assert spec.eos_ids == (vocabulary.eos_id,)
    call("convert", run, tmp_path / "older", "--step=6")
    older = models.load(tmp_path / "older")[1]
    assert equal(older, kept(run, 6)) and not equal(older, params)
    assert runs.contents(run) == before


def test_weights_are_rounded_once_to_the_dtype_that_is_asked_for(call, run, tmp_path):
    call("convert", run, tmp_path / "half", "--dtype=bfloat16")
    assert dtypes(tmp_path / "half") == {jnp.dtype("bfloat16")}
    spec, params = models.load(tmp_path / "half")
    assert spec.param_dtype == "bfloat16"
    want = jax.tree.map(lambda x: jnp.asarray(x, "bfloat16"), kept(run, 9))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert equal(params, want)
    # A model folder is a source, too: there and back in float32.
    call("convert", tmp_path / "half", tmp_path / "back", "--dtype=float32")
    wide = jax.tree.map(lambda x: x.astype("float32"), want)
    assert equal(models.load(tmp_path / "back")[1], wide)


def test_a_model_folder_without_a_tokenizer_gives_its_weights(call, run, tmp_path):
    spec, params = models.load(run / "export")
    models.save(spec, params, tmp_path / "bare")
    out = call("convert", tmp_path / "bare", tmp_path / "out")
    assert "has no tokenizer.json: only weights are written" in out
    assert equal(models.load(tmp_path / "out")[1], params)
    call("convert", tmp_path / "bare", tmp_path / "half", "--dtype=bfloat16")
    assert dtypes(tmp_path / "half") == {jnp.dtype("bfloat16")}
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_what_goes_with_a_model_travels_as_it_is(call, run, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(run / "export", source)
    (source / "chat_template.jinja").write_text("{{ messages }} as published")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (source / "modeling_x.py").write_text("raise SystemExit")
    call("convert", source, tmp_path / "out", "--shard_bytes=20000")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_x.py").exists()
    assert equal(models.load(tmp_path / "out")[1], models.load(source)[1])
    # The same command may be given again, also with files of another size.
    call("convert", source, tmp_path / "out", "--dtype=bfloat16")
    assert dtypes(tmp_path / "out") == {jnp.dtype("bfloat16")}
    assert not list((tmp_path / "out").glob("model-*"))


def test_a_folder_of_something_else_is_not_written_to(capsys, call, run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    told = refused(capsys, "convert", run / "export", other)
    assert "holds something else (thesis.txt): name a new folder" in told
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    wider = dataclasses.replace(models.load(run / "export")[0], ffn_width=32)
    models.save(wider, models.init(wider), tmp_path / "wider")
    before = runs.contents(tmp_path / "wider")
    for source in (run, run / "export"):
        told = refused(capsys, "convert", source, tmp_path / "wider")
        assert "holds another model" in told
    assert runs.contents(tmp_path / "wider") == before
    assert "is a file" in refused(capsys, "convert", run, other / "thesis.txt")


def test_the_other_way_is_told(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "a run begins with the weights of a model folder by" in words
    assert "--config.train.init_from=DIR" in words


def test_progress_tells_the_rest_of_a_large_model(capsys):
    now = [0.0]
    say = convert.progress(lambda: now[0])
    for now[0], done in ((0.5, 1), (2.0, 2), (2.5, 3), (8.0, 8)):
        say(done * 10**9, 8 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2.0 of 8.0 GB, 1,000 MB/s, 6 s left"
    assert lines[1:] == ["8.0 of 8.0 GB, 1,000 MB/s, 0 s left"]
    say(10, 20)  # a small one is there at once
    assert not capsys.readouterr().err


def test_a_tokenizer_of_a_larger_model_is_refused(capsys, run, tmp_path):
    """Before any weight is read: these are not even there."""
    shutil.copytree(run / "export", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text()) | {"vocab_size": 300}
    path.write_text(json.dumps(raw))
    (tmp_path / "model" / "model.safetensors").unlink()
    words = ["generate", f"--model={tmp_path / 'model'}", "--prompt=a"]
    told = refused(capsys, *words)
    assert "has ids up to 319, its model a vocabulary of 300" in told


def test_what_cannot_be_converted_is_told(capsys, run, tmp_path):
    out = tmp_path / "out"
    for words, told in (
        ([run, out, "--step=5"], "no checkpoint of step 5 in "),
        ([run, out, "--step=5"], "steps there: 6, 9"),
        ([run, out, "--dtype=bf16"], "--dtype 'bf16'; did you mean 'bfloat16'?"),
        ([run, run], "is the source itself: name another folder"),
        ([run / "export", out, "--step=6"], "--step is for run folders"),
        ([tmp_path / "none", out], "none' does not exist"),
        ([run / "tokenizer", out], "has no config.json"),
    ):
        assert told in refused(capsys, "convert", *words)
    assert not out.exists()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "run.json").write_text("{}")
    err = refused(capsys, "convert", tmp_path / "young", out)
    assert "no intact checkpoint in" in err


def test_a_damaged_checkpoint_is_not_converted(capsys, run, tmp_path):
    copied = tmp_path / "copied"
    for name, content in runs.contents(run).items():
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(content)
    path = copied / "checkpoints/00000009/arrays/params.norm_d/c/0"
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    err = refused(capsys, "convert", copied, tmp_path / "out")
    assert "step 9" in err and "is damaged" in err and "params.norm_d" in err
    assert "the next older one is step 6" in err and not (tmp_path / "out").exists()


# --- data preview ---


@pytest.mark.parametrize("rows", [1, 3])
def test_the_preview_shows_the_rows_that_training_reads(call, run, data, rows):
    words = ["data", "preview", *runs.words(run, data, arg="adamw")[1:]]
    before = runs.contents(run)
    out = call(*words, f"--rows={rows}")
    assert runs.contents(run) == before
    vocabulary = tokenizer.load(run / "tokenizer")
    exp = experiment.resolve(f"{runs.EXPERIMENT}:adamw", [], str(data))
    with_rows = loader.Loader(exp.data, vocabulary, batch_rows=4, seed=exp.seed)
    batch = next(with_rows)
    with_rows.close()
    assert out.startswith("4 rows of 32 tokens\n") and f"({4 - rows} more rows)" in out
    shown = out.split("\nrow ")[1:]
    assert len(shown) == rows
    for i, text in enumerate(shown):
        segments, mask = batch["segments_bt"][i], batch["mask_bt"][i]
        placed = int((segments > 0).sum())
        assert text.startswith(
            f"{i}: {segments.max()} segments, {placed}/32 places filled, "
            f"{int(mask.sum())} targets\n"
        )
        assert mask.sum() == placed  # plain text: every next token counts
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            last = batch["targets_bt"][i, at[-1]]
            ids = [*batch["tokens_bt"][i, at].tolist(), int(last)]
            begins = "begins" if ids[0] == vocabulary.eos_id else "goes on"
            ends = "ends" if ids[-1] == vocabulary.eos_id else "is cut"
            told = map(str, ids if len(ids) <= 16 else [*ids[:8], "...", *ids[-8:]])
            assert (
                f"  segment {segment} at {at[0]}..{at[-1]} (a document that {begins} "
                f"and {ends}): {' '.join(told)}\n"
            ) in text
            first, rest = vocabulary.decode(ids[:1]), vocabulary.decode(ids[1:])
            assert f"▏⟦{first}⟧{rest}".replace("\n", "⏎") in text
    tokens = re.search(r"\n  (\d+) targets count in the loss, 0 do not", out)
    assert int(tokens[1]) == batch["mask_bt"].sum()


def test_a_preview_learns_a_vocabulary_where_there_is_none(call, data, tmp_path):
    words = ["data", "preview", *runs.words(tmp_path / "new", data)[1:]]
    out = call(*words, "--color=always")
    assert "\033[36m" in out and not (tmp_path / "new").exists()
    assert "\033" not in call(*words)


def test_a_preview_takes_the_tokenizer_of_the_weights_to_begin_with(
    call, run, data, tmp_path, monkeypatch
):
    monkeypatch.delattr(tokenizer, "train")  # nothing is learnt
    words = ["data", "preview", *runs.words(tmp_path / "new", data)[1:]]
    assert "8 rows of 32 tokens" in call(
        *words, f"--config.train.init_from={run / 'export'}", "--rows=8"
    )


def test_a_preview_of_no_rows_is_refused(capsys, data, tmp_path):
    words = ["data", "preview", *runs.words(tmp_path, data)[1:]]
    assert "--rows 0: wanted at least 1" in refused(capsys, *words, "--rows=0")
