# SPDX-License-Identifier: Apache-2.0
"""Bad input through the command line: one line with value, wish and fix; exit code 2;
nothing compiled, nothing that was there is lost.

(What a resumed run refuses, damaged checkpoints and locks: run/test_run.py.)
"""

import errno
import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy

from qwen_jax import cli, experiment, export, models, prepare
from qwen_jax.checkpoint import lock, saving
from qwen_jax.data import tokenizer
from tests import runs


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def workdir(tmp_path):
    """A folder that holds something already."""
    (tmp_path / "run" / "notes").mkdir(parents=True)
    (tmp_path / "run" / "notes" / "mine.txt").write_text("keep this")
    return tmp_path / "run"


@pytest.fixture
def refused(monkeypatch, capsys, workdir):
    """Call with words: the error of a command that must end with 2."""
    compiled = []
    monkeypatch.setattr(prepare, "compile_step", compiled.append)

    def refused(*words, compiles=0, writes=()):
        before = runs.contents(workdir)
        code = cli.main([*map(str, words)])
        err = capsys.readouterr().err
        assert code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert len(compiled) == compiles
        after = runs.contents(workdir)
        assert after.items() >= before.items()
        new = {name.partition("/")[0] for name in after.keys() - before.keys()}
        assert new <= {*writes}
        return err

    return refused


@pytest.mark.parametrize(
    "more, told",
    [
        ("train.num_stpes=3", ["unknown key 'num_stpes'", "did you mean 'num_steps'?"]),
        ("tarin.num_steps=3", ["unknown key 'tarin'; did you mean 'train'?"]),
        ("train.num_steps=3.5", ["train.num_steps=3.5: wanted a whole number like 40"]),
        ("train.num_steps=-3", ["num_steps=-3 must not be negative"]),
        ("train.tokens=1000", ["num_steps=40 and tokens=1000: set one of them"]),
        (
            "train.batch_tokens=0",
            ["num_steps=40 needs batch_tokens", "leave both open"],
        ),
        (
            "train.batch_tokens=96",
            ["=96 is 3 rows of 32", "8 devices", "--config.train.batch_tokens=256"],
        ),
        ("train.batch_tokens=100", ["=100 is not a multiple of seq_tokens=32"]),
        ("train.micro_rows=3", ["micro_rows=3 must divide the 8 rows", "0 derives"]),
        ("train.remat=mlp_gat", ["'mlp_gat' is not an act", "did you mean 'mlp_gate'"]),
        ("mesh.data=3", ["needs 3 devices, 8 are here", "set one of --config.mesh"]),
        ("mesh.tensor=3", ["8 devices are not a multiple of 3", "--config.mesh.*"]),
        ("rules.embed=tensor", ["on one mesh axis twice", "--config.rules"]),
        ("rules.embed=tenser", ["'tenser'; did you mean 'tensor'?"]),
        ("model.reduce_dtype=bfloat16", ["'bfloat16': wanted compute or float32"]),
        (
            "mesh.context=3",
            ["8 devices are not a multiple of 3"],
        ),
        (
            ["mesh.context=4", "data.seq_tokens=36"],
            ["=36 over mesh.context=4", "multiple of 8", "data.seq_tokens=32"],
        ),
        (
            ["mesh.context=2", "train.chunk_tokens=8"],
            ["train.chunk_tokens=8 and mesh.context=2", "--config.mesh.context=1"],
        ),
        (
            ["mesh.context=2", "model.mtp_layers=1", "train.mtp_coef=0.3"],
            ["the 1 layers for further tokens", "--config.train.mtp_coef=0"],
        ),
        (
            ["mesh.context=2", "rules.tokens=None"],
            ["mesh.context=2 and rules.tokens=None", "--config.rules.tokens=context"],
        ),
        (
            ["mesh.context=2", "rules.tokens=('context','data')"],
            ["rules.batch both lie on data", "--config.rules.tokens=context"],
        ),
        (
            "rules.context_attention=rnig",
            ["context_attention='rnig'; did you mean 'ring'?"],
        ),
        ("rules.layers=data", ["rules.layers='data'", "--config.rules.layers=None"]),
        ("mesh.stage=2", ["=2 and rules.layers=None", "--config.rules.layers=stage"]),
        ("train.stage_parts=2", ["=2 is of a pipeline, and mesh.stage=1: set one of"]),
        ("data.seq_tokens=256", ["=256 passes model.max_positions=128; set one"]),
        (
            "data.vocab_size=512",
            ["512 ids do not fit", "--config.model.vocab_size=512"],
        ),
        (
            "data.tokenizer=/nowhere",
            ["no tokenizer at '/nowhere': wanted a tokenizer."],
        ),
        ("data.holdout_share=2", ["holdout_share=2.0: wanted a share from 0 to 1"]),
        ("model.num_kv_heads=3", ["num_heads=8 must be a multiple of num_kv_heads=3"]),
        ("model.head_width=5", ["head_width=5 must be even"]),
        (
            "model.qk_norm=false",
            ["of a qwen3", "qk_norm is False, there True", "--config.export=false"],
        ),
        ("model.family=qwen4", ["'qwen4' has no published form; did you mean"]),
        ("model.attention=splash", ["needs a TPU, this is cpu", "attention=blockwise"]),
        ("model.attention=flash", ["attention='flash'; did you mean 'splash'?"]),
        ("model.base=qwen3-9b", ["model 'qwen3-9b'; did you mean 'qwen3"]),
        ("optim.name=adam", ["name='adam' is not known; did you mean 'adamw'?"]),
        ("optim.lr_peak=fast", ["optim.lr_peak=fast: wanted a value like 0.003"]),
        ("log.trackers=['wandbb']", ["tracker 'wandbb' is not known; known: tensor"]),
        ("checkpoint.keep=0", ["checkpoint.keep=0", "at least 1"]),
    ],
)
def test_a_field_that_does_not_fit(refused, workdir, data, more, told):
    flags = [f"--config.{one}" for one in ([more] if isinstance(more, str) else more)]
    err = refused(*runs.words(workdir, data, *flags, arg="adamw"))
    assert all(part in err for part in told), err


def test_float32_sums_over_axes_that_the_rows_do_not_lie_on(refused, workdir, data):
    more = ["--config.model.reduce_dtype=float32", "--config.rules.batch=('data',)"]
    err = refused(*runs.words(workdir, data, *more, arg="adamw"))
    assert (
        "needs the axes of rules.embed among those of rules.batch, fsdp is not" in err
    )
    assert "--config.model.reduce_dtype=compute" in err


@pytest.mark.parametrize(
    "more, told",
    [
        ("train.stage_parts=2", "2 layers on 2 stages x 2 parts: wanted a multiple"),
        (
            "train.chunk_tokens=16 --config.train.stage_parts=2",
            "train.stage_parts=2 with chunks",
        ),
        ("mesh.expert=2", "mesh.fsdp=2 and mesh.expert=2: one of them at a time"),
        ("model.reduce_dtype=float32", "mesh.stage=2 and model.reduce_dtype=float32"),
        ("model.mtp_layers=1", "layers for further tokens, which no stage has; set"),
    ],
)
def test_what_no_stage_takes(refused, workdir, data, more, told):
    staged = ["--config.mesh.stage=2", "--config.rules.layers=stage"]
    staged += ["--config.mesh.fsdp=2", "--config.export=false"]
    staged += f"--config.{more}".split()
    assert told in refused(*runs.words(workdir, data, *staged, arg="adamw"))


def test_heads_that_the_tensor_axis_does_not_divide(refused, workdir, data):
    heads = ["--config.model.num_heads=6", "--config.model.num_kv_heads=6"]
    more = [*heads, "--config.mesh.tensor=4"]
    err = refused(*runs.words(workdir, data, *more, arg="adamw"))
    assert "dim 'kv_heads' of 6 is not divisible by mesh axis tensor of 4" in err
    assert "choose --config.mesh.tensor that divides 6" in err


@pytest.mark.parametrize(
    "more, told",
    [
        (
            "--worker=3",
            "unknown flag --worker of qwen-jax run; did you mean --workdir?",
        ),
        (f"--config={runs.EXPERIMENT.parent}/tinny.py", "did you mean 'tiny.py'?"),
        ("--config=nowhere/x.py", "experiment file 'nowhere/x.py' does not exist"),
        (f"--config={runs.ROOT}/setup.cfg", "setup.cfg: it is not a Python file"),
        ("--exit_code_when_stopped=256", "_stopped 256: wanted a number from 0 to 255"),
        ("--data=/nowhere/corpus", "data path '/nowhere/corpus' does not exist"),
        ("--workdir=", "--workdir is needed: the folder of this run"),
        ("--config.train.init_from=/nowhere", "model folder '/nowhere' does not exist"),
        ("--config.data.cache_dir=/proc/x", "cannot write the data cache '/proc/x'"),
    ],
)
def test_a_path_or_flag_that_is_not_there(refused, workdir, data, more, told):
    assert told in refused(*runs.words(workdir, data, more, arg="adamw"))


# --- text ---


@pytest.mark.parametrize(
    "files, told",
    [
        ({}, "no file to read under '{}' (0 left out"),
        ({".hidden": "a a", "x.png": "a a"}, "no file to read under '{}' (2 left out"),
        ({"a.jsonl": ""}, "the 1 files under '{}' hold no record"),
    ],
)
def test_a_corpus_without_documents(refused, workdir, data, tmp_path, files, told):
    folder = tmp_path / "empty"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    words = runs.words(workdir, data, f"--data={folder}", arg="adamw")
    assert told.format(folder) in refused(*words)


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.txt", " \n\n", "in 1 records of the corpus ({'empty_file': 1})"),
        ("a.txt", "\0\1", "in 1 records of the corpus ({'binary': 1})"),
        ("a.jsonl", '{"body": "a b"}\n{\n', "({'missing_field': 1, 'bad_json': 1})"),
    ],
)
def test_a_corpus_without_text(refused, workdir, data, tmp_path, name, text, told):
    """Found while the vocabulary is learnt, beside which the program compiles."""
    folder = tmp_path / "blank"
    folder.mkdir()
    (folder / name).write_text(text)
    words = runs.words(workdir, data, f"--data={folder}", arg="adamw")
    err = refused(*words, compiles=1)
    assert told in err and "look at text_field, holdout_share and the files" in err


def test_a_near_name_of_the_data_is_told(refused, workdir, data):
    words = runs.words(workdir, data, f"--data={data.parent / 'corpsu'}", arg="adamw")
    assert "corpsu' does not exist; did you mean 'corpus'?" in refused(*words)


def test_another_tokenizer_after_one_that_was_too_large(
    refused, workdir, data, tmp_path
):
    """What was refused leaves nothing behind that the next try would take."""
    texts = [" ".join(runs.WORDS)] * 9
    for size in (330, 310):
        tokenizer.train(texts, size).save(tmp_path / str(size))
    given = "--config.data.tokenizer="
    words = runs.words(workdir, data, f"{given}{tmp_path / '330'}")
    err = refused(*words, writes=["tokenizer"])
    assert "has 330 ids, the model's vocabulary 320" in err
    assert "--config.model.vocab_size=330 or another tokenizer" in err
    for folder in (workdir / "tokenizer", workdir / "tokenizer" / "tokenizer.json"):
        assert "has 330 ids" in refused(*runs.words(workdir, data, given + str(folder)))
    words = runs.words(workdir, data, f"{given}{tmp_path / '310'}")
    assert cli.main([*words, "--config.sample.max_tokens=200"]) == 2
    assert tokenizer.load(workdir / "tokenizer").vocab_size == 310


# --- folders and disks ---


def test_a_folder_that_cannot_be_one(refused, workdir, data):
    file = workdir / "notes" / "mine.txt"
    for path, told in (
        (file, "it is a file, not a folder: choose another --workdir"),
        (file / "run", "a part of the path is a file: choose another --workdir"),
        ("/proc/run", "choose another --workdir"),
    ):
        err = refused(*runs.words(path, data, arg="adamw"))
        assert f"error: cannot write into {path}: " in err and told in err


def test_a_read_only_disk(refused, workdir, data, tmp_path):
    """Root may write anywhere else, so a read-only mount is the honest test."""
    folder = tmp_path / "ro"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a read-only tmpfs needs root")
    try:
        err = refused(*runs.words(folder / "run", data, arg="adamw"))
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    assert "Read-only file system; it lies on a read-only file system: choose" in err


def test_a_disk_that_is_full_at_the_start(refused, workdir, data, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.tempfile, "mkstemp", full)
    err = refused(*runs.words(workdir, data, arg="adamw"))
    assert f"cannot write into {workdir}: No space left" in err
    assert "the disk is full: free some space" in err


def test_a_disk_that_gets_full_costs_no_checkpoint(data, tmp_path, monkeypatch, capsys):
    """The second save finds too little space; with space the run goes on from the
    first."""
    real, calls = shutil.disk_usage, []

    def usage(path):
        calls.append(path)
        return real(path)._replace(free=12_345) if len(calls) > 1 else real(path)

    monkeypatch.setattr(saving.shutil, "disk_usage", usage)
    lean = ["sample.every_steps=0", "eval.every_steps=0", "export=false"]
    words = runs.words(tmp_path / "run", data, "--config.train.num_steps=6")
    words += [f"--config.{one}" for one in lean]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "error: checkpoint of step 6 was not saved: it needs " in err
    assert "12,345 are free" in err and "free some space" in err
    assert "qwen-jax run --config" in err and "Traceback" not in err
    assert runs.finished(tmp_path / "run") == [3]
    kept = runs.steps_made(tmp_path / "run")
    monkeypatch.setattr(saving.shutil, "disk_usage", real)
    assert cli.main(words) == 0
    assert "after step 3" in capsys.readouterr().out
    assert runs.finished(tmp_path / "run") == [3, 6]
    assert runs.steps_made(tmp_path / "run") == kept


# --- model folders ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A model folder of random weights with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "export"
    exp = experiment.resolve(str(runs.EXPERIMENT), [], str(data))
    vocabulary = tokenizer.train([" ".join(runs.WORDS)] * 9, 310)
    export.write(exp.model, models.init(exp.model), vocabulary, folder)
    return folder


def no_config(folder):
    (folder / "config.json").unlink()


def no_json(folder):
    (folder / "config.json").write_text("{")


def other_family(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "qwen33"}))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def a_list(folder):
    (folder / "config.json").write_text("[1]")


def no_sizes(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["hidden_size"]
    raw["num_hidden_layers"] = "two"
    (folder / "config.json").write_text(json.dumps(raw))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def changed(change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    return damage


NAME = "model.layers.1.mlp.up_proj.weight"
# What is wrong -> what is told.
DAMAGE = {
    "no config.json": (no_config, "has no config.json: wanted a Hugging Face"),
    "no JSON": (no_json, "config.json is not JSON"),
    "a list": (a_list, "config.json holds no JSON object"),
    "no sizes": (no_sizes, "config.json: num_hidden_layers='two': wanted a whole"),
    "other family": (other_family, "'qwen33' in config.json is not supported; d"),
    "no weights": (no_weights, "has no *.safetensors files"),
    "truncated": (cut, "model.safetensors cannot be read as safetensors"),
    "missing": (changed(lambda x: x.pop(NAME)), f"no tensor '{NAME}'; did you"),
    "surplus": (
        changed(lambda x: x.update(extra=np.zeros(1))),
        "1 tensors belong to no weight of a qwen3 model: 'extra'",
    ),
    "misshapen": (
        changed(lambda x: x.update({NAME: x[NAME][:, :-1]})),
        "has shape (64, 31), its config.json wants (64, 32)",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_model_folder_that_is_not_whole(refused, workdir, data, whole, tmp_path, how):
    damage, told = DAMAGE[how]
    folder = shutil.copytree(whole, tmp_path / "model")
    damage(folder)
    assert told in refused("generate", f"--model={folder}", "--prompt=the")
    words = runs.words(workdir, data, f"--config.train.init_from={folder}", arg="adamw")
    assert told in refused(*words)  # before anything is compiled or written


def test_the_model_of_another_run(refused, workdir, data, whole):
    more = [f"--config.train.init_from={whole}", "--config.model.ffn_width=32"]
    err = refused(*runs.words(workdir, data, *more, arg="adamw"))
    assert "is not the model of this run: ffn_width is 64 there, 32 here; set" in err


def test_a_model_to_begin_with_that_has_no_tokenizer(
    refused, workdir, data, whole, tmp_path
):
    """One that is learnt here would give its embeddings other words."""
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    words = runs.words(workdir, data, f"--config.train.init_from={folder}")
    for verb in (["run"], ["data", "preview"]):
        err = refused(*verb, *words[1:])
        assert f"train.init_from={folder} has no tokenizer.json" in err
        assert "set --config.data.tokenizer to the tokenizer that" in err


@pytest.mark.parametrize(
    "more, told",
    [
        (["--prompt=x", "--dtype=flaot32"], "--dtype 'flaot32'; did you mean 'float32"),
        ([], "nothing to continue: give --prompt TEXT"),
        (["--prompt=x", "--top_p=0"], "--top_p=0.0: wanted a number above 0"),
        (["--prompt=x", "--temperature=-1"], "--temperature=-1.0: wanted a number"),
        (["--prompt=x", "--top_k=-7"], "--top_k=-7: wanted a whole number, 0 for all"),
        (["--prompt=x", f"--seed={2**70}"], "--seed=1180591620717411303424: wanted a"),
        (["--prompt=x", "--stop="], "stop text '': wanted 1 to 256 letters"),
        (["--prompt=x", "--max_tokens=0"], "max_tokens=0: wanted at least 1"),
        (["--prompt=x", "--max_tokens=999"], "pass the model's 128 positions; shorten"),
        (["--prompt_file=/nowhere"], "--prompt_file /nowhere: No such file or dir"),
        (["--prompt_file=/proc/self/mem"], "--prompt_file /proc/self/mem: "),
    ],
)
def test_what_cannot_be_generated(refused, whole, more, told):
    assert told in refused("generate", f"--model={whole}", *more)


def test_a_prompt_file_that_is_no_text(refused, whole, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    words = ["generate", f"--model={whole}", f"--prompt_file={tmp_path / 'x.bin'}"]
    assert "x.bin: it is not UTF-8 text" in refused(*words)


def test_a_model_folder_without_a_tokenizer(refused, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    err = refused("generate", f"--model={folder}", "--prompt=x")
    assert f"no tokenizer at '{folder}': wanted a tokenizer.json" in err


def test_a_run_folder_is_no_model_folder(refused, workdir):
    (workdir / "run.json").write_text("{}")
    err = refused("generate", f"--model={workdir}", "--prompt=x")
    assert f"give --model {workdir}/export, or make a model" in err
