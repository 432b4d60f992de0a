# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax serve` as a process: what it says, whom it lets in, and how it ends."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from qwen_jax import cli, config, export, models, serving
from qwen_jax.data import tokenizer
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import gate
from tests.serve import scripts

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights."""
    path = tmp_path_factory.mktemp("serve") / "Tiny-0.1"
    words = tokenizer.train([pathlib.Path(__file__).read_text()], 500)
    spec = spec_lib.Spec(
        vocab_size=words.vocab_size,
        width=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_width=16,
        ffn_width=48,
        max_positions=300,
    )
    export.write(spec, models.init(spec, 0), words, path)
    return path


class Process:
    def __init__(self, process):
        self.process, self.lines = process, []

    def line(self, pattern):
        """The match of the next line that has the pattern."""
        for text in self.process.stdout:
            self.lines.append(text)
            if found := re.search(pattern, text):
                return found
        raise AssertionError("".join(self.lines))

    def end(self, timeout_s=20):
        """(exit code, seconds it took, the rest of what it said)."""
        begun_s = time.monotonic()
        rest = self.process.communicate(timeout=timeout_s)[0]
        return self.process.returncode, time.monotonic() - begun_s, rest

    def children(self):
        path = pathlib.Path(f"/proc/{self.process.pid}/task")
        return [c for x in path.glob("*/children") for c in x.read_text().split()]


@contextlib.contextmanager
def started(how, *words, **environment):
    command = [sys.executable, "-m", "tests.serve.serve_fake", how, "--port=0", *words]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


def client_of(url, **how):
    how = {"api_key": "k", "max_retries": 0, "timeout": 30} | how
    return openai.OpenAI(base_url=url, **how)


def test_a_server_and_its_end(folder, tmp_path):
    """SIGTERM under load: the stream finishes, the code is 0, no child stays."""
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-test-0123456789\n\n")
    words = (f"--model={folder}", f"--api_key_file={keys}", "--guard")
    with started("slow", *words) as one:
        url = one.line(r"listening at (http://127.0.0.1:\d+/v1), loading Tiny-0.1")[1]
        one.line(r"Tiny-0.1 is ready after \d")
        with client_of(url, api_key="sk-test-0123456789") as client:
            assert [m.id for m in client.models.list().data] == ["Tiny-0.1"]
            assert client.moderations.create(input="hello").model == "rules"
            stream = client.chat.completions.create(
                model="Tiny-0.1", messages=scripts.SAY, stream=True
            )
            text = next(stream).choices[0].delta.content
            children = one.children()
            assert children  # the sandbox of templates
            one.process.send_signal(signal.SIGTERM)
            text += "".join(c.choices[0].delta.content or "" for c in stream)
            assert text == scripts.HELLO
        code, took_s, rest = one.end()
        assert code == 0 and took_s < 2 and rest.endswith("ended\n")
        assert "POST /v1/chat/completions 200" in rest
        assert "sk-test" not in rest + "".join(one.lines)
        assert not any(os.path.exists(f"/proc/{child}") for child in children)


def test_a_full_disk_and_a_hangup(folder):
    """Row 62: what cannot be told or logged keeps nobody from an answer, and a hangup
    ends the server as SIGTERM does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"--model={folder}", f"--port={port}", "--guard_audit=/dev/full"]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.serve_fake", "slow", *words],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""},
            stdout=full,
            stderr=full,
        )
    try:
        url, status = f"http://127.0.0.1:{port}", 0
        while status != 200:
            assert process.poll() is None
            with contextlib.suppress(httpx.TransportError):
                status = httpx.get(f"{url}/ready").status_code
            time.sleep(0.05)
        how = {"model": "Tiny-0.1", "messages": scripts.SAY, "stream": True}
        with client_of(f"{url}/v1") as client:
            stream = client.chat.completions.create(**how)
            text = next(stream).choices[0].delta.content
            # Metrics under load, and the hangup.
            assert "num_requests_running" in httpx.get(f"{url}/metrics").text
            process.send_signal(signal.SIGHUP)
            text += "".join(c.choices[0].delta.content or "" for c in stream)
        assert text == scripts.HELLO
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("second", [False, True])
def test_an_end_that_does_not_wait(folder, second):
    """At the timeout, or at a second signal, streams end with an error frame."""
    timeout_s = 60 if second else 0.5
    words = (f"--model={folder}", f"--shutdown_timeout_s={timeout_s}", "--name=a/b")
    with started("slow", *words) as one:
        url = one.line(r"listening at (\S+),")[1]
        one.line("a/b is ready")
        with client_of(url) as client:
            stream = client.chat.completions.create(
                model="a/b", messages=scripts.SAY, stream=True
            )
            next(stream)
            begun_s = time.monotonic()
            one.process.send_signal(signal.SIGINT)
            if second:
                time.sleep(0.3)
                one.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError) as caught:
                list(stream)
            assert caught.value.code == "draining"
        assert one.end()[0] == 0
        assert time.monotonic() - begun_s < 20  # of the minute that it may wait


def test_while_it_loads(folder):
    """The port answers at once, by the names of this machine alone: a page of another
    site could have its own name lead here (DNS rebinding). A signal ends the server
    although the model never comes."""
    with started("loading", f"--model={folder}") as one:
        url = one.line(r"listening at (\S+),")[1]
        with client_of(url) as client, pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="Tiny-0.1", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (503, "model_loading")
        assert httpx.get(url.replace("/v1", "/health")).status_code == 200
        assert httpx.get(url.replace("/v1", "/ready")).status_code == 503
        port = url.removesuffix("/v1").rpartition(":")[2]
        for host, status in (
            (f"127.0.0.1:{port}", 200),
            (f"LOCALHOST:{port}", 200),
            ("[::1]", 200),
            (f"evil.example:{port}", 400),
            ("127.0.0.1.evil.example", 400),
        ):
            found = httpx.get(url.replace("/v1", "/health"), headers={"Host": host})
            assert found.status_code == status, host
        assert found.json()["error"]["code"] == "invalid_http"
        one.process.send_signal(signal.SIGTERM)
        code, took_s, _ = one.end()
        assert code == 0 and took_s < 2


@pytest.mark.parametrize(
    ("how", "code"), [("input", 2), pytest.param("fault", 1, marks=pytest.mark.slow)]
)
def test_engines_that_cannot_be_made(folder, how, code):
    with started(how, f"--model={folder}") as one:
        got, _, rest = one.end(60)
        assert got == code
        if how == "input":
            assert rest.endswith("error: the model has no weights: give another\n")
        else:
            assert rest.strip().endswith("RuntimeError: broken")


def refused(capsys, *words):
    assert cli.main(["serve", *words]) == 2
    return capsys.readouterr().err


def test_addresses(folder, capsys, monkeypatch):
    """Others are let in with a key or by --insecure alone."""
    monkeypatch.delenv(gate.VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "1.2.3.4"):
        said = refused(capsys, f"--model={folder}", f"--host={host}")
        assert said.startswith(f"error: --host {host} lets other machines in")
        serving.check_address(host, True, False)
        serving.check_address(host, False, True)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        serving.check_address(host, False, False)
    with pytest.raises(config.InputError, match="no address of this machine"):
        serving.check_address("no.such.host.invalid", False, False)


def test_mistakes(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv(gate.VARIABLE, raising=False)
    model = f"--model={folder}"
    near = str(folder)[:-1] + "2"
    assert "did you mean 'Tiny-0.1'?" in refused(capsys, f"--model={near}")
    assert "--name 'a b'" in refused(capsys, model, "--name=a b")
    assert "--port 70000" in refused(capsys, model, "--port=70000")
    assert "--max_queue 0" in refused(capsys, model, "--max_queue=0")
    assert "draft_tokens=0" in refused(capsys, model, "--draft_tokens=0")
    assert "lookup" in refused(capsys, model, "--drafts=lookups")
    assert "--shutdown_timeout_s" in refused(capsys, model, "--shutdown_timeout_s=-1")
    assert "/none" in refused(capsys, model, "--guard_policy=/none")
    assert "--admin_key_file FILE" in refused(capsys, model, "--admin_port=0")
    assert "--admin_key_file /n" in refused(capsys, model, "--admin_key_file=/n")
    assert "did you mean --host?" in refused(capsys, model, "--hosst=x")
    keys = tmp_path / "keys"
    for text, said in (
        ("", "has no key"),
        ("# only a word\n", "has no key"),
        ("short\n", "line 1 of"),
        ("good-key-123\nwith a blank in it\n", "line 2 of"),
        ("schlüssel-123\n", "line 1 of"),
    ):
        keys.write_text(text)
        told = refused(capsys, model, f"--api_key_file={keys}")
        assert said in told and "blank in it" not in told
    assert "cannot be read" in refused(capsys, model, f"--api-key-file={tmp_path}")
    monkeypatch.setenv(gate.VARIABLE, "x")
    assert gate.VARIABLE in refused(capsys, model)


def test_a_port_that_is_taken(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(capsys, f"--model={folder}", f"--port={port}")
    assert f"cannot listen on 127.0.0.1 port {port}" in said and "--port" in said


def test_keys_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(gate.VARIABLE, "from-env-123")
    path = tmp_path / "keys"
    path.write_text("from-file-123\n")
    keys = gate.keys_of(str(path))
    holders = {
        keys.holder(b"Bearer from-env-123"),
        keys.holder(b"bearer from-file-123"),
    }
    assert len(holders) == 2
    for held in (keys, vars(keys)):
        assert "from-env" not in repr(held) and "from-file" not in repr(held)
