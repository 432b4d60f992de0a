# SPDX-License-Identifier: Apache-2.0
"""`bench serve --own`: servers in processes of their own, drains, children left."""

import asyncio
import json
import os
import signal
import time

import jax
import pytest

from qwen_jax import cli, config
from qwen_jax.bench import serve, serve_load, serve_own, serve_scenarios
from qwen_jax.data import tokenizer

TINY = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "head_width": 16}
TINY |= {"ffn": 48, "vocab": 320}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights."""
    path = tmp_path_factory.mktemp("own") / "Tiny"
    serve_own.write(path, TINY, 128, 0)
    return path


def test_ids_of_prompts_are_plain_ones(folder, tmp_path):
    words = tokenizer.load(folder)
    assert serve.plain_ids(folder) == words.vocab_size - 26  # Qwen3's special tokens
    assert serve.plain_ids(tmp_path) == 0


def test_a_drain_of_a_process(folder, tmp_path):
    """A fake engine of 0.1 s a token: streams end whole; process and child go."""
    load = serve_load.Work(9, input_tokens=5, output_tokens=10, vocab=290)
    program = ("-m", "tests.serve.serve_fake", "slow")
    own = serve_own.Own(str(folder), tmp_path, ["--shutdown_timeout_s=9"], program)

    async def go():
        client = serve_load.Client(own.url, "Tiny", fields={"ignore_eos": True})
        try:
            how = {"most": 3, "timeout_s": 9.0, "say": lambda text: None}
            return await serve_scenarios.drain(client, load, own, **how)
        finally:
            await client.close()

    try:
        found = asyncio.run(go())
    finally:
        own.close()
    assert [bar["met"] for bar in found["bars"]] == [True] * 4, found
    assert found["streams"] == found["streams_whole"] == 3
    assert (found["after"], found["after_refused"]) == (6, 6)
    assert found["children"] >= 1  # the sandbox of templates
    assert 0.5 < found["exit_s"] < 9  # nine tokens were to come


def test_a_child_that_is_left_is_seen(tmp_path):
    script = "import subprocess, sys, time; print('listening at http://x,'); "
    script += "print(' is ready after ', flush=True); "
    script += "p = subprocess.Popen([sys.executable, '-c', 'input()'], "
    script += "stdin=subprocess.PIPE); print(p.pid, flush=True); time.sleep(60)"
    own = serve_own.Own("", tmp_path, [], ("-c", script))
    until_s = time.monotonic() + 20
    while not own.note_children() and time.monotonic() < until_s:
        time.sleep(0.02)
    (child,) = own._children
    os.kill(child, signal.SIGSTOP)  # it cannot notice that its parent is gone
    own.terminate()
    assert own.wait(10) == -signal.SIGTERM and own.children_left() == 1
    os.kill(child, signal.SIGKILL)
    while own.children_left() and time.monotonic() < until_s:
        time.sleep(0.02)
    assert own.children_left() == 0


def test_a_server_that_does_not_begin_is_told(tmp_path):
    with pytest.raises(config.InputError, match="code 2 before it is ready: .*no such"):
        serve_own.Own(str(tmp_path / "none"), tmp_path, [])


@pytest.mark.slow
def test_a_server_of_random_weights(tmp_path, capsys, monkeypatch):
    """The whole command, with the real engine in a process of its own."""
    cache = jax.config.jax_compilation_cache_dir  # that of the tests
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv(serve_own.KEY, "sk-not-for-children")
    file = tmp_path / "record.json"
    words = [f"--{name}={value}" for name, value in TINY.items()]
    words += ["--num_prompts=12", "--max_concurrency=4", "--input_tokens=20"]
    words += ["--output_tokens=24", f"--json={file}", "--scenario=drain"]
    assert cli.main(["bench", "serve", "--own", *words]) == 0
    record, text = json.loads(file.read_text()), capsys.readouterr().out
    assert record["streams"] >= 1 and "MISSED" not in text, text
