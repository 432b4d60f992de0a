# SPDX-License-Identifier: Apache-2.0
"""Images and videos among tokens: positions, layouts, meshes, folders, bad input."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import config, mesh, models
from qwen_jax import params as params_lib
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decoder, flops, hf, hf_config, rope, sizes, vision, vl
from qwen_jax.models import spec as spec_lib
from qwen_jax.optim import build
from qwen_jax.train import step
from tests.models import tiny_vl

# Weights of the published checkpoints: half of `total_size` in the index of their
# safetensors files.
PUBLISHED = {
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2-vl-72b": 73_405_560_320,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-30b-a3b": 31_070_754_032,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    assert flops.num_params(sizes.get(name)) == PUBLISHED[name]


def tiny(name, **changes):
    """The Spec of a tiny model."""
    kind, text, tower, outer = tiny_vl.CASES[name]
    ids = {
        "image_token_id": tiny_vl.IMAGE,
        "video_token_id": tiny_vl.VIDEO,
        "vision_start_token_id": tiny_vl.START,
        "vision_end_token_id": tiny_vl.END,
    }
    text = text | {"model_type": f"{name}_text"}
    raw = {"model_type": name, "text_config": text, "vision_config": tower}
    spec = hf_config.spec_from_config(raw | ids | outer)
    return dataclasses.replace(spec, init_std=0.2, **changes)


def drawn(spec, seed=0):
    """Weights of a Spec, without a program that draws them."""
    draw = np.random.default_rng(seed)
    return params_lib.tree_map(
        lambda p: jnp.asarray(draw.normal(0, 0.2, p.shape), jnp.float32),
        decoder.decoder_params(spec),
    )


# ---- Positions.

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)).map(
    lambda g: (g[0], 2 * g[1], 2 * g[2])
)
PARTS = st.one_of(
    st.integers(1, 6),
    st.tuples(st.just("image"), SIZES.map(lambda g: (1, *g[1:]))),
    st.tuples(st.just("video"), SIZES),
)
ROWS, LONGEST, GRIDS = 2, 160, 9  # so that a family compiles once


@functools.cache
def traced_positions(name):
    """Positions inside a program."""
    return jax.jit(
        lambda ids, segments, see: vl.positions(tiny(name), ids, segments, **see)
    )


def reference_positions(spec, ids, segments, images, videos, seconds):
    """get_rope_index of the family's model in transformers."""
    torch = pytest.importorskip("torch")
    import transformers

    kind = tiny_vl.CASES[spec.family][0]
    cls = getattr(transformers, f"{kind}Model")
    tower = types.SimpleNamespace(
        spatial_merge_size=2, tokens_per_second=spec.vision.tokens_per_second
    )
    self = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=tower),
        get_vision_position_ids=functools.partial(cls.get_vision_position_ids, None),
    )
    more = {}
    if spec.family == "qwen2_5_vl":
        more["second_per_grid_ts"] = torch.tensor(seconds)
    out, delta = cls.get_rope_index(
        self,
        torch.tensor(ids, dtype=torch.long),
        torch.tensor((ids == tiny_vl.IMAGE) * 1 + (ids == tiny_vl.VIDEO) * 2),
        image_grid_thw=torch.tensor(images, dtype=torch.long).reshape(-1, 3),
        video_grid_thw=torch.tensor(videos, dtype=torch.long).reshape(-1, 3),
        attention_mask=torch.tensor(segments),
        **more,
    )
    return out.numpy(), delta.numpy()[:, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]),
    st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=ROWS, max_size=ROWS),
    st.booleans(),
    st.integers(0, 100),
)
def test_positions_are_those_of_the_reference(name, docs, left, seed):
    spec = tiny(name)
    draw = np.random.default_rng(seed)
    apart = spec.vision.frame_blocks
    docs = [
        [(*p, apart) if not isinstance(p, int) and p[0] == "video" else p for p in d]
        for d in docs
    ]
    rows = [tiny_vl.row(draw, *parts) for parts in docs]
    ids = np.full((ROWS, LONGEST), 5, np.int32)
    segments = np.zeros((ROWS, LONGEST), np.int32)
    for i, row in enumerate(rows):
        start = LONGEST - len(row) if left else 0
        ids[i, start : start + len(row)] = row
        segments[i, start : start + len(row)] = 1
    images = [g for parts in docs for g in tiny_vl.grids(parts, "image")]
    videos = [g for parts in docs for g in tiny_vl.grids(parts, "video")]
    seconds = draw.integers(1, 12, len(videos)) / 4
    want, delta = reference_positions(spec, ids, segments, images, videos, seconds)
    grid, held = np.zeros((2, GRIDS, 3), np.int32)
    grid[: len(images)] = np.array(images).reshape(-1, 3)
    held[: len(videos)] = np.array(videos).reshape(-1, 3)
    held = {"grid_thw": held, "seconds_per_grid": np.ones(GRIDS, np.float32)}
    held["seconds_per_grid"][: len(videos)] = seconds
    see = {"images": {"grid_thw": grid}, "videos": held}
    got = vl.positions(spec, ids, segments, **see)
    assert isinstance(got, np.ndarray) and got.dtype == np.int32
    np.testing.assert_array_equal(got, want)
    # Where decoding goes on.
    np.testing.assert_array_equal(got.max((0, 2)) + 1 - segments.sum(1), delta)
    np.testing.assert_array_equal(traced_positions(name)(ids, segments, see), want)
    # Behind one another in one row.
    numbers = np.concatenate([segments[i] * (i + 1) for i in range(ROWS)])
    packed = vl.positions(spec, ids.reshape(1, -1), numbers[None], **see)
    np.testing.assert_array_equal(packed[:, 0], want.reshape(3, -1))


@pytest.mark.parametrize("name", tiny_vl.CASES)
def test_three_equal_positions_turn_like_one(name):
    spec = tiny(name)
    at = np.random.default_rng(0).integers(0, 99, (2, 9))
    one = rope.angles(spec, jnp.asarray(at))
    three = rope.angles(spec, jnp.asarray(np.stack([at] * 3)))
    for a, b in zip(one, three, strict=True):
        np.testing.assert_array_equal(a, b)


def test_three_positions_need_sections():
    spec = dataclasses.replace(tiny("qwen3_vl"), vision=None, mrope_sections=())
    with pytest.raises(config.InputError, match=r"shape \(3, 1, 4\) for a qwen3_vl"):
        rope.angles(spec, jnp.zeros((3, 1, 4), jnp.int32))


# ---- Layouts of patches.


PATCHES = 336


@functools.cache
def laid_out():
    """Layout, and a table of places brought to the patches."""
    tower = dataclasses.replace(
        tiny("qwen2_5_vl").vision, places=25, window=16, full_layers=()
    )

    @jax.jit
    def run(grids, table):
        where = vision.layout(tower, grids, PATCHES)
        return where, vision.placed(tower, table, where, "float32")

    return run


@settings(max_examples=25, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=3))
def test_the_layout_of_patches(grids):
    """Frames, rows, columns, windows and learned places, with padding behind."""
    torch = pytest.importorskip("torch")
    from transformers import vision_utils

    count = int(sum(np.prod(g) for g in grids))
    table = np.random.default_rng(0).normal(size=(25, 6)).astype(np.float32)
    padded = np.array((grids + [(0, 0, 0)] * 3)[:4], np.int32)
    got, placed = laid_out()(padded, table)
    there = torch.tensor(grids, dtype=torch.long)
    at = vision_utils.get_vision_position_ids(there, 2).numpy()
    np.testing.assert_array_equal(got.row_p[:count], at[:, 0])
    np.testing.assert_array_equal(got.column_p[:count], at[:, 1])
    ends = vision_utils.get_vision_cu_seqlens(there).numpy()
    want = np.searchsorted(ends, np.arange(count), side="right")
    np.testing.assert_array_equal(got.frame_p[:count], want)
    assert not np.asarray(got.frame_p)[count:].any()

    order, ends = vision_utils.get_vision_window_index(there, 2, 16, 4)
    order = (order.numpy()[:, None] * 4 + np.arange(4)).reshape(-1)
    np.testing.assert_array_equal(got.order_p[:count], order)
    mine = np.asarray(got.window_p)
    borders = np.flatnonzero(np.diff(mine[:count])) + 1
    np.testing.assert_array_equal(borders, ends.numpy()[1:-1])
    assert (mine[:count] > 0).all() and not mine[count:].any()
    merged = np.asarray(got.order_p)[::4] // 4
    np.testing.assert_array_equal(
        merged[np.asarray(got.back_m)], np.arange(len(merged))
    )

    index, share = vision_utils.get_vision_interpolation_indices_and_weights(
        there, 5, align_corners=True, spatial_merge_size=2
    )
    want = (table[index.numpy()] * share.numpy()[..., None]).sum(1)
    np.testing.assert_allclose(placed[:count], want, atol=2e-6)


# ---- Meshes, caches, ways to run.


def example(spec, rows=4, seed=0):
    """Tokens of rows with two images each and one video in all, and what they show:
    once all rows' together, once each row's apart."""
    draw = np.random.default_rng(seed)
    images, videos = [(1, 4, 4), (1, 2, 6)], (2, 4, 2)
    tail = ("video", videos, spec.vision.frame_blocks)
    parts = [2, ("image", images[0]), 1, ("image", images[1]), 2]
    ids = [tiny_vl.row(draw, *parts, tail, 3) for _ in range(rows)]
    size = spec.vision.patch_numbers
    apart = {}
    for kind, grid in (("images", images), ("videos", [videos])):
        count = int(sum(np.prod(g) for g in grid))
        apart[kind] = {
            "pixels": draw.normal(size=(rows, count, size)).astype(np.float32),
            "grid_thw": np.array([grid] * rows, np.int32),
        }
    together = {
        kind: {k: x.reshape(-1, x.shape[-1]) for k, x in part.items()}
        for kind, part in apart.items()
    }
    return np.array(ids, np.int32), together, apart


def value_and_grad(spec, params, ids, see, rules=None, **how):
    def loss(params):
        hidden, _ = decoder.hidden(spec, params, ids, rules=rules, **how, **see)
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)) * 3)

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def plain(name):
    """Weights, loss and gradients of the example without a mesh."""
    spec = tiny(name)
    params = drawn(spec)
    ids, together, _ = example(spec)
    return params, *value_and_grad(spec, params, ids, together)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.slow
def test_a_mesh_gives_the_same_numbers_and_gradients(name):
    spec = tiny(name)
    ids, together, apart = example(spec)
    params, value, grads = plain(name)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads["vision"]))
    rules = mesh.Rules()
    on = mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(on):
        tree = decoder.decoder_params(spec)
        placed = jax.device_put(params, params_lib.shardings(tree, on, rules))
        rows = mesh.sharding(on, rules.pspec("batch", None))
        there = jax.device_put(ids, rows)
        for see in (together, apart):
            got, theirs = value_and_grad(spec, placed, there, see, rules)
            np.testing.assert_allclose(got, value, rtol=2e-6)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(
                    a, b, atol=2e-5 * np.abs(b).max() + 1e-7
                ),
                jax.device_get(theirs),
                jax.device_get(grads),
            )


@pytest.mark.slow
def test_loops_and_remat_change_nothing():
    """Nor do images that are given row by row."""
    spec = tiny("qwen3_vl")
    ids, _, apart = example(spec)
    params, value, grads = plain("qwen3_vl")
    got, theirs = value_and_grad(spec, params, ids, apart, loop="unroll", remat="full")
    np.testing.assert_allclose(got, value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()),
        theirs,
        grads,
    )


def test_bfloat16_stays_close():
    """Eight bits of each product, through a tower and a decoder of three layers."""
    spec = tiny("qwen3_vl")
    ids, see, _ = example(spec)
    run = jax.jit(models.forward, static_argnums=0)
    want = run(spec, plain("qwen3_vl")[0], ids, **see)
    half = dataclasses.replace(spec, compute_dtype="bfloat16")
    got = run(half, plain("qwen3_vl")[0], ids, **see)
    assert got.dtype == jnp.float32
    assert np.abs(got - want).max() < 0.1 * np.asarray(want).std()


@pytest.mark.slow
def test_micro_batches_with_images_sum_to_the_whole():
    """A step's batch has the images of each row by itself; two documents a row."""
    spec = tiny("qwen2_5_vl")
    ids, _, apart = example(spec, rows=4)
    segments = np.ones_like(ids)
    segments[:, 16:] = 2  # between an image and the video
    batch = {
        "tokens_bt": ids,
        "targets_bt": np.roll(ids, -1, axis=1),
        "mask_bt": (np.arange(ids.shape[1]) < 20)[None]
        * np.ones(ids.shape, np.float32),
        "segments_bt": segments,
        "positions_bt": 0 * ids,
        **apart,
    }
    how = {"spec": spec, "rules": mesh.Rules(), "config": step.StepConfig()}
    run = jax.jit(functools.partial(step.gradients, **how))
    both = []
    for micro in (1, 2):
        parts = jax.tree.map(lambda x, m=micro: x.reshape(m, -1, *x.shape[1:]), batch)
        both.append(run(plain("qwen2_5_vl")[0], parts))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()),
        both[1],
        both[0],
    )
    assert np.abs(both[0][0]["vision"]["patch_yd"]).max() > 1e-4


@pytest.mark.parametrize("name", tiny_vl.CASES)
def test_the_optimizer_knows_the_weights_of_a_tower(name):
    labels = build.label_tree(vision.vision_params(tiny(name)))
    assert labels["patch_yd"] == labels["layers"]["attention"]["q_ldnk"] == "matrix"
    assert labels["merger"]["down_fo"] == "matrix"
    assert (
        labels["merger"]["norm_d"] == labels["layers"]["mlp"]["up_bias_lf"] == "vector"
    )
    assert labels.get("place_vd", "embedding") == "embedding"


@pytest.mark.parametrize(
    "apart",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["stacked", "apart"],
)
def test_prefill_in_two_parts_is_the_whole(apart):
    """Images in both parts of the prompt; then one more token."""
    spec = tiny("qwen3_vl")
    params = drawn(spec, 2)
    if apart:
        params = decoder.unstacked(spec, params)
    ids, see, _ = example(spec, rows=1)
    ids = np.concatenate([ids, [[7]]], axis=1)
    run = jax.jit(functools.partial(models.forward, spec))
    whole = run(params, ids, **see)
    cut = 2 + 6 + 1  # behind the first image
    images = see["images"]
    first = {k: x[: 16 if k == "pixels" else 1] for k, x in images.items()}
    second = {k: x[16 if k == "pixels" else 1 :] for k, x in images.items()}
    cache = cache_lib.init(spec, 1, ids.shape[1])
    one, cache = run(params, ids[:, :cut], cache=cache, images=first)
    # 2 x 2 tokens of an image take two positions.
    assert cache.offset_b.tolist() == [-2]
    more = {"images": second, "videos": see["videos"]}
    two, cache = run(params, ids[:, cut:-1], cache=cache, **more)
    three, cache = run(params, ids[:, -1:], cache=cache)
    got = np.concatenate([one, two, three], axis=1)
    np.testing.assert_allclose(got, whole, atol=2e-5)


# ---- Folders.


def test_a_folder_as_it_was_first_published(tmp_path):
    """Flat config.json and `visual.` beside `model.`, as a release of 2024 has it."""
    spec = tiny("qwen2_vl")
    params = drawn(spec, 3)
    models.save(spec, params, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" not in raw and raw["vision_config"]["embed_dim"] == 24
    assert raw["rope_scaling"] == {"type": "mrope", "mrope_section": [1, 1, 2]}
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert "visual.blocks.0.attn.qkv.weight" in tensors
    assert "model.layers.0.mlp.up_proj.weight" in tensors
    assert models.load(tmp_path)[0] == spec
    # As transformers 5 saves it.
    names = {
        k: k.replace("model.", "model.language_model.", 1)
        if k.startswith("model.")
        else k.replace("visual.", "model.visual.", 1)
        for k in tensors
    }
    moved = {names[k]: x for k, x in tensors.items()}
    safetensors.numpy.save_file(moved, tmp_path / "model.safetensors")
    again = models.load(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("width", [20, 40, 32])
def test_experts_in_either_layout(tmp_path, width):
    """[expert, in, out] as published or [expert, out, in] as transformers 5 saves it,
    where one of the two tensors is square, too."""
    spec = tiny("qwen3_vl_moe")
    text = {"width": width, "num_heads": 2, "num_kv_heads": 1}
    spec = dataclasses.replace(spec, **text, dense_layers=())
    assert spec.moe.ffn_width == 20
    params = drawn(spec, 4)
    models.save(spec, params, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    down = tensors["model.language_model.layers.0.mlp.experts.down_proj"]
    # Readers that go by the shape alone take a square as [out, in].
    assert down.shape[1:] == ((width, 20) if width == 40 else (20, width))
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], params)
    turned = {
        k: np.ascontiguousarray(x.swapaxes(1, 2)) if ".experts." in k else x
        for k, x in tensors.items()
    }
    safetensors.numpy.save_file(turned, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], params)


# ---- Bad input.


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda see: see["images"].update(pixels=see["images"]["pixels"][:, :-1]),
            r"pixels of images have shape \(56, 95\), wanted \[patches, 96\]",
        ),
        (
            lambda see: see["images"].update(pixels=see["images"]["pixels"][:-1]),
            "images have 55 patches, wanted a multiple of 4",
        ),
        (
            lambda see: see["images"].update(pixels=see["images"]["pixels"][:-4]),
            "grid_thw of images counts 56 patches, pixels have 52",
        ),
        (
            lambda see: see["images"].update(grid_thw=np.ones((4, 2), np.int32)),
            r"grid_thw of images has shape \(4, 2\) beside pixels of \(56, 96\)",
        ),
        (
            lambda see: see["images"]["grid_thw"].__setitem__((1, 2), 5),
            r"grid_thw of images has \[1, 2, 5\]: rows 2 and columns 5 must be "
            "multiples of 2",
        ),
        (
            lambda see: see["images"]["grid_thw"].__setitem__((1, 2), 4),
            r"tokens have 14 placeholders \(id 90\), images give 13 embeddings",
        ),
        (
            lambda see: see["videos"]["grid_thw"].__setitem__((1, 0), 1),
            r"tokens have 8 placeholders \(id 91\), videos give 6 embeddings",
        ),
        (lambda see: see["videos"].pop("grid_thw"), "videos lack grid_thw"),
    ],
)
def test_images_that_do_not_fit_are_named(change, told):
    spec = tiny("qwen3_vl")
    ids, see, _ = example(spec, rows=2)
    params = drawn(spec)
    change(see)
    with pytest.raises(config.InputError, match=told):
        models.forward(spec, params, ids, **see)


def test_rows_apart_that_do_not_fit_are_named():
    spec = tiny("qwen3_vl")
    ids, _, apart = example(spec, rows=3)
    with pytest.raises(config.InputError, match="images of 3 rows .* tokens of 2 rows"):
        vl.check(spec, ids[:2], images=apart["images"])
    ids[1, 3] = 5
    with pytest.raises(config.InputError, match="tokens of row 1 have 6 placeholders"):
        vl.check(spec, ids, images=apart["images"])


def test_images_by_rows_with_videos_of_all_rows_are_refused():
    spec = tiny("qwen3_vl")
    ids, see, apart = example(spec, rows=2)
    with pytest.raises(config.InputError, match="give both by rows, or neither"):
        vl.check(spec, ids, images=apart["images"], videos=see["videos"])


def test_a_model_without_vision_refuses_images():
    spec = spec_lib.Spec(num_layers=1)
    with pytest.raises(
        config.InputError, match="images given to a qwen3 model without"
    ):
        vl.check(spec, np.zeros((1, 4)), images={"pixels": 0, "grid_thw": 0})


def test_too_few_embeddings_in_a_program_are_not_silent():
    spec = tiny("qwen3_vl")
    ids, see, _ = example(spec, rows=1)
    images = see["images"]
    run = jax.jit(
        lambda ids, grid: models.forward(
            spec, drawn(spec), ids, images=images | {"grid_thw": grid}
        )
    )
    ids[ids == tiny_vl.VIDEO] = 5
    assert np.isfinite(run(ids, images["grid_thw"])).all()
    assert np.isnan(run(ids, images["grid_thw"] * [[1], [0]])).any()


@pytest.mark.parametrize(
    "family, where, value, told",
    [
        ("qwen3_vl", "hidden_act", "relu", "'relu' in a qwen3_vl model: wanted 'gelu_"),
        ("qwen2_5_vl", "out_hidden_size", 48, "ends in 48 numbers .* begins with 32"),
        ("qwen3_vl", "patch_size", [4, 8], r"patch_size is \[4, 8\]: wanted equal"),
        ("qwen3_vl", "num_position_embeddings", 24, "places=24 is not a square"),
        ("qwen3_vl", "deepstack_visual_indexes", [3], "the layers are 0 to 2"),
        ("qwen2_vl", "embed_dim", 20, "width=20 over vision.num_heads=2"),
    ],
)
def test_a_tower_that_is_not_ours_is_named(family, where, value, told):
    _, text, tower, _ = tiny_vl.CASES[family]
    raw = {"model_type": family, "text_config": text | {"model_type": f"{family}_text"}}
    raw["vision_config"] = tower | {where: value}
    with pytest.raises(config.InputError, match=told):
        hf_config.spec_from_config(raw)


def test_an_unknown_part_is_named(tmp_path):
    spec = tiny("qwen3_vl")
    models.save(spec, drawn(spec), tmp_path)
    with pytest.raises(config.InputError, match="parts='txt'; did you mean 'text'?"):
        hf.load(tmp_path, parts="txt")
