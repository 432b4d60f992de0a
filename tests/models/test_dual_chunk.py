# SPDX-License-Identifier: Apache-2.0
"""Dual chunk attention equals a loop over pairs: in blocks, packed, padded, cached."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax import params as params_lib
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decode, decoder, dual_chunk, hf_config, rope
from qwen_jax.models import spec as spec_lib
from tests.oracles import dual_chunk as oracle

CHUNKS = {
    "usual": spec_lib.DualChunk(16, 4),
    "tempered": spec_lib.DualChunk(16, 4, original_positions=10),
    "mostly local": spec_lib.DualChunk(16, 11),  # 2 c - 1 below chunk_size
}
SPEC = spec_lib.Spec(
    vocab_size=64,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
    max_positions=256,
    rope_theta=100.0,
    init_std=0.3,
    qkv_bias=True,
    qk_norm=False,
    family="qwen2",
    dual_chunk=CHUNKS["tempered"],
)
RULES = mesh.Rules()
B, T = 2, 50


def rows():
    """A whole row, and one of documents that end anywhere, with padding before and
    after."""
    segments = np.ones((B, T), np.int32)
    segments[1, :3], segments[1, 3:34], segments[1, 34:35] = 0, 1, 2
    segments[1, 35:48], segments[1, 48:] = 3, 0
    return segments


def drawn(dtype=np.float64, seed=0):
    draw = np.random.default_rng(seed)
    shapes = [(B, T, n, 8) for n in (4, 2, 2)]
    return [2 * draw.standard_normal(shape).astype(dtype) for shape in shapes]


def turned(spec, q, k, segments):
    """Queries and keys as a layer gives them: at their position in the chunk."""
    at = dual_chunk.counted(jnp.asarray(segments))
    turns = rope.angles(spec, at % spec.dual_chunk.stride)
    return rope.apply(q, *turns), rope.apply(k, *turns), at


def attend(spec, q, k, v, segments, **how):
    q, k, at = turned(spec, q, k, segments)
    return dual_chunk.attention(q, k, v, at, segments, spec=spec, rules=RULES, **how)


@pytest.mark.parametrize("name", CHUNKS)
def test_equal_to_the_loop_over_pairs(name):
    chunks, segments = CHUNKS[name], rows()
    with jax.enable_x64(True):
        spec = dataclasses.replace(
            SPEC, dual_chunk=chunks, compute_dtype="float64", param_dtype="float64"
        )
        q, k, v = drawn()
        plain = attend(spec, q, k, v, segments, plain=True)
        blocks = attend(spec, q, k, v, segments, block=7)
    for row, head in np.ndindex(B, 4):
        want = oracle.attention(
            q[row, :, head],
            k[row, :, head // 2],
            v[row, :, head // 2],
            segments[row],
            chunk_size=chunks.chunk_size,
            local_size=chunks.local_size,
            original=chunks.original_positions,
            theta=SPEC.rope_theta,
        )
        np.testing.assert_allclose(plain[row, :, head], want, atol=1e-12)
        np.testing.assert_allclose(blocks[row, :, head], want, atol=1e-12)


def test_no_distance_passes_the_trained_length():
    for chunks in CHUNKS.values():
        sizes = chunks.chunk_size, chunks.local_size
        far = [[oracle.distance(i, j, *sizes) for j in range(i + 1)] for i in range(90)]
        assert max(map(max, far)) == min(2 * chunks.stride - 1, chunks.chunk_size)
        assert min(map(min, far)) == 0
        near = min(chunks.local_size, chunks.stride - 1)
        for i, row in enumerate(far):
            for j in range(max(0, i - near), i + 1):
                assert row[j] == i - j


def test_gradients_of_blocks_are_those_of_the_twin():
    segments = rows()
    with jax.enable_x64(True):
        spec = dataclasses.replace(SPEC, compute_dtype="float64", param_dtype="float64")
        weight = jnp.asarray(drawn(seed=1)[0])

        def loss(operands, **how):
            return jnp.sum(weight * attend(spec, *operands, segments, **how))

        operands = drawn()
        want = jax.jit(jax.grad(lambda x: loss(x, plain=True)))(operands)
        got = jax.jit(jax.grad(lambda x: loss(x, block=16)))(operands)
        for a, b in zip(got, want, strict=True):
            assert np.abs(b).max() > 0.1
            np.testing.assert_allclose(a, b, atol=1e-11)


def test_memory_grows_with_the_length_not_its_square():
    def temporary(t):
        q, kv = jnp.ones((1, t, 4, 8)), jnp.ones((1, t, 2, 8))
        at = jnp.broadcast_to(jnp.arange(t)[None], (1, t))

        def loss(q, k, v):
            how = {"spec": SPEC, "rules": RULES, "block": 64}
            return jnp.sum(dual_chunk.attention(q, k, v, at, **how) ** 2)

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return run.lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2.3 * temporary(1024)
    assert temporary(2048) < 2048 * 2048 * 4


@pytest.fixture(scope="module")
def params():
    return models.init(SPEC, 0)


def ids(seed=0):
    return np.random.default_rng(seed).integers(0, 64, (B, T)).astype(np.int32)


def test_short_rows_are_ordinary_attention(params):
    plain = dataclasses.replace(SPEC, dual_chunk=None)
    tokens = ids()[:, :12]
    chunks = spec_lib.DualChunk(16, 4, original_positions=12)
    spec = dataclasses.replace(SPEC, dual_chunk=chunks)
    want = models.forward(plain, params, tokens)
    np.testing.assert_array_equal(models.forward(spec, params, tokens), want)
    # Also where the rule itself is run: positions that are given may be any.
    at = jnp.broadcast_to(jnp.arange(12)[None], tokens.shape)
    got = models.forward(spec, params, tokens, positions=at)
    np.testing.assert_allclose(got, want, atol=2e-5)
    longer = models.forward(spec, params, ids())
    assert np.abs(longer - models.forward(plain, params, ids())).max() > 0.1


def test_packed_and_padded_rows_equal_separate_rows(params):
    tokens, segments = ids(), rows()
    forward = jax.jit(lambda t, s: models.forward(SPEC, params, t, segments=s))
    got = forward(tokens, segments)
    for row, start, stop in [(0, 0, T), (1, 3, 34), (1, 34, 35), (1, 35, 48)]:
        alone = models.forward(SPEC, params, tokens[row : row + 1, start:stop])
        np.testing.assert_allclose(got[row, start:stop], alone[0], atol=3e-5)


def test_cached_decoding_equals_whole_rows(params):
    """In one part, in several, and one token a time over a border of chunks."""
    tokens, segments = ids(), rows()
    whole = models.forward(SPEC, params, tokens, segments=segments)
    run = jax.jit(lambda t, s, c: models.forward(SPEC, params, t, segments=s, cache=c))
    for cuts in ([0, T], [0, 20, 22, 44, *range(45, T + 1)]):
        cache, parts = cache_lib.init(SPEC, B, T + 3), []
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            part = slice(start, stop)
            logits, cache = run(tokens[:, part], segments[:, part], cache)
            parts.append(logits)
        got, real = np.concatenate(parts, axis=1), segments > 0
        np.testing.assert_allclose(got[real], np.asarray(whole)[real], atol=3e-5)
    with pytest.raises(ValueError, match="leave positions out"):
        models.forward(
            SPEC, params, tokens[:, :1], cache=cache_lib.init(SPEC, B, T),
            positions=np.zeros((B, 1), np.int32),
        )  # fmt: skip


def test_long_prefill_in_blocks_of_queries():
    """More new tokens than a block of the cached kernel holds."""
    draw = np.random.default_rng(3)
    t, s = 300, 310
    q = jnp.asarray(draw.standard_normal((1, 3, t, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(draw.standard_normal((1, 2, s, 8)), jnp.float32) for _ in "kv")
    k = k.swapaxes(2, 3)
    at = jnp.arange(s)[None]
    segments = jnp.where(at < t + 5, 1, 0)
    got = dual_chunk.over_cache(
        q, k, v, at[:, 5 : t + 5], at, segments[:, 5 : t + 5], segments, 5, stride=12
    )
    parts = [
        dual_chunk.over_cache(
            q[:, :, i : i + 100], k, v, at[:, i + 5 : i + 105], at,
            segments[:, i + 5 : i + 105], segments, i + 5, stride=12,
        )
        for i in (0, 100, 200)
    ]  # fmt: skip
    np.testing.assert_allclose(got, jnp.concatenate(parts, axis=1), atol=1e-5)


def test_generation_follows_whole_forward_passes(params):
    prompts = [list(map(int, ids()[0, :21])), [7, 9]]
    got = decode.generate(SPEC, params, prompts, max_tokens=20)
    forward = jax.jit(lambda t, s: models.forward(SPEC, params, t, segments=s))
    for prompt, new in zip(prompts, got, strict=True):
        row, segments = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
        whole = prompt + new
        row[0, : len(whole)], segments[0, : len(whole)] = whole, 1
        logits = np.asarray(forward(row, segments))[0]
        start = len(prompt) - 1
        assert list(logits[start : start + 20].argmax(-1)) == new


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield dataclasses.replace(SPEC, param_dtype="float64", compute_dtype="float64")


def test_a_mesh_computes_the_same(wide):
    spec = wide
    tokens, segments = np.repeat(ids(), 4, axis=0), np.repeat(rows(), 4, axis=0)
    params = models.init(spec, 0)
    want = models.forward(spec, params, tokens, segments=segments)
    on = mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(on):
        layout = params_lib.shardings(decoder.decoder_params(spec), on, RULES)
        placed = jax.device_put(params, layout)
        batch = mesh.sharding(on, RULES.pspec("batch", None))
        tokens, segments = jax.device_put((tokens, segments), batch)
        run = jax.jit(
            lambda p, t, s: models.forward(spec, p, t, segments=s, rules=RULES)
        )
        np.testing.assert_allclose(run(placed, tokens, segments), want, atol=1e-11)
        cache = cache_lib.init(spec, 8, T, RULES)
        cached = jax.jit(
            lambda p, t, s, c: models.forward(
                spec, p, t, segments=s, cache=c, rules=RULES
            )[0]
        )
        got = cached(placed, tokens, segments, cache)
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(
        np.asarray(got)[real], np.asarray(want)[real], atol=1e-11
    )


def test_config_json_tells_of_it(params, tmp_path):
    models.save(SPEC, params, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["dual_chunk_attention_config"] == {
        "chunk_size": 16,
        "local_size": 4,
        "original_max_position_embeddings": 10,
    }
    assert models.load(tmp_path)[0] == SPEC
    published = {  # of Qwen2.5-7B-Instruct-1M
        "chunk_size": 262_144,
        "local_size": 8192,
        "original_max_position_embeddings": 262_144,
    }
    raw["dual_chunk_attention_config"] = published
    spec = hf_config.spec_from_config(raw)
    assert spec.dual_chunk == spec_lib.DualChunk(262_144, 8192, 262_144)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dual_chunk": {"chunk_size": 8, "local_size": 8}}, "local_size=8 must be"),
        ({"window": 8}, "dual_chunk stands for itself"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "dual_chunk stands"),
    ],
)
def test_chunks_that_cannot_be(changes, told):
    with pytest.raises(config.InputError, match=told):
        config.freeze(spec_lib.Spec, config.thaw(SPEC) | changes, at="model")
