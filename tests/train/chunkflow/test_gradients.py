# SPDX-License-Identifier: Apache-2.0
"""Chunked gradients are those of whole documents, each by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax import params as params_lib
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import chunkflow, step
from qwen_jax.train.chunkflow import chunks, gradients

DENSE = spec_lib.Spec(
    vocab_size=50,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=24,
    max_positions=512,
    init_std=0.3,
)
DELTA = spec_lib.Delta(
    key_heads=2, value_heads=4, key_width=8, value_width=8, conv_taps=4
)
SPECS = {
    "dense": DENSE,
    "bias": dataclasses.replace(
        DENSE, qk_norm=False, qkv_bias=True, tie_embedding=False
    ),
    "gate": dataclasses.replace(DENSE, output_gate=True, norm_offset=True),
    "window": dataclasses.replace(DENSE, num_layers=3, window=5, full_layers=1),
    "moe": dataclasses.replace(
        DENSE,
        moe=spec_lib.MoE(
            num_experts=4, experts_per_token=2, ffn_width=12, balance_coef=0.1
        ),
    ),
    "hybrid": dataclasses.replace(
        DENSE, num_layers=4, mixers=("delta", "delta", "attention"), delta=DELTA
    ),
}


def wide(spec):
    return dataclasses.replace(spec, compute_dtype="float64", param_dtype="float64")


def reference(spec, params, documents):
    """Mean loss over all targets, a whole document in each row, logits in the open."""
    pieces = [chunks.whole(one) for one in documents]
    alone = [[[i]] for i in range(len(documents))]
    rows = chunks.dependent(pieces, alone, max(map(len, documents)), 1)
    rows = {k: x[0] for k, x in rows.items()}

    def loss(params):
        logits_btv = models.forward(
            spec, params, rows["tokens_bt"], segments=rows["segments_bt"]
        )
        logp_btv = jax.nn.log_softmax(logits_btv, axis=-1)
        at = rows["targets_bt"][..., None]
        logp_bt = jnp.take_along_axis(logp_btv, at, axis=2)[..., 0]
        return -jnp.sum(logp_bt * rows["mask_bt"]) / np.sum(rows["mask_bt"])

    return jax.jit(jax.value_and_grad(loss))(params)


def draw(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, n) for n in lengths]


def assert_same(got, want, tolerance):
    (loss, grads), (wanted_loss, wanted) = got, want
    np.testing.assert_allclose(loss, wanted_loss, rtol=tolerance)
    for path, leaf in jax.tree.leaves_with_path(wanted):
        here = grads
        for key in path:
            here = here[key.key]
        scale = float(jnp.max(jnp.abs(leaf)))
        off = float(jnp.max(jnp.abs(here - leaf)))
        assert off <= tolerance * scale, (jax.tree_util.keystr(path), off, scale)


@pytest.mark.parametrize("name", ["bias", "gate", "window", "hybrid"])
def test_a_long_document_in_chunks(name):
    with jax.enable_x64(True):
        spec = wide(SPECS[name])
        params, documents = models.init(spec, 1), draw([24])
        want = reference(spec, params, documents)
        got = chunkflow.value_and_grad(
            spec, params, documents, chunk_tokens=6, live_chunks=2
        )
        assert_same(got, want, 1e-12)


def apart(got, want):
    """Norm of the difference of two trees over that of the second."""
    flat = [
        np.concatenate(
            [np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(t)]
        )
        for t in (got, want)
    ]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


FEW = [(4, 1), (6, 2), (8, 3), (12, 6)]
EVERY = [(c, k) for c in (4, 6, 8, 12) for k in (1, 2, 3, 6)]


MODELS = ("dense", "moe", "hybrid")


@pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [
        *[(name, "float64", FEW) for name in MODELS[:2]],
        *[
            pytest.param(name, dtype, EVERY, marks=pytest.mark.slow)
            for name in MODELS
            for dtype in ("float64", "float32")
        ],
    ],
)
def test_sizes_of_chunks_and_numbers_that_wait(name, dtype, sizes):
    """25 tokens leave a rest. Forward passes are counted by the loops that make them.

    What is float32 is compared with float64, with weights as training begins with: at
    0.3 linear layers magnify rounding, and whole rows are off by 2.4e-5 themselves.
    """
    spec = SPECS[name]
    if dtype == "float32":
        spec = dataclasses.replace(spec, init_std=0.02)
    with jax.enable_x64(True):
        params, documents = models.init(wide(spec), 1), draw([25])
        want = reference(wide(spec), params, documents)
    with jax.enable_x64(dtype == "float64"):
        spec = wide(spec) if dtype == "float64" else spec
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), params)
        for c, k in sizes:
            settings = chunkflow.Settings(c, k)
            sums, targets = chunkflow.run(spec, params, documents, settings)
            got = sums.nll / targets, sums.grads
            if dtype == "float64":
                assert_same(got, want, 1e-12)
            else:
                assert apart(got[1], want[1]) < 1e-5
            n = -(-25 // c)
            assert int(sums.forwards) == n + max(0, n - k)


SLOW = ("bias", "gate", "window", "hybrid")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in SPECS],
)
def test_a_mixed_step_is_that_of_documents_by_themselves(name):
    """Short ones packed beside each other, long ones of several lengths in chunks, one
    without a target among them."""
    with jax.enable_x64(True):
        spec = wide(SPECS[name])
        params = models.init(spec, 2)
        documents = draw([3, 41, 8, 1, 17, 2, 7, 9, 5, 16])
        want = reference(spec, params, documents)
        settings = chunkflow.Settings(8, 2)
        sums, targets = chunkflow.run(spec, params, documents, settings)
        assert_same((sums.nll / targets, sums.grads), want, 1e-12)
        # Chunks of 41, 17, 9, 16; the rest is 26 tokens, 4 bins at the least.
        long = [6, 3, 2, 2]
        assert int(sums.forwards) == 4 + sum(n + max(0, n - 2) for n in long)


def test_losses_of_routers_are_those_of_the_whole_step():
    """Beside the plain step over all documents in one batch."""
    with jax.enable_x64(True):
        moe = spec_lib.MoE(
            num_experts=4,
            experts_per_token=2,
            ffn_width=12,
            balance_coef=0.1,
            z_coef=0.01,
        )
        spec = wide(dataclasses.replace(DENSE, moe=moe, dense_layers=(0,)))
        params, documents = models.init(spec, 2), draw([3, 20, 8, 1])
        pieces = [chunks.whole(x) for x in documents]
        rows = chunks.dependent(pieces, [[[i]] for i in range(4)], 20, 1)
        how = {"spec": spec, "rules": mesh.Rules()}
        how["config"] = step.StepConfig(z_loss=0.03)
        grads, parts = jax.jit(functools.partial(step.gradients, **how))(params, rows)
        loss, got = chunkflow.value_and_grad(
            spec,
            params,
            documents,
            chunk_tokens=8,
            live_chunks=2,
            z_coef=0.03,
            router_losses=True,
        )
        assert_same((loss, got), (parts["nll"] / parts["targets"], grads), 1e-12)
        plain = chunkflow.value_and_grad(spec, params, documents, chunk_tokens=8)[1]
        routers = [x["layers"]["moe"]["router_lde"] for x in (plain, grads)]
        assert float(jnp.max(jnp.abs(routers[0] - routers[1]))) > 1e-4


def test_choices_that_are_dropped_are_counted():
    moe = dataclasses.replace(SPECS["moe"].moe, impl="capacity", capacity_factor=0.25)
    spec = dataclasses.replace(DENSE, num_layers=1, moe=moe)
    params, settings = models.init(spec, 1), chunkflow.Settings(8, 2)
    packed, _ = chunkflow.run(spec, params, draw([8, 8]), settings)
    both, _ = chunkflow.run(spec, params, draw([8, 8, 24]), settings)
    # Of 16 choices of a chunk there is room for a quarter of 4 for each of 4 experts.
    dropped = [int(jnp.sum(one.stats["dropped"])) for one in (packed, both)]
    assert dropped[0] >= 2 * 12 and dropped[1] >= 5 * 12
    fits = dataclasses.replace(spec, moe=SPECS["moe"].moe)
    packed, _ = chunkflow.run(fits, params, draw([8, 8]), settings)
    assert int(jnp.sum(packed.stats["dropped"])) == 0


@pytest.mark.slow
def test_bfloat16_is_as_near_as_without_chunks():
    spec = dataclasses.replace(DENSE, compute_dtype="bfloat16")
    params, documents = models.init(spec, 1), draw([61, 9])
    want = reference(DENSE, params, documents)[1]

    plain = apart(reference(spec, params, documents)[1], want)
    for more in ({}, {"kv_grad_dtype": "bfloat16"}):
        grads = chunkflow.value_and_grad(
            spec, params, documents, chunk_tokens=8, live_chunks=2, **more
        )[1]
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
        assert apart(grads, want) < 1.3 * plain < 0.1


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "name",
    ["dense", *(pytest.param(x, marks=pytest.mark.slow) for x in ("moe", "hybrid"))],
)
def test_on_a_mesh(name):
    """Rows over data and fsdp, heads over tensor; as on one device."""
    with jax.enable_x64(True):
        spec, rules = wide(SPECS[name]), mesh.Rules()
        tree = models.init(spec, 1)
        documents = draw([3, 25, 8, 30, 17, 2, 7, 9, 5, 12])
        how = {"chunk_tokens": 8, "live_chunks": 2, "router_losses": True}
        want = chunkflow.value_and_grad(spec, tree, documents, **how)
        devices = mesh.make(mesh.MeshConfig(2, 2, 2, 1), jax.devices()[:8])
        layout = params_lib.shardings(decoder.decoder_params(spec), devices, rules)
        with jax.set_mesh(devices):
            laid = jax.tree.map(jax.device_put, tree, layout)
            got = chunkflow.value_and_grad(spec, laid, documents, rules=rules, **how)
        same = jax.tree.map(lambda x, y: x.sharding == y.sharding, got[1], laid)
        assert all(jax.tree.leaves(same))
        assert_same(got, want, 1e-12)


def test_programs_are_few():
    """Steps of other documents run what is compiled for a few numbers of chunks."""
    spec = DENSE
    params = models.init(spec, 1)

    def sizes():
        group, packed = gradients.group_gradients, gradients.packed_gradients
        return group._cache_size(), packed._cache_size()

    def step_of(*lengths):
        chunkflow.value_and_grad(spec, params, draw(lengths), chunk_tokens=10)

    step_of(3, 35, 15)  # 4 and 2 chunks
    before = sizes()
    step_of(9, 2, 40, 11, 31, 20, 9, 9)
    assert before == (sizes())
    step_of(41)
    assert sizes() == (before[0] + 1, before[1])


def test_bad_input_is_refused_before_anything_runs():
    params = {}  # nothing looks at it

    def refused(words, documents, spec=DENSE, **settings):
        settings = {"chunk_tokens": 8} | settings
        with pytest.raises(config.InputError, match=words):
            chunkflow.value_and_grad(spec, params, documents, **settings)

    long, dear = (
        np.zeros(1 << 22, int),
        dataclasses.replace(
            DENSE, num_kv_heads=2, num_heads=2, head_width=8192, num_layers=64
        ),
    )
    refused(
        "a document of 4194304 tokens needs .* GiB", [long], dear, chunk_tokens=4096
    )
    refused("chunk_tokens=0: wanted at least 1", [[1, 2]], chunk_tokens=0)
    refused("live_chunks=0: wanted at least 1", [[1, 2]], live_chunks=0)
    refused(r"documents\[1\] has 0 tokens: .*leave it out", [[1, 2], []])
    refused(r"documents\[0\] is float64\[2\]", [[0.5, 2]])
    refused(r"documents\[0\] is int64\[1, 2\]", [[[1, 2]]])
    refused(r"documents\[1\] has ids 3 to 50: wanted 0 to 49", [[1, 2], [3, 50]])
    refused(r"documents\[0\] has ids 1 to 4294967299", [[1, 2**32 + 3]])
    refused("kv_grad_dtype='int32': wanted bfloat16", [[1, 2]], kv_grad_dtype="int32")
    refused("2 documents have no target", [[1], [2]])
    refused("0 documents have no target", [])
    refused(
        "chunk_tokens=700: above 512 wanted a multiple of 128; set it to 768",
        [[1, 2]],
        chunk_tokens=700,
    )
    refused("remat='all'", [[1, 2]], remat="all")
    chosen = dataclasses.replace(
        DENSE, indexed=spec_lib.Indexed(heads=1, width=8, budget=8, ratio=4)
    )
    refused("attention that chooses its keys", [[1, 2]], spec=chosen)
    far = dataclasses.replace(DENSE, dual_chunk=spec_lib.DualChunk(8, 4, 8))
    refused("9 tokens needs dual chunk attention", [list(range(9))], spec=far)
    refused("head='none'", [[1, 2]], spec=dataclasses.replace(DENSE, head="none"))
