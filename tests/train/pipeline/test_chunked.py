# SPDX-License-Identifier: Apache-2.0
"""Chunks through stages give what `chunkflow.value_and_grad` gives."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax import params as params_lib
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import bubbles, chunkflow, pipeline
from qwen_jax.train.chunkflow import gradients
from qwen_jax.train.pipeline import chunked, ticks

DENSE = spec_lib.Spec(
    vocab_size=48,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=24,
    max_positions=128,
    init_std=0.3,
    param_dtype="float64",
    compute_dtype="float64",
)
SPECS = {
    "dense": DENSE,
    "window": dataclasses.replace(DENSE, window=5, tie_embedding=False),
    "moe": dataclasses.replace(
        DENSE,
        moe=spec_lib.MoE(
            num_experts=4, experts_per_token=2, ffn_width=12, balance_coef=0.1
        ),
    ),
    "hybrid": dataclasses.replace(
        DENSE,
        mixers=("delta", "delta", "attention"),
        delta=spec_lib.Delta(
            key_heads=2, value_heads=4, key_width=8, value_width=8, conv_taps=4
        ),
    ),
}
LENGTHS = [3, 41, 8, 17, 2, 7, 1, 16]  # chunks of 6, 3, 2, and three of short ones
SLOW = pytest.mark.slow


def draw(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 48, n) for n in lengths]


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        off, scale = np.max(np.abs(x - y)), np.max(np.abs(y))
        assert off <= 1e-12 * scale, (jax.tree_util.keystr(path), off, scale)


@pytest.mark.parametrize(
    ("name", "layers", "stages", "live", "lengths"),
    [
        ("dense", 2, 2, 1, [3, 25, 7, 1]),
        pytest.param("dense", 2, 2, 2, [25], marks=SLOW),
        pytest.param("dense", 2, 2, 1, LENGTHS, marks=SLOW),
        pytest.param("dense", 4, 4, 2, LENGTHS, marks=SLOW),
        pytest.param("dense", 4, 4, 1, [25], marks=SLOW),
        pytest.param("dense", 2, 2, 9, LENGTHS, marks=SLOW),
        pytest.param("window", 4, 2, 2, LENGTHS, marks=SLOW),
        pytest.param("moe", 2, 2, 2, LENGTHS, marks=SLOW),
        pytest.param("moe", 4, 4, 1, LENGTHS, marks=SLOW),
        pytest.param("hybrid", 6, 2, 1, LENGTHS, marks=SLOW),
        pytest.param("hybrid", 6, 2, 2, [41, 17], marks=SLOW),
        pytest.param("dense", 2, 2, 1, [3, 8, 2], marks=SLOW),  # no group
    ],
)
def test_as_chunkflow_on_one_device(name, layers, stages, live, lengths):
    with jax.enable_x64(True):
        spec = dataclasses.replace(SPECS[name], num_layers=layers)
        params, documents = models.init(spec, 1), draw(lengths)
        how = {"chunk_tokens": 8, "live_chunks": live, "z_coef": 0.02}
        how["router_losses"] = name == "moe"
        want = chunkflow.value_and_grad(spec, params, documents, **how)
        got = pipeline.chunked_value_and_grad(
            spec, params, documents, stages=stages, **how
        )
        assert_same(got, want)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe", "hybrid"])
def test_beside_other_axes(name):
    with jax.enable_x64(True):
        spec = dataclasses.replace(SPECS[name], num_layers=6)
        params, documents = models.init(spec, 1), draw([*LENGTHS, 30, 12])
        how = {"chunk_tokens": 8, "live_chunks": 2, "router_losses": name == "moe"}
        want = chunkflow.value_and_grad(spec, params, documents, **how)
        on = mesh.make(mesh.MeshConfig(data=2, tensor=2, stage=2))
        rules = mesh.Rules(layers="stage")
        laid = params_lib.shardings(decoder.decoder_params(spec), on, rules)
        laid = jax.tree.map(jax.device_put, params, laid)
        with jax.set_mesh(on):
            got = pipeline.chunked_value_and_grad(
                spec, laid, documents, stages=2, rules=rules, **how
            )
        assert_same(got, want)
        same = jax.tree.map(lambda x, y: x.sharding == y.sharding, got[1], laid)
        assert all(jax.tree.leaves(same))


def test_the_order_is_state_aware():
    """Up, then down; again just before; what is carried is of what is under way."""
    settings = gradients.Settings(8, 2)
    dealt, _, targets = chunked.lay_out(DENSE, draw(LENGTHS), settings, mesh.Rules())
    assert len(dealt.packed) == 3 and [n for _, n in dealt.groups] == [6, 3, 2]
    assert targets == sum(LENGTHS) - len(LENGTHS)
    batch = chunked.arrays(dealt, 16)
    assert batch["tokens_bt"].shape == (16, 1, 8) and not batch["mask_bt"][14:].any()
    plan = chunked.plans(3, (6, 3, 2), 2, 4)[-1].table
    micros = bubbles.chunks([[1.0]] * 3 + [[1.0] * n for n in (6, 3, 2)], 2)
    assert plan.order() == bubbles.one_f_one_b(micros, 4)
    long = {3: 0, 4: 1, 5: 2, 6: 3, 7: 4, 8: 5}
    for ops in plan.order():
        every = {
            kind: [long[op.micro] for op in ops if op.kind == kind and op.micro in long]
            for kind in "FBR"
        }
        assert every == {
            "F": [0, 1, 2, 3, 4, 5],
            "B": [5, 4, 3, 2, 1, 0],
            "R": [3, 2, 1, 0],
        }
        again = [i for i, op in enumerate(ops) if op.kind == "R"]
        assert all(ops[i + 1] == bubbles.Op("B", ops[i].micro) for i in again)
    # A ring of two for each group, at most two of which are under way in a stage.
    assert plan.slots["g"] == 2 and 2 <= plan.slots["s"] <= 4
    alone = [chunked.plan_of(0, (n,), 2, 4).table for n in (6, 12)]
    eager = bubbles.chunks([[1.0] * 12], 2)
    assert alone[1].order() == bubbles.one_f_one_b(eager, 4, ahead=2)
    assert [one.slots["s"] for one in alone] == [2, 2]
    assert [one.slots["g"] for one in alone] == [1, 1]


def test_programs_are_few():
    """Other documents of about the same lengths run what is compiled."""
    spec = dataclasses.replace(DENSE, param_dtype="float32", compute_dtype="float32")
    params = models.init(spec, 1)

    def step_of(lengths):
        pipeline.chunked_value_and_grad(
            spec, params, draw(lengths), stages=1, chunk_tokens=8
        )
        return chunked.round_gradients._cache_size()

    before = step_of([30, 9])  # 4 and 2 chunks
    assert step_of([25, 16]) == before
    assert step_of([50]) == before + 1


def test_bad_input_is_refused():
    def refused(words, documents, **how):
        how = {"stages": 2, "chunk_tokens": 8} | how
        with pytest.raises(config.InputError, match=words):
            pipeline.chunked_value_and_grad(DENSE, {}, documents, **how)

    refused("live_chunks=0: wanted at least 1", [[1, 2]], live_chunks=0)
    refused("2 documents have no target", [[1], [2]])
    refused(r"documents\[1\] has ids 3 to 48", [[1, 2], [3, 48]])
    refused("2 layers on 4 stages", [[1, 2]], stages=4)


def test_kinds_are_the_numbers_of_the_table():
    kinds = [ticks.KINDS[k] for k in (ticks.FORWARD, ticks.BACKWARD, ticks.AGAIN)]
    assert kinds == [bubbles.FORWARD_PASS, bubbles.BACKWARD_PASS, bubbles.AGAIN]
