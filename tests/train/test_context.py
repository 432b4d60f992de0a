# SPDX-License-Identifier: Apache-2.0
"""A step whose rows are split over devices is the step of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config as config_lib
from qwen_jax import mesh, models
from qwen_jax import params as params_lib
from qwen_jax.models import context, decoder, delta, flops
from qwen_jax.models import spec as spec_lib
from qwen_jax.plan import collectives
from qwen_jax.train import step

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
ROWS, TOKENS, WORDS = 4, 24, 40
DENSE = spec_lib.Spec(
    vocab_size=WORDS,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=24,
    max_positions=512,
    init_std=0.3,
    compute_dtype="float64",
    param_dtype="float64",
)
MOE = spec_lib.MoE(
    num_experts=4,
    experts_per_token=2,
    ffn_width=12,
    shared_width=8,
    balance_coef=0.1,
    z_coef=0.01,
)
DELTA = spec_lib.Delta(
    key_heads=2, value_heads=4, key_width=8, value_width=8, conv_taps=4
)
SPECS = {
    "dense": DENSE,
    "window": dataclasses.replace(DENSE, num_layers=3, window=5, full_layers=1),
    "moe": dataclasses.replace(DENSE, num_layers=1, moe=MOE),
    "moe and mlp": dataclasses.replace(DENSE, moe=MOE, dense_layers=(0,)),
    "delta": dataclasses.replace(
        DENSE, num_layers=1, mixers=("delta",), delta=DELTA, tie_embedding=False
    ),
    "hybrid": dataclasses.replace(
        DENSE, num_layers=4, mixers=("delta", "delta", "attention"), delta=DELTA
    ),
    "streams": dataclasses.replace(DENSE, streams=spec_lib.Streams(2, 4)),
    "gate": dataclasses.replace(
        DENSE, output_gate=True, norm_offset=True, qk_norm=False, qkv_bias=True
    ),
}


NGRAM = {
    "mixers": ("attention", "delta"),
    "delta": DELTA,
    "streams": spec_lib.Streams(2, 4),
    "ngram": spec_lib.Ngram(layers=(1,), size=2, heads=1, width=4, base=50, multiple=1),
}


def batch():
    """[1, rows, t] of documents of many lengths, padding behind and one row whole."""
    draw = np.random.default_rng(0)
    lengths = [(9, 1, 6, 7), (24,), (2, 2, 17), (13, 4)]
    shape = (1, ROWS, TOKENS)
    rows = {"tokens_bt": draw.integers(0, WORDS, shape).astype(np.int32)}
    rows["targets_bt"] = draw.integers(0, WORDS, shape).astype(np.int32)
    rows["segments_bt"] = np.zeros(shape, np.int32)
    rows["positions_bt"] = np.zeros(shape, np.int32)
    for i, row in enumerate(lengths):
        at = 0
        for j, n in enumerate(row):
            rows["segments_bt"][0, i, at : at + n] = j + 1
            rows["positions_bt"][0, i, at : at + n] = np.arange(n)
            at += n
    counted = (rows["segments_bt"] > 0) & (draw.random(shape) < 0.8)
    return rows | {"mask_bt": counted.astype(np.float32)}


def run(spec, rules, config, params, rows):
    fn = functools.partial(step.gradients, spec=spec, rules=rules, config=config)
    return jax.jit(fn)(params, rows)


@functools.cache
def alone(name, config):
    spec = SPECS[name]
    params = models.init(spec, 1)
    rows = jax.tree.map(jnp.asarray, batch())
    return params, *run(spec, mesh.Rules(), config, params, rows)


def on_mesh(name, sizes, config, rules=None, micro=1, run=run):
    """(gradients, sums) with the tokens laid out over `context`."""
    rules, spec = rules or mesh.Rules(), SPECS[name]
    params, *_ = alone(name, config)
    count = np.prod(dataclasses.astuple(sizes))
    devices = mesh.make(sizes, jax.devices()[:count])
    layout = params_lib.shardings(decoder.decoder_params(spec), devices, rules)
    order = mesh.zigzag(TOKENS, sizes.context)
    with jax.set_mesh(devices):
        lies = jax.NamedSharding(devices, jax.P(None, *rules.pspec("batch", "tokens")))
        rows = {
            k: jax.device_put(x.reshape(micro, -1, TOKENS)[..., order], lies)
            for k, x in batch().items()
        }
        laid = jax.tree.map(jax.device_put, params, layout)
        grads, parts = run(spec, rules, config, laid, rows)
    if parts is None:
        return grads, parts
    same = jax.tree.map(lambda x, y: x.sharding == y.sharding, grads, laid)
    assert all(jax.tree.leaves(same))
    return grads, parts


CONFIG = step.StepConfig(z_loss=0.03)


def check(name, sizes, rules=None, config=CONFIG, micro=1):
    with jax.enable_x64(True):
        _, wanted, sums = alone(name, config)
        grads, parts = on_mesh(name, sizes, config, rules, micro)
        assert_same(parts, sums)
        assert_same(grads, wanted)


def assert_same(got, want, tolerance=1e-10):
    for path, leaf in jax.tree.leaves_with_path(want):
        here = got
        for key in path:
            here = here[key.key]
        here, leaf = np.asarray(here), np.asarray(leaf)
        scale, off = np.max(np.abs(leaf)), np.max(np.abs(here - leaf))
        assert off <= tolerance * scale, (jax.tree_util.keystr(path), off, scale)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dense", mesh.MeshConfig(data=1, fsdp=2, tensor=2, context=2)),
        ("moe", mesh.MeshConfig(data=1, expert=2, context=2)),
        ("delta", mesh.MeshConfig(data=1, context=4)),
    ],
)
def test_gradients_are_those_of_one_device(name, sizes):
    check(name, sizes)


MESHES = {
    "context 2": mesh.MeshConfig(data=1, context=2),
    "context 4": mesh.MeshConfig(data=1, context=4),
    "data 2, context 4": mesh.MeshConfig(data=2, context=4),
    "fsdp 2, context 2": mesh.MeshConfig(data=1, fsdp=2, context=2),
    "tensor 2, context 2": mesh.MeshConfig(data=1, tensor=2, context=2),
    "expert 2, tensor 2, context 2": mesh.MeshConfig(
        data=1, expert=2, tensor=2, context=2
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", SPECS)
def test_every_model_on_every_mesh(name, sizes):
    check(name, MESHES[sizes])


GATHER = mesh.Rules(context_attention="gather")
BOTH = mesh.Rules(embed=("fsdp", "context"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "window", "hybrid"])
def test_keys_that_are_gathered(name):
    check(name, MESHES["tensor 2, context 2"], GATHER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe and mlp"])
def test_weights_may_be_split_over_context_too(name):
    check(name, MESHES["fsdp 2, context 2"], BOTH)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe and mlp", "hybrid"])
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, document_mask=False),
        dataclasses.replace(CONFIG, loop="unroll", remat="dots"),
        dataclasses.replace(CONFIG, remat="full"),
    ],
)
def test_settings_of_a_step(name, config):
    check(name, MESHES["context 4"], config=config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe and mlp"])
def test_micro_batches(name):
    """The balance loss sees the counts of those before: beside one device's."""
    with jax.enable_x64(True):
        one = mesh.MeshConfig(data=1)
        wanted, sums = on_mesh(name, one, CONFIG, micro=2)
        grads, parts = on_mesh(name, MESHES["context 4"], CONFIG, micro=2)
        assert_same(parts, sums)
        assert_same(grads, wanted)


@pytest.mark.parametrize(
    "way", ["ring", pytest.param("gather", marks=pytest.mark.slow)]
)
def test_what_a_step_sends(way):
    """Keys go round and nothing is gathered, or the other way; sums of gradients."""

    def compiled(spec, rules, config, params, rows):
        fn = functools.partial(step.gradients, spec=spec, rules=rules, config=config)
        text = jax.jit(fn).lower(params, rows).compile().as_text()
        return collectives.traffic(text, 4)[0], None

    with jax.enable_x64(True):
        rules = mesh.Rules(context_attention=way)
        sizes = mesh.MeshConfig(data=1, context=4)
        found, _ = on_mesh("dense", sizes, CONFIG, rules, run=compiled)
    found = {one.kind: one for one in found}
    each = ROWS * TOKENS // 4
    keys, layers = 2 * 2 * 8 * 8 * each, DENSE.num_layers  # and values, in bytes
    # Each gradient once, that of the tied table for both its uses, and a few sums.
    sums = flops.num_params(DENSE) + WORDS * DENSE.width
    assert 0 <= found.pop("all-reduce").bytes - 2 * 3 / 4 * 8 * sums < 100
    if way == "ring":
        # Three steps in each pass, and gradients once more, to come home.
        want, ids = layers * keys * (3 + 3 + 4), layers * 4 * each * (3 + 3)
        assert found.keys() == {"collective-permute"}
        assert want < found["collective-permute"].bytes <= want + ids
    else:
        want, ids = layers * 3 * keys, layers * 3 * 4 * each
        assert found.keys() == {"all-gather", "reduce-scatter"}
        assert 2 * want < found["all-gather"].bytes <= 2 * (want + ids)
        assert found["reduce-scatter"].bytes == want


def test_what_takes_whole_rows_is_refused_with_the_fix():
    def refused(words, tokens=TOKENS, see=False, depths=0, **changes):
        spec = dataclasses.replace(DENSE, **changes)
        with pytest.raises(config_lib.InputError, match=words):
            context.check(spec, tokens, 2, see=see, depths=depths)
        context.check(spec, tokens, 1, see=see, depths=depths)

    refused("=26 over mesh.context=2 .* multiple of 4.*seq_tokens=24", 26)
    refused("pieces of 1031 .* multiple of 256 x mesh.context", 4 * 1031)
    refused("'cudnn' takes whole rows.*attention=blockwise", attention="cudnn")
    refused("'splash' takes whole rows.*attention=blockwise", attention="splash")
    far = spec_lib.DualChunk(8, 4, 8)
    refused("dual_chunk.*mesh.context=1", dual_chunk=far)
    chosen = spec_lib.Indexed(heads=1, width=8, budget=8, ratio=4)
    refused("indexed.*--config.mesh.context=1", indexed=chosen)
    refused("ngram.*--config.mesh.context=1", **NGRAM)
    refused("images and videos.*--config.mesh.context=1", see=True)
    refused("the 3 layers for further tokens.*train.mtp_coef=0", depths=3)
    context.check(DENSE, TOKENS, 2)


def test_padding_may_stand_anywhere_for_linear_layers():
    """Tails and states pass over pieces that are all padding, or hold one token."""
    with jax.enable_x64(True):
        spec, rules, ways = SPECS["delta"], mesh.Rules(), 4
        draw = np.random.default_rng(1)
        params = models.init(spec, 1)
        x_btd = draw.normal(size=(3, TOKENS, spec.width))
        segments_bt = np.zeros((3, TOKENS), np.int32)
        segments_bt[0, [0, 1, 13, 22]] = 1
        segments_bt[1, 2:20] = np.where(draw.random(18) < 0.5, 2, 0)
        segments_bt[2, :5], segments_bt[2, 17:] = 1, 2

        def mix(params, x_btd, segments_bt):
            p = jax.tree.map(lambda x: x[0], params["layers"]["delta"])
            return delta.mix(p, x_btd, segments_bt, spec=spec, rules=rules)[0]

        want = jax.jit(mix)(params, x_btd, segments_bt)
        order = mesh.zigzag(TOKENS, ways)
        sizes = mesh.MeshConfig(data=1, context=ways)
        devices = mesh.make(sizes, jax.devices()[:ways])
        layout = params_lib.shardings(decoder.decoder_params(spec), devices, rules)
        with jax.set_mesh(devices):
            rows = jax.NamedSharding(devices, rules.pspec("batch", "tokens"))
            laid = [jax.device_put(x[:, order], rows) for x in (x_btd, segments_bt)]
            got = jax.jit(mix)(jax.device_put(params, layout), *laid)
        got = np.asarray(got)[:, np.argsort(order)]
        assert np.abs(np.asarray(want)[segments_bt > 0]).max() > 0.1
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
