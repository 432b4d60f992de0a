# SPDX-License-Identifier: Apache-2.0
"""Kernels for GPUs beside numpy: interpreted on a CPU, on a GPU themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import mesh, models, one_row, params
from qwen_jax.models import decode, decoder, page_ways
from qwen_jax.models import norm as norm_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import paged_rows
from qwen_jax.serve import device, engine, request

INTERPRET = jax.default_backend() == "cpu"


def draw(seed, *shape, dtype="float32"):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x, dtype)


def exact(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(96, 64), (100, 200), (33, 512), (1040, 1536), (1, 1)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_row_is_a_product(outputs, inputs, dtype):
    w_oi, x_i = draw(0, outputs, inputs, dtype=dtype), draw(1, inputs, dtype=dtype)
    y_o = one_row.product(w_oi, x_i, interpret=INTERPRET)
    assert y_o.dtype == x_i.dtype
    want_o = exact(w_oi) @ exact(x_i)
    off = np.linalg.norm(exact(y_o) - want_o) / np.linalg.norm(want_o)
    assert off < (3e-3 if dtype == "bfloat16" else 1e-6)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_row_does_what_stands_around_it(offset, dtype):
    """RMSNorm before, several matrices, SwiGLU, the residual."""
    i, outputs = 600, (96, 33, 40)
    ws = [draw(n, o, i, dtype=dtype) * i**-0.5 for n, o in enumerate(outputs)]
    x_i, scale_i = draw(7, i, dtype=dtype), draw(8, i, dtype=dtype)
    norm = one_row.Norm(scale_i, 1e-6, offset)
    run = functools.partial(one_row.product, interpret=INTERPRET)
    x = norm_lib.rms_norm(x_i[None], scale_i, 1e-6, offset)[0]
    want = np.concatenate([exact(w) @ exact(x) for w in ws])
    tolerance = 2e-2 if dtype == "bfloat16" else 3e-6
    bounds = {"atol": tolerance, "rtol": tolerance}
    close = functools.partial(np.testing.assert_allclose, **bounds)
    close(exact(run(ws, x_i, norm=norm)), want)
    add_o = draw(9, 96, dtype=dtype)
    close(exact(run(ws[0], x_i, add_o=add_o)), exact(ws[0]) @ exact(x_i) + exact(add_o))
    pair = [ws[0], draw(10, 96, i, dtype=dtype) * i**-0.5]
    gate, up = (exact(w) @ exact(x) for w in pair)
    close(exact(run(pair, x_i, norm=norm, gated=True)), gate / (1 + np.exp(-gate)) * up)


def rows_by_hand(q_bnk, k_nhkc, v_nhck, table_bp, first_b, end_b):
    q_bnk, k_nhkc, v_nhck = exact(q_bnk), exact(k_nhkc), exact(v_nhck)
    (_, n, k), h = q_bnk.shape, v_nhck.shape[1]
    out_bnk = np.zeros(q_bnk.shape)
    for i, (first, end) in enumerate(zip(first_b, end_b, strict=True)):
        if end <= first:
            continue
        k_hks = np.concatenate([k_nhkc[page] for page in table_bp[i]], axis=2)
        v_hsk = np.concatenate([v_nhck[page] for page in table_bp[i]], axis=1)
        q_hgk = q_bnk[i].reshape(h, n // h, k) * k**-0.5
        s_hgs = np.einsum("hgk,hks->hgs", q_hgk, k_hks[:, :, first:end])
        p_hgs = np.exp(s_hgs - s_hgs.max(axis=-1, keepdims=True))
        p_hgs /= p_hgs.sum(axis=-1, keepdims=True)
        out_hgk = np.einsum("hgs,hsk->hgk", p_hgs, v_hsk[:, first:end])
        out_bnk[i] = out_hgk.reshape(n, k)
    return out_bnk


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (3, 3), (20, 1)])
def test_attention_over_the_pages_of_rows(heads, kv_heads, dtype):
    pages, width, c, rows, most = 60, 32, 16, 4, 9
    pools = (60, kv_heads, width, c), (60, kv_heads, c, width)
    k_nhkc, v_nhck = (draw(i, *one, dtype=dtype) for i, one in enumerate(pools))
    q_bnk = draw(3, rows, heads, width, dtype=dtype)
    order = np.random.default_rng(4).permutation(pages - 1) + 1
    table_bp = order[: rows * most].reshape(rows, most).astype(np.int32)
    # All of a row; from the middle of a page on; nothing; one token.
    first_b = np.array([0, 30, 5, 0], np.int32)
    end_b = np.array([most * c, 101, 5, 1], np.int32)
    operands = q_bnk, k_nhkc, v_nhck, table_bp, first_b, end_b
    out_bnk = paged_rows.attention(*operands, interpret=INTERPRET)
    assert out_bnk.dtype == q_bnk.dtype
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(exact(out_bnk), rows_by_hand(*operands), atol=tolerance)


def test_programs_are_enough_for_the_chip_and_no_more_than_pages():
    assert paged_rows.splits_for(rows=1, kv_heads=8, pages=64) == 16
    assert paged_rows.splits_for(rows=1, kv_heads=8, pages=3) == 2
    assert paged_rows.splits_for(rows=128, kv_heads=8, pages=64) == 1
    assert one_row.outputs_for(1024) == 1
    assert one_row.outputs_for(12288) == 8
    assert not paged_rows.fits(96, 64)
    assert not paged_rows.fits(128, 64, jnp.dtype("float64"))
    assert not one_row.there(jnp.dtype("float64"))
    assert paged_rows.fits(128, 64)


DENSE = spec_lib.Spec(
    vocab_size=300,
    width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    ffn_width=72,
    max_positions=512,
    init_std=0.4,  # so that the likeliest id is likely
)
SPECS = {
    "dense": DENSE,
    "window": dataclasses.replace(DENSE, window=20, full_layers=1),
    "bias": dataclasses.replace(DENSE, qk_norm=False, qkv_bias=True),
    "gate": dataclasses.replace(DENSE, output_gate=True, norm_offset=True),
    "moe": dataclasses.replace(
        DENSE, moe=spec_lib.MoE(num_experts=4, experts_per_token=2, ffn_width=24)
    ),
}


SLOW = {"bias", "gate", "moe"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in SPECS],
)
def test_an_engine_with_kernels_gives_the_answers_of_the_loop(name, monkeypatch):
    """Alone, where layers are `paged_one`'s, and three at once; with bursts."""
    monkeypatch.setattr(page_ways, "here", lambda: "kernel")
    spec, tree = SPECS[name], models.init(SPECS[name], 3)
    prompts = np.random.default_rng(0).integers(0, 300, (3, 37)).tolist()
    settings = device.Settings(
        rows=3, page_tokens=16, piece=32, max_tokens=64, burst=4, growth=3
    )
    made = engine.Engine(spec, tree, settings=settings, stop_ids=())
    want = decode.generate(spec, tree, prompts, max_tokens=14, stop_ids=())
    for some in (prompts[:1], prompts):
        asked = [
            request.Request(f"{len(some)}-{i}", tuple(one), 14, salt=str(len(some)))
            for i, one in enumerate(some)
        ]
        told = made.run(asked)
        got = [[t for piece in told[one.id] for t in piece.ids] for one in asked]
        assert got == want[: len(some)]


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_each_device_has_the_kernel_of_its_heads(monkeypatch):
    monkeypatch.setattr(page_ways, "here", lambda: "kernel")
    spec = dataclasses.replace(DENSE, width=64, num_layers=2, ffn_width=64)
    tree, rules = models.init(spec, 3), mesh.Rules(batch=None)
    prompts = np.random.default_rng(0).integers(0, 300, (2, 37)).tolist()
    want = decode.generate(spec, tree, prompts, max_tokens=6, stop_ids=())
    devices = mesh.make(mesh.MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    layout = params.shardings(decoder.decoder_params(spec), devices, rules)
    settings = device.Settings(rows=2, page_tokens=16, piece=64, max_tokens=64)
    with jax.set_mesh(devices):
        laid = jax.tree.map(jax.device_put, tree, layout)
        made = engine.Engine(spec, laid, settings=settings, rules=rules, stop_ids=())
    asked = [request.Request(str(i), tuple(one), 6) for i, one in enumerate(prompts)]
    told = made.run(asked)
    assert [[t for p in told[one.id] for t in p.ids] for one in asked] == want
