# SPDX-License-Identifier: Apache-2.0
"""Models and weights are exchanged while clients are answered: POST /admin/load.

The oracle: a folder's answer by an engine that has no other weights, and the
fingerprint that goes with each answer.
"""

import json
import pathlib
import threading

import httpx
import pytest

from qwen_jax import config, export, models, serving, talk
from qwen_jax.data import tokenizer
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import admin, device, engine, gate, http, listening
from qwen_jax.serve import served as served_lib
from tests.serve import servers

KEY = "sk-admin-0123456789"
PROMPT = "def load(fp, *, cls=None):"


def folder_of(path, words, seed, width=32):
    spec = spec_lib.Spec(
        vocab_size=words.vocab_size,
        width=width,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_width=16,
        ffn_width=48,
        max_positions=256,
        init_std=0.5,
    )
    export.write(spec, models.init(spec, seed), words, path)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two with weights of one model, and one with another model."""
    words = tokenizer.train([pathlib.Path(json.__file__).read_text()], 400)
    top = tmp_path_factory.mktemp("admin")
    return {
        "one": folder_of(top / "one", words, 0),
        "two": folder_of(top / "two", words, 1),
        "wide": folder_of(top / "wide", words, 0, width=64),
    }


def make_engine(model: talk.Model) -> engine.Engine:
    settings = device.Settings(rows=1, max_tokens=192, piece=64)
    return engine.Engine(
        model.spec, model.params, model.tokenizer, settings=settings, stop_ids=()
    )


class Place:
    """A server with an admin's port: `ask` for an answer, `load` a folder."""

    def __init__(self, models_, port, admin_port):
        self.models, self.port, self.admin_port = models_, port, admin_port

    def ask(self, name="m", max_tokens=24):
        body = {"model": name, "prompt": PROMPT, "max_tokens": max_tokens}
        body |= {"temperature": 0, "logit_bias": None}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        told = httpx.post(url, json=body, timeout=60)
        assert told.status_code == 200, told.text
        return told.json()["choices"][0]["text"], told.json()["system_fingerprint"]

    def load(self, name, path, key=KEY, **more):
        return httpx.post(
            f"http://127.0.0.1:{self.admin_port}/admin/load",
            json={"model": name, "path": path} | more,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=120,
        )


@pytest.fixture()
def place(folders):
    registry = served_lib.Models()
    loader = serving.Loader(registry, make_engine, "float32")
    app = http.App(registry)
    sockets = [listening.listen("127.0.0.1", 0) for _ in range(2)]
    ports = [one.getsockname()[1] for one in sockets]
    app.admin = admin.Admin(ports[1], gate.Keys([KEY]), loader.load)
    server = listening.server(app)
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    loader.load("m", folders["one"])
    yield Place(registry, *ports)
    server.should_exit = True
    thread.join(10)
    loader.close()
    for one in sockets:
        one.close()


def test_weights_and_models_are_exchanged_under_traffic(place, folders, monkeypatch):
    """Every answer is whole, and of the weights that its fingerprint names."""
    monkeypatch.setattr(serving, "GRACE_S", 0.2)
    answers, stop = [], threading.Event()

    def client():
        while not stop.is_set():
            answers.append(place.ask())

    wanted = {}
    text, mark = place.ask()
    wanted[mark] = text
    first_engine = place.models.get("m").engine
    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    hows = []
    for name in ("two", "one", "wide", "two"):
        told = place.load("m", folders[name])
        assert told.status_code == 200, told.text
        assert set(told.json()) == {"model", "version", "how", "seconds"}
        hows.append(told.json()["how"])
        text, mark = place.ask()
        assert wanted.setdefault(mark, text) == text
    stop.set()
    for one in clients:
        one.join(60)
    # The same folder has the same fingerprint again: three models in all.
    assert hows == ["weights", "weights", "engine", "engine"]
    assert len(wanted) == 3 and len(set(wanted.values())) == 3
    assert len(answers) > 8 and {mark for _, mark in answers} == set(wanted)
    assert all(wanted[mark] == text for text, mark in answers)
    # The engine that lost its name has ended; a name of its own gets one beside.
    with pytest.raises(engine.Closed):
        for _ in range(200):
            first_engine.swap(models.init(first_engine.spec, 3))
            threading.Event().wait(0.05)
    assert place.load("n", folders["one"]).json()["how"] == "engine"
    assert place.ask("n")[0] == place.ask("n")[0] != place.ask("m")[0]


def test_who_may_and_what_can_be(place, folders):
    for key in (None, "sk-wrong-0123456789"):
        assert place.load("m", folders["two"], key).status_code == 401
    for told, status, param, code in (
        (place.load("m", "/no/such/folder"), 400, "path", "invalid_value"),
        (place.load("a b", folders["two"]), 400, "model", "invalid_value"),
        (place.load("m", folders["two"], wat=1), 400, "wat", "unknown_parameter"),
    ):
        error = told.json()["error"]
        assert (told.status_code, error["param"], error["code"]) == (
            status,
            param,
            code,
        )
    # Neither port has what the other one has.
    headers = {"Authorization": f"Bearer {KEY}"}
    for port, path, status in (
        (place.admin_port, "/v1/models", 404),
        (place.admin_port, "/", 404),
        (place.port, "/admin/load", 404),
    ):
        url = f"http://127.0.0.1:{port}{path}"
        assert httpx.post(url, headers=headers, json={}).status_code == status
    assert place.ask()[1] == place.models.get("m").fingerprint(0)


def test_one_at_a_time(tmp_path):
    begun, go_on, told = threading.Event(), threading.Event(), {}

    def load(name, path):
        begun.set()
        assert go_on.wait(20)
        return {"model": name}

    with servers.running() as one:
        one.app.admin = admin.Admin(one.port, gate.Keys([KEY]), load)
        at = Place(None, one.port, one.port)
        thread = threading.Thread(
            target=lambda: told.setdefault("first", at.load("m", "x"))
        )
        thread.start()
        assert begun.wait(20)
        second = at.load("m", "x")
        go_on.set()
        thread.join(20)
    assert (second.status_code, second.json()["error"]["code"]) == (409, "busy")
    assert told["first"].json() == {"model": "m"}


def test_a_version_tells_weights_apart(folders, tmp_path):
    made = {name: serving.version_of(path) for name, path in folders.items()}
    assert len(set(made.values())) == 3
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in pathlib.Path(folders["one"]).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert serving.version_of(str(copy)) == made["one"]
    with pytest.raises(config.InputError, match="no such folder"):
        serving.version_of(str(tmp_path / "none"))
