# SPDX-License-Identifier: Apache-2.0
"""Whole runs in processes of their own, and what they left: used by several tests."""

import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPERIMENT = pathlib.Path(__file__).with_name("tiny.py")
WORDS = (
    "the some any every one two three model learns reads writes forgets small large "
    "red green blue token tokens row rows of on under before after and or but not"
).split()
# What two equal runs write with equal bytes; the rest of a line is times.
SAME = ("loss", "grad_norm", "lr", "tokens", "bits_per_byte", "skipped_steps", "z_loss")


def corpus(folder, documents=120, seed=0):
    """A folder of one jsonl file of word salad; returns the folder."""
    draw = random.Random(seed)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "words.jsonl").open("w") as file:
        for _ in range(documents):
            words = draw.choices(WORDS, k=draw.randint(5, 60))
            file.write(json.dumps({"text": " ".join(words) + ".\n"}) + "\n")
    return folder


def words(workdir, data, *more, arg="muon"):
    """The words of `qwen-jax run` of the tiny experiment."""
    cache = pathlib.Path(data).parent / "cache"
    return [
        "run",
        f"--config={EXPERIMENT}:{arg}",
        f"--workdir={workdir}",
        f"--data={data}",
        f"--config.data.cache_dir={cache}",
        *more,
    ]


def environment(devices=1):
    """The environment of a run of its own on virtual CPU devices."""
    cache = os.environ.get("QWEN_JAX_TEST_CACHE", "~/.cache/qwen_jax/test-compile")
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": os.path.expanduser(cache),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # so that it does not start twice
    }


def start(arguments, devices=1, **more):
    """`qwen-jax ARGUMENTS` as a process with its output captured."""
    return subprocess.Popen(
        [sys.executable, "-m", "qwen_jax", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(devices) | more,
    )


def finish(process, timeout_s=900):
    """(exit code, standard output, standard error) of a process that ends by itself."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out, err


def run(arguments, devices=1, **more):
    """Start and finish."""
    return finish(start(arguments, devices, **more))


def run_ok(arguments, devices=1, **more):
    """Standard output of a run that must succeed."""
    code, out, err = run(arguments, devices, **more)
    assert code == 0, err
    return out


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_pair(arguments, devices=1, **more):
    """Two processes of one run."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    many = [*arguments, address, "--num_processes=2"]
    return [start([*many, f"--process_id={i}"], devices, **more) for i in range(2)]


def lines(workdir):
    """Whole lines of metrics.jsonl as text."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rows(workdir):
    return [json.loads(line) for line in lines(workdir)]


def events(workdir):
    return [row for row in rows(workdir) if "event" in row]


def steps_made(workdir):
    """[(step, the bytes of its numbers)] in file order, times left out."""
    out = []
    for line in lines(workdir):
        row = json.loads(line)
        if "loss" in row:
            parts = {key: re.search(f'"{key}": ([^,}}]+)', line)[1] for key in SAME}
            out.append((row["step"], parts))
    return out


def losses(workdir):
    """Losses in step order; every step must be there once."""
    made = [row for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in made] == list(range(1, len(made) + 1))
    return [row["loss"] for row in made]


def evaluations(workdir):
    return [row for row in rows(workdir) if "eval_loss" in row]


def files(workdir):
    """Names of all files of a run folder, without what differs by nature."""
    root = pathlib.Path(workdir)
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def contents(workdir):
    """{name: bytes} of all files of a run folder but its lock."""
    root = pathlib.Path(workdir)
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name != "run.lock"
    }


def finished(workdir):
    """Steps whose checkpoint folder is visible."""
    folder = pathlib.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
