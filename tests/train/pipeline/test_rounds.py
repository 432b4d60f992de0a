# SPDX-License-Identifier: Apache-2.0
"""Any step's chunks go through the programs that were made before the first."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax import mesh, models
from qwen_jax.plan import collectives
from qwen_jax.train import chunkflow, pipeline
from qwen_jax.train.chunkflow import chunks, gradients
from qwen_jax.train.pipeline import chunked, rounds
from tests.train.pipeline import test_chunked

GROUPS = [2, 3, 4, 6, 8, 12]


def whole(made, packed, groups):
    """Every chunk is in one round, and each round fits its program."""
    assert [i for one in made for i in one.packed] == list(range(packed))
    numbers = [i for one in made for i in one.groups]
    assert sorted(numbers) == list(range(len(groups)))
    for one in made:
        assert one.plan.groups == tuple(groups[i] for i in one.groups)
        assert one.plan.packed == len(one.packed)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_a_group_of_any_length_fits(stages):
    for live in (1, 2, 5, 20):
        there = rounds.programs(live, stages, GROUPS, 5)
        for count in range(2, GROUPS[-1] + 1):
            [made] = there.deal(0, [count])
            assert made.program == chunks.rounded(count)
            assert there.sizes[made.program].hold(made.plan.sizes)


@pytest.mark.parametrize("seed", range(6))
def test_any_step_fits(seed):
    draw = np.random.default_rng(seed)
    stages, full = int(draw.choice([2, 4, 8])), int(draw.choice([4, 16, 40]))
    there = rounds.programs(2, stages, GROUPS, full)
    for _ in range(8):
        groups = [int(x) for x in draw.integers(2, 13, draw.integers(0, 12))]
        packed = int(draw.integers(not groups, 2 * full))
        made = there.deal(packed, groups)
        whole(made, packed, groups)
        for one in made:
            assert there.sizes[one.program].hold(one.plan.sizes)


def test_what_goes_together_is_done_sooner():
    there = rounds.programs(2, 4, GROUPS, 16)
    for packed, groups in ((16, []), (4, [12]), (8, [8])):
        assert len(there.deal(packed, groups)) == 1, (packed, groups)
    made = there.deal(3, [4] * 4)
    alone = [there.deal(0, [4])] * 4 + [there.deal(3, [])]
    wanted = sum(one.plan.seconds for [one] in alone)
    assert sum(one.plan.seconds for one in made) < wanted
    assert len(there.deal(0, [12, 12, 12])) > 1


def test_waiting_is_told():
    """Of chunks by themselves that of eager 1F1B, (P - 1) / (M + P - 1); 1F1B, in whose
    ticks some go forward while others go backward, waits longer."""
    assert rounds.programs(2, 1, GROUPS, 16).stretch(7, [5, 3]) == 1.0
    four = rounds.programs(2, 4, GROUPS, 64)
    for count in (4, 16, 64):
        assert four.stretch(count, []) == pytest.approx((count + 3) / count)
    plain = chunked.plans(52, (12,), 2, 4)[-1].seconds
    assert four.stretch(52, [12]) < 1.15 and plain > 1.5 * (4 * 64 + 10)


def test_a_row_of_padding_does_nothing():
    plan = chunked.plan_of(2, (3,), 1, 2)
    sizes = chunked.Sizes.of_all([plan.sizes, chunked.plan_of(5, (4,), 1, 2).sizes])
    rows, count = plan.padded(sizes)
    assert sizes.ticks > count == plan.sizes.ticks
    assert len(rows["kind"]) == sizes.ticks and not rows["kind"][count:].any()
    assert (rows["kind"][count - 1] != 0).any()


@pytest.mark.slow
def test_gradients_of_several_rounds_are_those_of_one_device():
    with jax.enable_x64(True):
        spec = dataclasses.replace(test_chunked.SPECS["moe"], num_layers=2)
        params, documents = models.init(spec, 1), test_chunked.draw([41, 30, 3, 8, 27])
        settings = gradients.Settings(8, 2, router_losses=True, remat="full")
        how = {"chunk_tokens": 8, "live_chunks": 2, "router_losses": True}
        want = chunkflow.value_and_grad(spec, params, documents, **how)
        there = rounds.programs(2, 2, [2, 3, 4, 6], 2)
        with pipeline.on_stages(2):
            dealt, tokens, targets = chunked.lay_out(
                spec, documents, settings, mesh.Rules()
            )
            parts = there.parts_of(dealt)
            names = [name for name, _ in parts]
            assert len(names) > 1 and set(names) <= {"round/0", "round/6", "round/4"}
            each = there.jitted(spec, settings, mesh.Rules())
            sums = gradients.summed(params, parts, targets, tokens, each)
        test_chunked.assert_same((sums.nll / targets, sums.grads), want)
        again = sum(max(0, n - 2) for n in (6, 4, 4))
        assert sums.forwards == len(dealt.packed) + 14 + again
        assert sums.stats["counts_e"].sum() == 2 * 2 * tokens


def test_held_out_text_goes_through_stages():
    """Layers stay where they lie: what goes between stages is the residual alone."""
    with jax.enable_x64(True):
        params, spec = models.init(test_chunked.DENSE, 1), test_chunked.DENSE
        documents = test_chunked.draw([41, 30, 3, 8, 27])
        settings = gradients.Settings(8, 1)
        want, _ = chunkflow.run(spec, params, documents, settings)
        with pipeline.on_stages(2):
            dealt, _, _ = chunked.lay_out(spec, documents, settings, mesh.Rules())
            [(_, (*operands, sizes))] = pipeline.forward_parts(dealt, 2)
            how = {"spec": spec, "rules": mesh.Rules(), "settings": settings}
            program = chunked.nll.lower(params, *operands, sizes=sizes, **how)
            got = chunked.nll(params, *operands, sizes=sizes, **how)
        np.testing.assert_allclose(got, want.nll, rtol=1e-13)
        slots = dict(sizes.slots)
        assert (slots["x"], slots["d"], slots["s"]) == (1, 0, 0)
        text = program.compile().as_text()
        found = {one.kind for one in collectives.traffic(text, 2)[0]}
        assert found <= {"collective-permute", "all-reduce"}
