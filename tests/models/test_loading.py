# SPDX-License-Identifier: Apache-2.0
"""Weights from files onto devices: the same on every mesh, in little memory, whole.

That a folder by transformers gives transformers' logits is test_hf_parity.py's; here
the layouts that a mesh asks for are compared with a copy made from what the safetensors
library reads.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qwen_jax import config, mesh, models
from qwen_jax.models import hf, ngram, streaming, tensor_files, tensor_writer
from qwen_jax.models import spec as spec_lib

COMMON = {
    "vocab_size": 64,
    "width": 32,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_width": 16,
    "ffn_width": 48,
}
EXPERTS = spec_lib.MoE(num_experts=8, experts_per_token=2, ffn_width=24)
SHARED = spec_lib.MoE(8, 2, 24, shared_width=16)
HYBRID = {
    "mixers": ("delta", "delta", "delta", "attention"),
    "delta": spec_lib.Delta(4, 8, 8, 8),
    "output_gate": True,
    "norm_offset": True,
    "rotary_share": 0.5,
}
SPECS = {
    "qwen2": spec_lib.Spec(**COMMON, family="qwen2", qkv_bias=True, qk_norm=False),
    "qwen3_moe": spec_lib.Spec(
        **COMMON, family="qwen3_moe", moe=EXPERTS, tie_embedding=False
    ),
    "qwen3_next": spec_lib.Spec(**COMMON | HYBRID, family="qwen3_next", moe=SHARED),
    "qwen3_5_moe": spec_lib.Spec(**COMMON | HYBRID, family="qwen3_5_moe", moe=SHARED),
    "qwen4_exp": spec_lib.Spec(
        **COMMON | HYBRID,
        family="qwen4_exp",
        moe=SHARED,
        streams=spec_lib.Streams(2, 8),
        indexed=spec_lib.Indexed(4, 16),
        ngram=spec_lib.Ngram((0, 2), heads=4, width=64, base=50, multiple=8, shards=3),
    ),
}
MESHES = {
    "fsdp 2, tensor 2, expert 2": (1, 2, 2, 2),
    "data 2, tensor 4": (2, 1, 4, 1),
    "fsdp 8": (1, 8, 1, 1),
}


@pytest.fixture(scope="module", params=SPECS)
def folder(request, tmp_path_factory):
    """(spec, weights, folder) of a random model in several files."""
    made = tmp_path_factory.mktemp(request.param)
    spec = SPECS[request.param]
    weights = models.init(spec, 1)
    if spec.ngram is not None:  # a table has rows of its own, then zeros
        first, last = (x.rows for x in ngram.tables(spec.ngram, spec.vocab_size))
        tables = weights["layers"]["ngram"]
        assert first < last == tables["table_lvk"].shape[1]
        tables["table_lvk"] = tables["table_lvk"].at[0, first:].set(0)
    models.save(spec, weights, made, shard_bytes=40_000)
    assert (made / tensor_files.INDEX).is_file()
    return spec, weights, made


def on(sizes):
    return mesh.make(mesh.MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])


def same(tree, want):
    def one(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(
            np.asarray(a).view("u1"), np.asarray(b).view("u1")
        )

    jax.tree.map(one, tree, want)


def test_files_hold_what_the_library_finds(folder):
    spec, weights, made = folder
    found = {}
    for path in made.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    fused = spec.family in ("qwen3_5_moe", "qwen4_exp")
    named = dict(hf.named_tensors(spec, weights, fused=fused))
    assert found.keys() == named.keys()
    for key, value in named.items():
        np.testing.assert_array_equal(found[key], value)
    # A linear layer there is [out, in], heads joined.
    query = found["model.layers.3.self_attn.q_proj.weight"]
    ours = np.asarray(weights["layers"]["attention"]["q_ldnk"])[-1]
    if spec.output_gate:  # for each head its query, then its gate
        query = query.reshape(8, 2, 16, 32)[:, 0].reshape(128, 32)
    np.testing.assert_array_equal(query.T.reshape(32, 8, 16), ours)


@pytest.mark.parametrize("way", ["host", "device"])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_mesh_has_the_same_weights(folder, sizes, way, monkeypatch):
    spec, weights, made = folder
    if way == "device":  # as on an accelerator: a tensor at a time into its place
        monkeypatch.setattr(streaming, "_on_host", lambda device: False)
        monkeypatch.setattr(streaming, "SMALL_BYTES", 0)
    _, got = models.load(made, device_mesh=on(sizes), rules=mesh.Rules())
    same(got, weights)
    query = got["layers"]["attention"]["q_ldnk"]
    assert query.sharding.spec == jax.P(None, "fsdp", "tensor", None)
    assert query.addressable_shards[0].data.shape[1] == 32 // sizes[1]


@pytest.mark.parametrize("blocks", [1, 7])
def test_blocks_of_any_size_give_the_same(folder, blocks, monkeypatch):
    spec, weights, made = folder
    monkeypatch.setattr(streaming, "ROWS", blocks)
    monkeypatch.setattr(streaming, "CHUNK", 13 * blocks)
    same(models.load(made)[1], weights)


def test_a_cut_that_is_no_range_there_is_made_all_the_same(folder):
    """A value head on each device, two of which belong to one key head."""
    spec, weights, made = folder
    sizes, rules = (1, 1, 8, 1), mesh.Rules(kv_heads=None)
    same(models.load(made, device_mesh=on(sizes), rules=rules)[1], weights)


def test_a_table_of_ngrams_in_one_tensor_is_the_same(tmp_path):
    spec = SPECS["qwen4_exp"]
    spec = dataclasses.replace(spec, ngram=dataclasses.replace(spec.ngram, layers=(1,)))
    weights = models.init(spec)
    models.save(spec, weights, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    stem = "model.layers.1.ple.ple_embedding.ngram_embedding."
    parts = [tensors.pop(f"{stem}shard_{i}.weight") for i in range(3)]
    tensors[stem + "weight"] = np.concatenate(parts)
    safetensors.numpy.save_file(tensors, path)
    same(models.load(tmp_path)[1], weights)


class Half:
    """The layout of one of two processes: the first half of dim `dim`."""

    def __init__(self, dim):
        self.dim = dim

    def addressable_devices_indices_map(self, shape):
        index = [slice(None)] * len(shape)
        index[self.dim] = slice(0, shape[self.dim] // 2)
        return {jax.devices()[0]: tuple(index)}


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_process_reads_what_it_needs(tmp_path, dim, monkeypatch):
    spec = spec_lib.Spec(
        **COMMON | {"width": 256, "num_layers": 2, "num_heads": 16, "num_kv_heads": 16}
    )
    weights = models.init(spec)
    models.save(spec, weights, tmp_path)
    tensors = hf.check(tmp_path, spec)
    key, name = "layers.attention.q_ldnk", "model.layers.{}.self_attn.q_proj.weight"
    stack = streaming.Stack((2, 256, 16, 16), "float32", Half(dim))
    tensor = hf._table(tensors, spec)[key]
    jobs = [
        streaming.Job(tensors.entry(name.format(i)), tensor, key, spec, stack, (i,))
        for i in range(2)
    ]
    read, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: read.append(real(*a)) or read[-1])
    streaming.fill(jobs)
    got = np.asarray(stack._made.popitem()[1])
    want = np.asarray(weights["layers"]["attention"]["q_ldnk"])
    np.testing.assert_array_equal(got, np.split(want, 2, axis=dim)[0])
    assert sum(read) == want.nbytes // 2


@pytest.mark.parametrize("there", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("here", ["float32", "bfloat16", "float16"])
def test_numbers_are_rounded_once_while_they_are_read(tmp_path, there, here):
    """Against ml_dtypes; among them infinities, NaN, subnormals and ties."""
    spec = spec_lib.Spec(**COMMON)
    models.save(spec, models.init(spec), tmp_path)
    path = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    special = [np.inf, -np.inf, np.nan, -0.0, 1e-40, 1 + 2**-8, 1 + 3 * 2**-9, 7e4]
    tensors = {}
    with np.errstate(all="ignore"):
        for key, value in safetensors.numpy.load_file(path).items():
            drawn = rng.normal(size=value.shape) * 10.0 ** rng.integers(-8, 5)
            drawn.reshape(-1)[: len(special)] = special
            tensors[key] = drawn.astype(jnp.dtype(there))
        safetensors.numpy.save_file(tensors, path)
        _, got = models.load(tmp_path, dtype=here)
        up = tensors["model.layers.2.mlp.up_proj.weight"].T.astype(jnp.dtype(here))
        table = tensors["model.embed_tokens.weight"].astype(jnp.dtype(here))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(here)}
    for ours, want in (
        (got["layers"]["mlp"]["up_ldf"][2], up),
        (got["embed_vd"], table),
    ):
        # Wide, since NumPy does not know NaN of bfloat16; signs of zero are compared.
        np.testing.assert_array_equal(*(np.float64(x) for x in (ours, want)))
        np.testing.assert_array_equal(np.signbit(np.float64(ours)), np.signbit(want))


def test_weights_that_stay_in_their_files_are_saved_the_same(folder, tmp_path):
    spec, weights, made = folder
    there, lazy = hf.lazily(made)
    assert there == models.load(made)[0]
    models.save(there, lazy, tmp_path)
    same(models.load(tmp_path)[1], weights)


def test_what_is_loaded_is_the_model_s_own(folder):
    """Aliased memory is nobody else's: a donated weight leaves other loads alone."""
    _, weights, made = folder
    _, one = models.load(made)
    _, two = models.load(made)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    jax.block_until_ready(step(one))
    same(two, weights)


# --- writing ---


def test_a_save_that_fails_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch):
    spec, weights, _ = folder
    models.save(spec, weights, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    wider = jax.tree.map(lambda x: x * 2, weights)
    calls, real = [], tensor_writer._write

    def full(file, data):
        calls.append(0)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        real(file, data)

    monkeypatch.setattr(tensor_writer, "_write", full)
    with pytest.raises(OSError, match="No space"):
        models.save(spec, wider, tmp_path, shard_bytes=20_000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    models.save(spec, wider, tmp_path, shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    same(models.load(tmp_path)[1], wider)


def test_a_save_killed_at_any_rename_is_whole_or_no_model(
    folder, tmp_path, monkeypatch
):
    spec, weights, _ = folder
    wider = jax.tree.map(lambda x: x * 2, weights)
    real = pathlib.Path.rename
    for stop in range(50):
        models.save(spec, weights, tmp_path)
        calls = []

        def killed(path, target, calls=calls, stop=stop):
            calls.append(0)
            if len(calls) > stop:
                raise SystemExit("killed")
            return real(path, target)

        monkeypatch.setattr(pathlib.Path, "rename", killed)
        try:
            models.save(spec, wider, tmp_path, shard_bytes=100_000)
            break
        except SystemExit:
            monkeypatch.undo()
        with pytest.raises(
            config.InputError, match="no config.json.*was being written"
        ):
            models.load(tmp_path)
    monkeypatch.undo()
    assert stop > 3
    same(models.load(tmp_path)[1], wider)
    assert not list(tmp_path.glob("*.partial"))


def test_the_header_is_as_the_library_writes_it(tmp_path):
    planned = [
        tensor_writer.Planned("b", (2, 3), "bfloat16"),
        tensor_writer.Planned("a", (), "float32"),
    ]
    arrays = [np.ones((2, 3), ml_dtypes.bfloat16), np.full((), 7, np.float32)]
    pairs = zip("ba", arrays, strict=True)
    tensor_writer.publish(tmp_path, planned, pairs, {"x": 1}, shard_bytes=10**9)
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("a") == 7 and file.get_slice("b").get_dtype() == "BF16"
    assert json.loads((tmp_path / "config.json").read_text()) == {"x": 1}


# --- memory ---

MEASURE = """
import json, pathlib, re, sys
import jax
from qwen_jax import models

def peak():
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", text)[1]) * 1024

jax.block_until_ready(jax.numpy.zeros(8))
folder, dtype = sys.argv[1:]
models.load(folder + "/small", dtype=dtype)
base = peak()
_, weights = models.load(folder + "/large", dtype=dtype)
held = sum(x.nbytes for x in jax.tree.leaves(weights))
print(json.dumps({"held": held, "over": peak() - base - held}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_memory_is_the_weights_and_little_more(tmp_path, dtype):
    """Far below the largest file and one layer, which is what was promised."""
    large = spec_lib.Spec(
        width=1024,
        num_layers=8,
        ffn_width=3072,
        vocab_size=16_000,
        param_dtype="bfloat16",
    )
    small = spec_lib.Spec(**COMMON, param_dtype="bfloat16")
    for name, spec in (("small", small), ("large", large)):
        weights = jax.tree.map(
            lambda p: jnp.zeros(p.shape, "bfloat16"),
            models.decoder.decoder_params(spec),
            is_leaf=lambda x: not isinstance(x, dict),
        )
        models.save(spec, weights, tmp_path / name, shard_bytes=100_000_000)
        del weights
    sizes = [p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors")]
    assert len(sizes) > 2
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, dtype],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
    ).stdout
    found = json.loads(out)
    assert found["held"] > 200_000_000
    layer = 2 * (1024 * 3 * 3072 + 1024 * 128 * 48)
    assert found["over"] < max(sizes) + layer
    assert found["over"] < 60_000_000
