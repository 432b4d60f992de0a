# SPDX-License-Identifier: Apache-2.0
"""Twenty steps give the same losses on every mesh, also across a move between two.

The whole of a run but its command line: derived sizes, loader, placement, step and
checkpoints. (Several processes: tests/test_processes.py.)
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from qwen_jax import experiment, prepare
from qwen_jax.checkpoint import manager
from qwen_jax.data import corpus, loader
from qwen_jax.train import state as state_lib
from tests import runs

STEPS = 20
# float32, sums in another order: the bar of the project.
CLOSE = {"rtol": 1e-5}
MESHES = {
    "data 4": (4, 1, 1),
    "fsdp 4": (1, 4, 1),
    "tensor 4": (1, 1, 4),
    "data 2, fsdp 2": (2, 2, 1),
    "data 2, tensor 2": (2, 1, 2),
    "all of 8": (2, 2, 2),
}
EVERY = {  # what only the slow set runs
    "data 8": (8, 1, 1),
    "fsdp 8": (1, 8, 1),
    "tensor 8": (1, 1, 8),
    "fsdp 2, tensor 2": (1, 2, 2),
    "fsdp 4, tensor 2": (1, 4, 2),
    "data 2, fsdp 4": (2, 4, 1),
    "data 4, tensor 2": (4, 1, 2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder of the corpus, the batches of every run here)."""
    folder = tmp_path_factory.mktemp("meshes")
    runs.corpus(folder / "corpus")
    exp = resolved(folder)
    vocabulary = corpus.prepare_tokenizer(exp.data, folder / "tokenizer")
    rows = loader.Loader(exp.data, vocabulary, batch_rows=8, seed=exp.seed)
    batches = list(itertools.islice(rows, STEPS))
    rows.close()
    return folder, batches


def resolved(folder, optimizer="muon", sizes=(1, 1, 1), **more):
    """The frozen experiment on a mesh."""
    overrides = {"data.cache_dir": str(folder / "cache"), **more}
    overrides |= {
        f"mesh.{axis}": str(n)
        for axis, n in zip(("data", "fsdp", "tensor"), sizes, strict=True)
    }
    return experiment.resolve(
        f"{runs.EXPERIMENT}:{optimizer}",
        list(overrides.items()),
        str(folder / "corpus"),
    )


def set_up(exp):
    axes = ("data", "fsdp", "tensor", "context", "stage")
    sizes = [getattr(exp.mesh, axis) for axis in axes]
    return prepare.set_up(exp, jax.devices()[: np.prod(sizes)])


def train(exp, setup, batches, now=None):
    """(state, losses and gradient norms) of a step for each of the batches."""
    place = prepare.placer(
        setup.device_mesh, exp.rules, setup.batch.rows, setup.batch.micro_steps
    )
    step = prepare.compile_step(setup)
    numbers = []
    with jax.set_mesh(setup.device_mesh):
        whole = jax.NamedSharding(setup.device_mesh, jax.P())
        bytes_v = jax.device_put(np.ones(exp.model.vocab_size, np.float32), whole)
        if now is None:
            now = state_lib.create(
                exp.model, setup.tx, setup.device_mesh, exp.rules, exp.seed
            )
        for batch in batches:
            now, metrics = step(now, place(batch), bytes_v)
            numbers.append((metrics["loss"], metrics["grad_norm"]))
    return now, np.array(jax.device_get(numbers), np.float64)


@functools.cache
def _alone(folder, optimizer, batches):
    exp, setup = set_up(resolved(folder, optimizer))
    return train(exp, setup, batches.items)[1]


class Items:
    """A list that can be a key."""

    def __init__(self, items):
        self.items = items


@pytest.fixture(scope="module")
def alone(data):
    """optimizer -> the numbers of one device."""
    folder, batches = data
    items = Items(batches)
    return lambda optimizer: _alone(folder, optimizer, items)


def check(data, alone, optimizer, sizes, **more):
    folder, batches = data
    exp, setup = set_up(resolved(folder, optimizer, sizes, **more))
    _, numbers = train(exp, setup, batches)
    wanted = alone(optimizer)
    assert wanted[0, 0] - wanted[-1, 0] > 1, "nothing was learnt"
    np.testing.assert_allclose(numbers[:, 0], wanted[:, 0], **CLOSE)
    np.testing.assert_allclose(numbers[:, 1], wanted[:, 1], rtol=1e-4)


@pytest.mark.parametrize("name", ["data 2, fsdp 2"])
def test_muon_has_the_same_losses(name, data, alone):
    check(data, alone, "muon", MESHES[name])


@pytest.mark.parametrize("name", ["fsdp 4", "data 2, tensor 2", "all of 8"])
def test_adamw_has_the_same_losses(name, data, alone):
    check(data, alone, "adamw", MESHES[name])


def test_micro_batches_on_a_mesh_have_the_same_losses(data, alone):
    more = {"train.micro_rows": "4", "train.remat": "full"}
    check(data, alone, "adamw", (2, 1, 2), **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ((1, 1, 1), {"mesh.context": "4"}),
        ((1, 2, 1), {"mesh.context": "2", "train.document_mask": "false"}),
        ((2, 1, 2), {"mesh.context": "2", "rules.context_attention": "gather"}),
        (
            (1, 2, 1),
            {
                "mesh.context": "4",
                "rules.embed": "('fsdp', 'context')",
                "train.remat": "dots",
                "train.loop": "unroll",
                "train.micro_rows": "4",
            },
        ),
    ],
)
def test_rows_over_devices_have_the_same_losses(sizes, more, data, alone):
    """Context parallelism: the placer lays tokens out, everything else is as ever."""
    if "train.document_mask" in more:
        folder, batches = data
        mask = {"train.document_mask": "false"}
        exp, setup = set_up(resolved(folder, "adamw", **mask))
        wanted = train(exp, setup, batches)[1]
        assert abs(wanted - alone("adamw")).max() > 1e-3
        check(data, lambda optimizer: wanted, "adamw", sizes, **more)
    else:
        check(data, alone, "adamw", sizes, **more)


@pytest.mark.parametrize(
    ("optimizer", "sizes"),
    [("muon", (2, 1, 1)), pytest.param("adamw", (1, 2, 2), marks=pytest.mark.slow)],
)
def test_stages_have_the_same_losses(optimizer, sizes, data, alone):
    more = {"mesh.stage": "2", "rules.layers": "stage"}
    check(data, alone, optimizer, sizes, **more)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", {**MESHES, **EVERY})
def test_every_mesh_has_the_same_losses(name, optimizer, data, alone):
    check(data, alone, optimizer, (MESHES | EVERY)[name])


@pytest.mark.parametrize(
    "optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"]
)
def test_a_run_that_moves_between_meshes_has_the_same_losses(
    optimizer, data, alone, tmp_path
):
    folder, batches = data
    exp, setup = set_up(resolved(folder, optimizer, (2, 2, 1)))
    now, first = train(exp, setup, batches[:10])
    with manager.Manager(tmp_path) as checkpoints:
        checkpoints.save(10, now, {}, wait=True)
    exp, setup = set_up(resolved(folder, optimizer, (1, 1, 4)))
    with manager.Manager(tmp_path) as checkpoints:
        target = state_lib.abstract(exp.model, setup.tx, setup.device_mesh, exp.rules)
        moved, _ = checkpoints.restore(target)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(now), strict=True):
        np.testing.assert_array_equal(a, b)
    _, rest = train(exp, setup, batches[10:], moved)
    numbers = np.concatenate([first, rest])
    np.testing.assert_allclose(numbers[:, 0], alone(optimizer)[:, 0], **CLOSE)
