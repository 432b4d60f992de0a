# SPDX-License-Identifier: Apache-2.0
"""Dry runs: the compiler's own numbers, refusals with a fix that fits, TPU slices."""

import dataclasses
import functools
import importlib.util
import json
import math
import re

import jax
import pytest

from qwen_jax import cli, config, dryrun, experiment, main, mesh, prepare
from qwen_jax.models import flops
from qwen_jax.plan import chips, collectives, topology
from tests import runs

ROOT = runs.ROOT / "experiments" / "pretrain"
GIB = 1 << 30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def tiny(**changes):
    pairs = [(key.replace("__", "."), str(value)) for key, value in changes.items()]
    return experiment.resolve(f"{runs.EXPERIMENT}:adamw", pairs)


def local_bytes(tree):
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def check_against_compiler(exp, report, devices=None):
    """Every printed number of memory is the compiler's for the step of the run."""
    exp, setup = prepare.set_up(exp, devices)
    program = prepare.compile_step(setup)
    account = program.memory_analysis()
    told = report.compiled
    assert told.argument == account.argument_size_in_bytes
    assert told.output == account.output_size_in_bytes
    assert told.alias == account.alias_size_in_bytes
    assert told.temp == account.temp_size_in_bytes
    assert told.peak == account.peak_memory_in_bytes
    printed = dryrun.render(report)
    for what in (told.argument, told.temp, told.peak):
        assert f" {what / GIB:.3f}" in printed
    return setup


@pytest.fixture(scope="module")
def exp():
    return tiny(mesh__fsdp=2, mesh__tensor=2)


@pytest.fixture(scope="module")
def report(exp):
    return dryrun.measure(exp, name="tiny.py")


def test_memory_is_the_compilers_and_the_states(exp, report):
    setup = check_against_compiler(exp, report)
    state, batch, bytes_v = prepare.abstract_inputs(setup)
    # The compiler pads and aligns; it may add some bytes for each of about 60 arrays.
    inputs = local_bytes((state, batch, bytes_v))
    assert inputs <= report.compiled.argument <= inputs + 64 * 64
    # State is donated: what comes out takes the place of what went in.
    assert report.compiled.alias >= local_bytes(state)
    assert report.optimizer_bytes == local_bytes(state.opt)
    assert report.fits and report.needed_bytes >= report.compiled.peak


def test_what_a_step_costs(exp, report):
    assert report.num_params == flops.num_params(exp.model)
    per_token = flops.train_per_token(exp.model, 32)
    assert report.step_flops == per_token * 256
    assert report.tokens == 40 * 256 and report.batch_tokens == 256
    assert report.rows == 8 and report.micro_rows * report.micro_steps == 8
    total = report.peak_flops_per_s * 8
    assert report.step_s == report.step_flops / (total * report.assumed_mfu)
    assert report.run_s == 40 * report.step_s
    kinds = {one.kind for one in report.traffic}
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= kinds


def test_the_checkpoint_is_as_large_as_one_that_was_written(report, tmp_path):
    data = runs.corpus(tmp_path / "corpus")
    words = runs.words(tmp_path / "run", data, arg="adamw")
    more = ["--config.train.num_steps=3", "--config.mesh.fsdp=2"]
    assert cli.main([*words, *more, "--quiet", "--config.export=false"]) == 0
    arrays = tmp_path / "run" / "checkpoints" / "00000003" / "arrays"
    chunks = [p for p in arrays.rglob("*") if p.is_file() and p.name != "zarr.json"]
    # Compressed: random weights lose a tenth, moments may lose more.
    written = sum(p.stat().st_size for p in chunks)
    assert 0.5 * report.checkpoint_bytes < written < 1.1 * report.checkpoint_bytes
    assert report.checkpoint_bytes == pytest.approx(12 * report.num_params, rel=0.01)


def test_it_writes_nothing_but_the_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )
    out = tmp_path / "numbers.json"
    words = ["run", f"--config={runs.EXPERIMENT}:adamw", f"--workdir={tmp_path}/run"]
    code = cli.main([*words, "--dry_run", f"--json={out}", "--config.mesh.fsdp=2"])
    printed, err = capsys.readouterr()
    assert code == 0, err
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]
    numbers = json.loads(out.read_text())
    sizes = {"data": 4, "fsdp": 2, "tensor": 1, "expert": 1, "context": 1, "stage": 1}
    assert numbers["mesh"] == sizes
    assert f"{numbers['compiled']['peak'] / GIB:.3f}" in printed
    for word in ("weights", "optimizer", "activations kept", "FLOPs of a step",
                 "tokens: 256 a step", "checkpoint:", "ASSUMING", "fits"):  # fmt: skip
        assert word in printed


@pytest.mark.parametrize("share", [0.8, 0.55])
def test_what_does_not_fit_is_refused_with_a_change_that_does(share, monkeypatch):
    """A model of several MiB on a device that has not enough for its activations."""
    changes = {
        "model__width": 64,
        "model__ffn_width": 512,
        "model__num_layers": 6,
        "train__batch_tokens": 16384,
        "train__micro_rows": 512,
        "train__remat": "none",
        "mesh__data": 8,
    }
    exp = tiny(**changes)
    needed = dryrun.measure(exp).needed_bytes
    monkeypatch.setattr(chips, "memory_bytes", lambda device: int(share * needed))
    options = main.Options(config="tiny.py")
    with pytest.raises(config.InputError, match="does not fit: needs") as error:
        dryrun.main(exp, options)
    flags = [word for word in str(error.value).split() if word.startswith("--config.")]
    assert flags
    if any(".mesh." in flag for flag in flags):  # more devices than are here
        assert "times the devices" in str(error.value)
        return
    for flag in flags:
        key, _, value = flag.removeprefix("--config.").partition("=")
        changes[key.replace(".", "__")] = value.rstrip(",;")
    assert dryrun.measure(tiny(**changes)).fits


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.InputError, match=r"pip install 'qwen_jax\[tpu\]'"):
        topology.devices("v6e:4x4")


@needs_libtpu
@pytest.mark.parametrize("name", ["v9z:4x4", "v6e", "v6e:3x5"])
def test_an_unknown_slice_gets_names_of_known_ones(name):
    with pytest.raises(config.InputError, match=r"wanted KIND:SHAPE in chips"):
        topology.devices(name)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("v6e:4x4", 16, "TPU v6 lite"),
        ("v6e:16x16", 256, "TPU v6 lite"),
        ("v5e:4x4", 16, "TPU v5 lite"),
        ("v5p:2x2x4", 16, "TPU v5"),
    ],
)
def test_slices_that_are_not_there(name, count, kind):
    devices = topology.devices(name)
    assert len(devices) == count
    assert {d.device_kind for d in devices} == {kind}
    assert not math.isnan(chips.peak_flops_per_s(devices[0])[0])


@needs_libtpu
@pytest.mark.parametrize("sizes", [(2, 8, 1), (2, 4, 2), (1, 8, 2)])
def test_meshes_that_split_an_axis_of_the_torus(sizes):
    devices = topology.devices("v6e:4x4")
    made = mesh.make(mesh.MeshConfig(*sizes), devices)
    assert tuple(made.shape.values()) == (*sizes, 1, 1, 1)
    assert {d.id for d in made.devices.flat} == {d.id for d in devices}


@needs_libtpu
def test_only_sums_of_gradients_cross_between_slices(capsys):
    """A job of two slices, from the command line to what its compiled step sends."""
    words = ["run", f"--config={runs.EXPERIMENT}:adamw", "--dry_run", "--slices=2"]
    assert cli.main([*words, "--config.mesh.fsdp=4"]) == 2
    assert "--slices 2: of which TPU slice?" in capsys.readouterr().err
    assert cli.main([*words, "--topology=v6e:2x2", "--config.mesh.fsdp=8"]) == 2
    assert "data must be a multiple of the 2 TPU slices" in capsys.readouterr().err

    devices = topology.devices("v6e:2x2", 2)
    assert [d.slice_index for d in devices] == [0] * 4 + [1] * 4
    exp, setup = prepare.set_up(tiny(mesh__fsdp=4), devices)
    text = prepare.compile_step(setup).as_text()
    kinds = re.findall('_xla_megascale_transfer_type="([A-Z_]+)"', text)
    assert kinds and set(kinds) == {"ALL_REDUCE"}
    # Each chip's quarter of the gradients crosses once, in bfloat16 or float32; the TPU
    # pads arrays as small as these.
    traffic, at_least = collectives.traffic(text, 8)
    [between] = [one for one in traffic if one.kind == "between slices"]
    quarter = flops.num_params(exp.model) / 4
    assert not at_least and 2 * quarter < between.bytes < 1.5 * 4 * quarter


def published(name, layers=0):
    """A published experiment, with few layers where time demands."""
    pairs = [("model.num_layers", str(layers))] if layers else []
    return experiment.resolve(str(ROOT / f"{name}.py"), pairs)


@functools.cache
def compiled_for(name, slice_name, layers):
    exp = published(name, layers)
    return exp, dryrun.measure(exp, topology.devices(slice_name), name=name)


@needs_libtpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "slice_name"),
    [
        pytest.param("qwen3_8b", "v6e:4x4", marks=pytest.mark.slow),
        pytest.param("qwen3_32b", "v6e:16x16", marks=pytest.mark.slow),
    ],
)
def test_two_layers_of_a_published_size_compile_for_its_slice(name, slice_name):
    exp, report = compiled_for(name, slice_name, 2)
    assert report.fits and report.seq_tokens == 4096
    whole = flops.num_params(dataclasses.replace(exp.model, num_layers=2))
    # Weights and two moments in float32, divided over all chips. 256 chips leave 20 of
    # 5,120 columns to each, which the TPU pads to its tiles.
    share = 12 * whole / report.num_devices
    assert share <= report.compiled.argument <= 1.2 * share
    assert report.needed_bytes == report.compiled.peak


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(
    ("name", "slice_name", "billions"),
    [("qwen3_8b", "v6e:4x4", 8.19), ("qwen3_32b", "v6e:16x16", 32.76)],
)
def test_a_published_size_fits_its_slice(name, slice_name, billions):
    exp, report = compiled_for(name, slice_name, 0)
    check_against_compiler(exp, report, topology.devices(slice_name))
    assert report.num_params / 1e9 == pytest.approx(billions, abs=0.005)
    assert report.fits and report.needed_bytes == report.compiled.peak
    assert report.compiled.argument == pytest.approx(
        12 * report.num_params / report.num_devices, rel=0.02
    )
    assert report.derived.total == pytest.approx(report.compiled.peak, rel=0.2)
