# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax pull` against a stand-in for the hub, with its real client library."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

from qwen_jax import cli, config, models, pull
from qwen_jax.models import spec as spec_lib
from tests import hub_server, runs

pytest.importorskip("huggingface_hub")

REPO = "Org/Tiny-0.1"
SPEC = spec_lib.Spec(
    vocab_size=512,
    width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    ffn_width=96,
)
CODE = b"raise SystemExit('code of a model folder was run')"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: bytes} of a model's repository, with what must stay there."""
    folder = tmp_path_factory.mktemp("made")
    models.save(SPEC, models.init(SPEC, 3), folder, shard_bytes=200_000)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    made |= {
        "tokenizer.json": b'{"model": {}}',
        "chat_template.jinja": b"{{ messages }}",
        "merges.txt": b"a b\n",
        "README.md": b"words",
        "modeling_tiny.py": CODE,
        "pytorch_model.bin": b"\x80\x04.",
        "model.pt": b"\x80\x04.",
        "onnx/config.json": b"{}",
        "tiny.gguf": b"GGUF",
    }
    return made


@pytest.fixture
def hub(files, monkeypatch):
    with hub_server.serving(REPO, files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def call(*words):
    return cli.main(["pull", *map(str, words)])


def refused(capsys, *words):
    assert call(*words) == 2
    err = capsys.readouterr().err
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    return line


def brought(files):
    return sorted(
        name
        for name in files
        if name.endswith((".safetensors", ".json", ".jinja", ".txt"))
        and "/" not in name
    )


def test_a_model_comes_whole_at_a_commit_and_loads(hub, files, tmp_path, capsys):
    folder = tmp_path / "model"
    assert call(f"{REPO}@main", folder) == 0
    out = capsys.readouterr().out
    assert f"{REPO} at commit {hub_server.COMMIT}" in out
    found = sorted(path.name for path in folder.iterdir())
    assert found == sorted([*brought(files), "source.json"])
    for name in brought(files):
        assert (folder / name).read_bytes() == files[name]
    told = json.loads((folder / "source.json").read_text())
    assert (told["repo"], told["revision"]) == (REPO, "main")
    assert told["commit"] == hub_server.COMMIT and told["endpoint"] == hub.url
    digests = {name: one["sha256"] for name, one in told["files"].items()}
    assert digests == {
        name: hashlib.sha256(files[name]).hexdigest() for name in brought(files)
    }
    # Every file was asked for at the commit, not at the branch, which may move.
    assert all("/main/" not in path for _, path, _ in hub.asked)
    spec, weights = models.load(folder)
    assert (spec.width, spec.num_layers) == (64, 2)
    jax.tree.map(np.testing.assert_array_equal, weights, models.init(SPEC, 3))


def test_a_folder_is_checked_again(hub, files, tmp_path, capsys):
    folder = tmp_path / "model"
    assert call(REPO, folder) == 0
    assert call("--verify", folder) == 0
    assert f"files are as they came from {REPO}" in capsys.readouterr().out
    path = folder / "merges.txt"
    path.write_bytes(b"a c\n")  # of the same size
    (folder / "tokenizer.json").unlink()
    assert call("--verify", folder) == 1
    out = capsys.readouterr().out
    assert "merges.txt: changed" in out and "tokenizer.json: missing" in out
    assert f"`qwen-jax pull {REPO}@{hub_server.COMMIT} {folder}` brings them" in out
    hub.asked.clear()
    assert call(f"{REPO}@{hub_server.COMMIT}", folder) == 0
    assert path.read_bytes() == files["merges.txt"]
    got = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET"}
    assert got & set(files) == {"merges.txt", "tokenizer.json"}  # and nothing else
    assert call("--verify", folder) == 0


def test_a_file_changed_on_the_way_is_brought_again(hub, files, tmp_path, capsys):
    name = "model-00001-of-00002.safetensors"
    assert name in files
    hub.corrupt[name] = 1
    assert call(REPO, tmp_path / "model") == 0
    assert f"{name} is not what the hub tells" in capsys.readouterr().err
    assert (tmp_path / "model" / name).read_bytes() == files[name]


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "merges.txt"])
def test_a_file_that_stays_changed_is_refused_and_removed(hub, name, tmp_path, capsys):
    hub.corrupt[name] = 9
    told = refused(capsys, REPO, tmp_path / "model")
    assert f"{name} of {REPO} came twice otherwise" in told
    assert not (tmp_path / "model" / name).exists()
    assert not (tmp_path / "model" / "source.json").exists()
    assert "a pull was begun here" in refused(capsys, "--verify", tmp_path / "model")


def test_what_broke_off_goes_on_where_it_was(hub, files, tmp_path, capsys, monkeypatch):
    name = "model-00001-of-00002.safetensors"
    monkeypatch.setattr("time.sleep", lambda _: None)
    # The client keeps whole chunks of what came, 10 MB each.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8192)
    hub.broken[name] = 1  # the client itself tries again
    assert call(REPO, tmp_path / "one") == 0
    assert (tmp_path / "one" / name).read_bytes() == files[name]
    assert any(span.startswith("bytes=") for *_, span in hub.asked)
    hub.broken[name] = 99
    told = refused(capsys, REPO, tmp_path / "two")
    assert "check the network" in told and "HF_ENDPOINT" in told
    hub.broken.clear()
    hub.asked.clear()
    assert call(REPO, tmp_path / "two") == 0
    assert (tmp_path / "two" / name).read_bytes() == files[name]
    got = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET"}
    assert got & set(files) == {name}  # the others were here
    assert call("--verify", tmp_path / "two") == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ((404, "RepoNotFound"), "has no repository 'Org/Tiny-0.1'"),
        ((404, "RevisionNotFound"), "has no revision 'v9'"),
        ((403, "GatedRepo"), "is gated: accept its conditions at"),
        ((500, ""), "check the network, or set HF_ENDPOINT"),
    ],
)
def test_what_the_hub_refuses_is_told(hub, tmp_path, capsys, error, words):
    hub.error = error
    assert words in refused(capsys, f"{REPO}@v9", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_network_is_told(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{runs.free_port()}")
    told = refused(capsys, REPO, tmp_path / "model")
    assert "check the network, or set HF_ENDPOINT" in told


def test_a_full_disk_is_told_before_anything_comes(hub, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    told = refused(capsys, REPO, tmp_path / "model")
    assert "are to come and 1.0 kB are free: free some space" in told
    assert not [path for method, path, _ in hub.asked if "/resolve/" in path]


def test_a_folder_of_something_else_is_left_alone(hub, tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    assert "holds something else" in refused(capsys, REPO, tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"
    assert "is a file" in refused(capsys, REPO, tmp_path / "config.json")
    assert call(REPO, tmp_path / "model") == 0
    assert "holds 'Org/Tiny-0.1'" in refused(capsys, "Org/Other", tmp_path / "model")


def test_other_files_may_be_asked_for_but_no_code(hub, tmp_path, capsys):
    folder = tmp_path / "model"
    assert call(REPO, folder, "--include=*.gguf", "--include=*.md") == 0
    assert {p.name for p in folder.iterdir()} == {
        "tiny.gguf",
        "README.md",
        "source.json",
    }
    for pattern in ("*.py", "pytorch_model.bin", "*.PT".lower()):
        told = refused(capsys, REPO, folder, f"--include={pattern}")
        assert "files that can run code are never brought" in told
    assert call(REPO, folder, "--include=*") == 0  # all but those
    assert not list(folder.glob("*.py")) and not list(folder.glob("*.bin"))
    assert (folder / "onnx" / "config.json").is_file()
    told = refused(capsys, REPO, tmp_path / "none", "--include=*.xyz")
    assert "no file that matches *.xyz" in told


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a/../../x.json", "..\\x.json", "-x/\n.json"]
)
def test_a_name_that_leaves_the_folder_is_refused(name):
    with pytest.raises(config.InputError, match="names a file"):
        pull.choose([pull.File(name, 1)], ("*",))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["Tiny", "DIR"], "'Tiny' names no repository"),
        (["../x", "DIR"], "names no repository"),
        (["a/b/c", "DIR"], "names no repository"),
        (["Org/Tiny"], "wanted REPO[@REVISION] and DIR"),
        (["Org/Tiny", "DIR", "--verify=DIR"], "stands alone"),
        (["Org/Tiny", "DIR", "--source=hbu"], "did you mean 'hub'"),
        (["--verify=/nowhere"], "/nowhere has no source.json"),
    ],
)
def test_words_that_do_not_fit_are_told(capsys, words, told):
    assert told in refused(capsys, *words)


def test_a_missing_client_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    told = refused(capsys, REPO, tmp_path / "model")
    assert "pip install 'qwen_jax[hub]'" in told
