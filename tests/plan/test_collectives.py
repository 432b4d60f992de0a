# SPDX-License-Identifier: Apache-2.0
"""Collectives read from compiled programs whose communication is known beforehand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from qwen_jax import experiment, mesh, prepare
from qwen_jax.plan import collectives
from tests import runs

P = jax.P


def traffic(fn, *shapes, on, num_devices=8):
    """{kind: Traffic} of `fn` compiled for shapes with specs [(shape, dtype, spec)]."""
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.sharding(on, spec))
        for shape, dtype, spec in shapes
    ]
    with jax.set_mesh(on):
        text = jax.jit(fn).lower(*arguments).compile().as_text()
    found, at_least = collectives.traffic(text, num_devices)
    return {one.kind: one for one in found}, at_least


def line(kind):
    """fn(x [64, 8]) with one collective of `kind` over four devices, its bytes."""
    local = {
        "all-gather": lambda x: jax.lax.all_gather(x, "fsdp", tiled=True),
        "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
        "all-reduce": lambda x: jax.lax.psum(x, "fsdp"),
        "all-to-all": lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True),
        "collective-permute": lambda x: jax.lax.ppermute(
            x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]
        ),
    }[kind]
    return jax.shard_map(
        local, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False
    )


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        # Each device holds 16 x 8 float32 = 512 bytes; a ring of 4.
        ("all-gather", 3 * 512),
        ("reduce-scatter", 512 * 3 / 4),
        ("all-reduce", 2 * 512 * 3 / 4),
        ("all-to-all", 512 * 3 / 4),
        ("collective-permute", 512),
    ],
)
def test_each_kind_is_counted_with_its_bytes(kind, moved):
    on = mesh.make(mesh.MeshConfig(data=2, fsdp=4))
    found, at_least = traffic(line(kind), ((64, 8), jnp.float32, P("fsdp")), on=on)
    assert set(found) == {kind} and not at_least
    assert (found[kind].count, found[kind].bytes) == (1, moved)
    assert found[kind].largest_bytes == moved


def test_loops_count_each_turn():
    on = mesh.make(mesh.MeshConfig(data=1, fsdp=8))

    def fn(weights, x):
        def layer(x, w):
            w = jax.sharding.reshard(w, P(None, None))
            for _ in range(2):
                x = jnp.tanh(x @ w)
            return x, None

        def outer(x, _):
            return jax.lax.scan(layer, x, weights)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    found, at_least = traffic(
        fn,
        ((5, 32, 32), jnp.float32, P(None, "fsdp", None)),
        ((8, 32), jnp.float32, P("fsdp", None)),
        on=on,
    )
    assert not at_least
    assert found["all-gather"].count == 15
    assert found["all-gather"].bytes == 15 * 32 * 32 * 4 * 7 / 8
    assert found["all-gather"].largest == "f32[32,32]"


def test_a_loop_of_unknown_length_makes_a_lower_bound():
    on = mesh.make(mesh.MeshConfig(data=1, fsdp=8))

    def local(x, n):
        body = functools.partial(jax.lax.psum, axis_name="fsdp")
        return jax.lax.fori_loop(0, n, lambda _, y: body(y) * 0.5, x)

    fn = jax.shard_map(
        local, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"), check_vma=False
    )
    found, at_least = traffic(
        fn, ((8, 4), jnp.float32, P("fsdp")), ((), jnp.int32, P()), on=on
    )
    assert at_least and found["all-reduce"].count == 1


def test_one_device_says_nothing():
    on = mesh.make(mesh.MeshConfig(), jax.devices()[:1])
    found, _ = traffic(lambda x: x @ x, ((4, 4), jnp.float32, P()), on=on)
    assert found == {}


# Lines as the TPU compiler writes them, layouts and metadata shortened.
TPU = """HloModule jit_step, entry_computation_layout={...}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %s = bf16[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[16,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=2, \
replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, to_apply=%add
  ROOT %d = bf16[16,128]{1,0} dynamic-slice(%all-reduce.1, %i, %z)
}

%body (t: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %all-gather.2 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=5, \
replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={0}
  %fusion = bf16[16,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

%cond (t: (s32[], bf16[64,128])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(36), metadata={op_name="lt"}
  ROOT %lt = pred[]{:T(512)} compare(%g, %constant.9), direction=LT
}

ENTRY %main (p: bf16[64,128]) -> bf16[64,128] {
  %while.1 = (s32[]{:T(128)}, bf16[64,128]{1,0}) while(%tuple), condition=%cond, \
body=%body
  %all-gather-start.3 = (bf16[4,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%q), \
replica_groups=[1,16]<=[16], dimensions={0}
  %all-gather-done.3 = bf16[64,128]{1,0} all-gather-done(%all-gather-start.3)
  ROOT %r = f32[8]{0} all-reduce(%v), replica_groups={}, to_apply=%add
}
"""


def test_the_words_of_the_tpu_compiler():
    found, at_least = collectives.traffic(TPU, 16)
    found = {one.kind: one for one in found}
    whole = 64 * 128 * 2
    assert not at_least
    assert found["all-gather"].count == 37
    assert found["all-gather"].bytes == 36 * whole * 3 / 4 + whole * 15 / 16
    # A fusion of a sum and a slice is a reduce-scatter.
    assert found["reduce-scatter"].count == 36
    assert found["reduce-scatter"].bytes == 36 * whole * 3 / 4
    assert (found["all-reduce"].count, found["all-reduce"].bytes) == (1, 60)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives.traffic("HloModule nothing", 1)


@pytest.mark.parametrize(
    ("sizes", "embed"), [((2, 4, 1, 1, 1), "fsdp"), ((4, 2, 1, 1, 1), ("data", "fsdp"))]
)
def test_gradients_of_layers_are_scattered_not_summed_whole(sizes, embed):
    """The step of a run: what crosses devices is weights, slices and activations."""
    exp = experiment.resolve(
        f"{runs.EXPERIMENT}:adamw",
        [(f"mesh.{n}", str(s)) for n, s in zip(mesh.AXES, sizes, strict=False)]
        + [("model.ffn_width", "512"), ("model.vocab_size", "1024")],
    )
    rules = mesh.Rules(embed=embed)
    exp, setup = prepare.set_up(exp.__class__(**vars(exp) | {"rules": rules}))
    text = prepare.compile_step(setup).as_text()
    found = {one.kind: one for one in collectives.traffic(text, 8)[0]}
    layers, width, ffn = 2, exp.model.width, exp.model.ffn_width
    split = 8 if embed != "fsdp" else sizes[1]
    # Three matrices of the feed-forward and four of attention, and the two tables.
    assert found["reduce-scatter"].count >= 7 * layers
    assert found["all-gather"].count >= 7 * layers * 2 - 7
    # Whole gradients would be width x ffn; slices of them are summed over `data`.
    slices = 2 * width * ffn * 4 / split
    assert found["all-reduce"].largest_bytes <= max(
        slices, 2 * 1024 * width * 4 / split
    )
