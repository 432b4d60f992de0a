# SPDX-License-Identifier: Apache-2.0
"""Sizes and rules of a mesh are checked; every op on it equals its plain twin."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from qwen_jax import config, experiment, mesh
from tests import runs

B, T, D, F, N, K, V = 8, 3, 8, 4, 2, 6, 10
RULES = {
    "embed on fsdp": mesh.Rules(),
    "embed on data and fsdp": mesh.Rules(embed=("data", "fsdp")),
    "embed whole": mesh.Rules(embed=None),
    "embed off the batch": mesh.Rules(batch="data"),
}
# float32 sums of at most 24 products of unit scale, in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def devices():
    return mesh.make(mesh.MeshConfig(2, 2, 2))


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def lay(devices, x, spec):
    return jax.device_put(x, mesh.sharding(devices, spec))


def assert_lies(x, devices, spec):
    assert x.sharding.is_equivalent_to(mesh.sharding(devices, spec), x.ndim), x.sharding


# --- sizes ---


def test_a_mesh_has_all_axes_and_all_devices(devices):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1, "context": 1, "stage": 1}
    assert dict(devices.shape) == sizes
    assert set(devices.axis_types) == {jax.sharding.AxisType.Explicit}
    assert dict(mesh.make(mesh.MeshConfig()).shape)["data"] == jax.device_count()


def test_minus_one_is_the_rest():
    assert mesh.MeshConfig().sizes(8) == (8, 1, 1, 1, 1, 1)
    assert mesh.MeshConfig(2, -1, 2).sizes(8) == (2, 2, 2, 1, 1, 1)
    assert mesh.MeshConfig(1, 2, -1).sizes(2) == (1, 2, 1, 1, 1, 1)
    assert mesh.MeshConfig(2, 3, 4).sizes(8) == (2, 3, 4, 1, 1, 1)  # `make` compares


@given(st.tuples(*[st.integers(-2, 9)] * len(mesh.AXES)), st.integers(1, 64))
def test_sizes_are_as_given_and_fill_the_devices_or_are_refused(given, devices):
    open_ends, fixed = given.count(-1), abs(math.prod(given))
    wrong = min(given) < -1 or 0 in given or open_ends > 1
    wrong = wrong or (open_ends and devices % fixed)
    if wrong:
        with pytest.raises(config.InputError):
            mesh.MeshConfig(*given).sizes(devices)
        return
    sizes = mesh.MeshConfig(*given).sizes(devices)
    assert all(a in (b, -1) for a, b in zip(given, sizes, strict=True))
    assert math.prod(sizes) == (devices if open_ends else fixed)


@pytest.mark.parametrize(
    "sizes, told",
    [
        (
            (-1, -1, 1),
            "'fsdp': -1, 'tensor': 1, 'expert': 1, 'context': 1, 'stage': 1}: sizes",
        ),
        (
            (0, 1, 1),
            "mesh {'data': 0, 'fsdp': 1, 'tensor': 1, 'expert': 1, 'context': 1, ",
        ),
        ((-1, 3, 1), "8 devices are not a multiple of 3; change --config.mesh.*"),
        ((2, 2, 1), "needs 4 devices, 8 are here; set one of --config.mesh.data, .fs"),
        ((4, 4, 1), "needs 16 devices, 8 are here"),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_the_fix(sizes, told):
    with pytest.raises(config.InputError) as caught:
        mesh.make(mesh.MeshConfig(*sizes))
    assert told in str(caught.value)


# --- slices ---


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made from: a device that is not there."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0


def chips(slices, shape, **more):
    """Chips of `slices` slices of `shape`, one process each, in no useful order."""
    places = list(itertools.product(*map(range, shape)))
    found = [
        Chip(1000 * s + i, s, place, s, **more)
        for s in range(slices)
        for i, place in enumerate(places)
    ]
    return found[::2] + found[1::2]


@pytest.mark.parametrize(
    ("slices", "shape", "sizes"),
    [
        (2, (2, 2, 1), (-1, 2, 1)),
        (2, (2, 2, 1), (2, 2, 2)),
        (2, (2, 2, 1), (8, 1, 1, 1)),
        (3, (2, 2, 2), (6, 2, 2)),
        (2, (4, 4, 1), (2, 8, 2)),  # splits an axis of each slice's torus
    ],
)
def test_slices_follow_one_another_along_data(slices, shape, sizes):
    devices = chips(slices, shape)
    made = mesh.make(mesh.MeshConfig(*sizes), devices)
    assert set(made.axis_types) == {jax.sharding.AxisType.Explicit}
    assert {d.id for d in made.devices.flat} == {d.id for d in devices}
    for index, block in enumerate(np.split(made.devices, slices)):
        one = [d for d in devices if d.slice_index == index]
        alone = mesh.make(mesh.MeshConfig(*block.shape), one)  # as it would be alone
        np.testing.assert_array_equal(block, alone.devices)


@pytest.mark.parametrize(
    ("slices", "sizes"),
    [(2, (1, 8, 1)), (2, (-1, 4, 2)), (3, (2, 6, 1)), (4, (2, 2, 4))],
)
def test_slices_that_do_not_divide_data_are_told_with_the_fix(slices, sizes):
    with pytest.raises(config.InputError) as caught:
        mesh.make(mesh.MeshConfig(*sizes), chips(slices, (2, 2, 1)))
    told = str(caught.value)
    assert f"data must be a multiple of the {slices} TPU slices" in told
    assert "--config.mesh.data=-1" in told and "the 4 devices of one slice" in told


def test_stages_lie_farther_apart_than_what_is_inside_one():
    """Two hosts of four GPUs: each has a stage, whose weights and heads it splits."""
    devices = chips(2, (4, 1, 1), platform="gpu", device_kind="NVIDIA H100")
    made = mesh.make(mesh.MeshConfig(1, 2, 2, stage=2), devices)
    hosts = np.vectorize(lambda d: d.slice_index)(made.devices)
    assert hosts.shape == (1, 2, 2, 1, 1, 2)
    assert (hosts[..., 0] == 0).all() and (hosts[..., 1] == 1).all()


def test_hosts_of_gpus_may_split_weights_between_them():
    """They tell of slices, too: one for each host."""
    devices = chips(2, (4, 1, 1), platform="gpu", device_kind="NVIDIA H100")
    made = mesh.make(mesh.MeshConfig(1, 8, 1), devices)
    assert [d.slice_index for d in made.devices.flat] == [0] * 4 + [1] * 4


# --- rules ---


def test_rules_lay_dims_on_axes():
    rules = mesh.Rules()
    batch = ("data", "fsdp", "expert")
    assert rules.pspec("batch", None, "ffn") == P(batch, None, "tensor")
    assert rules.pspec("layers", "embed", "heads") == P(None, "fsdp", "tensor")
    assert rules.gathered("layers", "embed", "heads") == P(None, None, "tensor")
    assert rules.gathered("vocab", "embed") == P("tensor", None)
    assert mesh.Rules(layers="data").gathered("layers", "ffn") == P(None, "tensor")
    assert mesh.names(None) == () and mesh.names("data") == ("data",)


def test_two_dims_on_one_axis_are_refused():
    with pytest.raises(config.InputError, match=r"one mesh axis twice.*rules\."):
        mesh.Rules(embed="tensor").pspec("embed", "ffn")
    with pytest.raises(config.InputError, match="one mesh axis twice"):
        mesh.Rules().pspec("batch", "embed")


@pytest.mark.parametrize("text", ["fspd", "('data', 'fspd')"])
def test_an_axis_that_no_mesh_has_is_refused_by_name(text):
    with pytest.raises(
        config.InputError, match=r"rules: embed='fspd'; did you mean 'fsdp'\?"
    ):
        experiment.resolve(str(runs.EXPERIMENT), [("rules.embed", text)])


# --- ops ---


def test_without_a_mesh_nothing_is_laid_out():
    x_btd, w_df = jnp.array(draw(B, T, D)), jnp.array(draw(D, F))
    assert not mesh.active() and mesh.axis_size(("data", "fsdp")) == 1
    assert mesh.reshard(x_btd, P("data")) is x_btd
    assert mesh.gather(w_df, mesh.Rules(), "embed", "ffn") is w_df
    assert mesh.local(math.sqrt, inputs=None, out=None) is math.sqrt


def test_axis_size_is_that_of_the_mesh_that_is_set(devices):
    with jax.set_mesh(devices):
        assert mesh.active()
        sizes = [mesh.axis_size(a) for a in (None, "data", ("data", "fsdp"))]
    assert sizes == [1, 2, 4]


# weight's dims, its shape, how many of them are summed, dims of the input
PRODUCTS = {
    "up": (("embed", "ffn"), (D, F), 1, (None,)),
    "down": (("ffn", "embed"), (F, D), 1, ("ffn",)),
    "query": (("embed", "heads", None), (D, N, K), 1, (None,)),
    "output": (("heads", None, "embed"), (N, K, D), 2, ("heads", None)),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dims, shape, inner, x_dims", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_with_a_gathered_weight(devices, rules, dims, shape, inner, x_dims):
    x, w = draw(B, T, *shape[:inner]), draw(*shape, seed=1)
    kept = [None if dim == "embed" else dim for dim in dims[inner:]]
    out = rules.pspec("batch", None, *kept)

    def loss(x, w):
        y = mesh.product(x, mesh.gather(w, rules, *dims), inner=inner, out=out)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    # By hand: y = x w, dy = cos(y), dx = dy w', dw = x' dy.
    y = np.tensordot(x, w, inner)
    dy = np.cos(y)
    free = list(range(inner, w.ndim))
    dx = np.tensordot(dy, w, (list(range(2, dy.ndim)), free))
    dw = np.tensordot(x, dy, ([0, 1], [0, 1]))
    placed = lay(devices, x, rules.pspec("batch", None, *x_dims))
    with jax.set_mesh(devices):
        split = run(placed, lay(devices, w, rules.pspec(*dims)))
    for (got_dx, got_dw), got_y in (split, run(x, w)):
        np.testing.assert_allclose(got_y, y, **CLOSE)
        np.testing.assert_allclose(got_dx, dx, **CLOSE)
        np.testing.assert_allclose(got_dw, dw, **CLOSE)
    assert_lies(split[1], devices, out)
    assert_lies(split[0][1], devices, rules.pspec(*dims))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1, 1), (2, 4, 1)])
def test_parts_of_a_gradient_are_summed_in_the_dtype_asked_for(sizes):
    """One device holds 1, seven hold 2^-9: bfloat16 keeps 8 bits of the sum."""
    on, rules = mesh.make(mesh.MeshConfig(*sizes)), mesh.Rules()
    x, cot = np.ones((8, 1, D)), np.full((8, 1, F), 2.0**-9)
    cot[3] = 1
    rows = rules.pspec("batch", None, None)

    def grad(reduce_dtype):
        def loss(w, x, cot):
            w = mesh.gather(
                w, rules, "embed", "ffn", dtype=x.dtype, reduce_dtype=reduce_dtype
            )
            return jnp.sum(mesh.product(x, w, out=rows) * cot, dtype=jnp.float32)

        with jax.set_mesh(on):
            w = lay(on, draw(D, F), rules.pspec("embed", "ffn"))
            halves = [lay(on, a.astype(jnp.bfloat16), rows) for a in (x, cot)]
            got = jax.jit(jax.grad(loss))(w, *halves)
        assert got.dtype == jnp.float32
        assert_lies(got, on, rules.pspec("embed", "ffn"))
        return np.asarray(got)

    np.testing.assert_array_equal(grad("float32"), 1 + 7 * 2.0**-9)
    short = grad("compute")
    np.testing.assert_array_equal(short, short.astype(jnp.bfloat16))
    np.testing.assert_allclose(short, 1 + 7 * 2.0**-9, rtol=0.01)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_rows_of_a_table_that_stays_split(devices, rules):
    table, cot = draw(V, D), draw(B, T, D, seed=1)
    ids = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)

    def loss(table_vd, ids_bt, cot_btd):
        x_btd = mesh.take(table_vd, ids_bt, rules)
        return jnp.sum(x_btd * cot_btd), x_btd

    run = jax.jit(jax.grad(loss, has_aux=True))
    want = np.zeros_like(table)
    np.add.at(want, ids, cot)
    rows = rules.pspec("batch", None, None)
    with jax.set_mesh(devices):
        split = run(
            lay(devices, table, rules.pspec("vocab", "embed")),
            lay(devices, ids, rules.pspec("batch", None)),
            lay(devices, cot, rows),
        )
    for grad, x in (split, run(table, ids, cot)):
        np.testing.assert_array_equal(x, table[ids])
        np.testing.assert_allclose(grad, want, **CLOSE)
    assert_lies(split[1], devices, rows)
    assert_lies(split[0], devices, rules.pspec("vocab", "embed"))


def test_an_einsum_over_a_split_dim_is_summed_once(devices):
    x, w = draw(B, T, F), draw(D, F)
    out = mesh.Rules().pspec("batch", None, None)

    def run(x_btf, w_df):
        return mesh.einsum("btf,df->btd", x_btf, w_df, out=out)

    with jax.set_mesh(devices):
        placed = lay(devices, x, P(("data", "fsdp"), None, "tensor"))
        got = jax.jit(run)(placed, lay(devices, w, P("fsdp", "tensor")))
        assert_lies(got, devices, out)
    np.testing.assert_allclose(got, np.einsum("btf,df->btd", x, w), **CLOSE)
    np.testing.assert_allclose(run(x, w), np.einsum("btf,df->btd", x, w), **CLOSE)


def test_reshard_moves_and_changes_nothing(devices):
    x = draw(B, T, D)
    with jax.set_mesh(devices):
        for spec in (P(), P("tensor"), P(None, None, ("data", "fsdp")), P("data")):
            moved = mesh.reshard(lay(devices, x, P("data", None, "tensor")), spec)
            assert_lies(moved, devices, spec)
            np.testing.assert_array_equal(moved, x)


def test_local_sees_its_own_block_and_its_gradient_is_the_whole_ones(devices):
    """A weight that all devices share gets the sum of what each of them says."""
    x, w = draw(B, D), draw(D, seed=1)
    rows = P(("data", "fsdp"), "tensor")
    blocks = []

    def block(x_bd, w_d):
        blocks.append((x_bd.shape, mesh.varying(x_bd), mesh.varying(w_d)))
        w_d = mesh.vary(w_d, mesh.varying(x_bd))
        assert mesh.varying(w_d) == mesh.varying(x_bd)
        return x_bd * w_d[None] ** 2

    def loss(x_bd, w_d):
        run = mesh.local(block, inputs=(rows, P("tensor")), out=rows)
        return jnp.sum(jnp.sin(run(x_bd, w_d)))

    grad = jax.grad(loss, (0, 1))
    with jax.set_mesh(devices):
        split = jax.jit(grad)(lay(devices, x, rows), lay(devices, w, P("tensor")))
    whole = frozenset({"data", "fsdp", "tensor"})
    assert blocks[0] == ((B // 4, D // 2), whole, {"tensor"})
    dy = np.cos(x * w**2)
    for dx, dw in (split, grad(jnp.array(x), jnp.array(w))):
        np.testing.assert_allclose(dx, dy * w**2, **CLOSE)
        np.testing.assert_allclose(dw, (dy * x * 2 * w).sum(0), **CLOSE)
