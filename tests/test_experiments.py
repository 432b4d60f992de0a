# SPDX-License-Identifier: Apache-2.0
"""Every experiment file loads, resolves, names a published size and sweeps what is."""

import pathlib
import re

import pytest

from qwen_jax import config, experiment, prepare
from qwen_jax.models import flops, sizes

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "experiments").rglob("*.py"))
PRETRAIN = [path for path in FILES if path.parent.name == "pretrain"]
# Of a run and not of the model: what an experiment may choose.
CHOSEN = ("param_dtype", "compute_dtype", "reduce_dtype", "attention")
CHOSEN += ("moe.impl", "moe.exchange", "moe.capacity_factor", "moe.pieces")
# Weights of the published checkpoints: arXiv 2505.09388 table 1, arXiv 2412.15115.
WEIGHTS = {
    "qwen3-0.6b": (0.6e9, 0.44e9),
    "qwen3-1.7b": (1.7e9, 1.4e9),
    "qwen3-4b": (4.0e9, 3.6e9),
    "qwen3-8b": (8.2e9, 6.95e9),
    "qwen3-32b": (32.8e9, 31.2e9),
    "qwen2.5-7b": (7.61e9, 6.53e9),
    "qwen3-30b-a3b": (30.5e9, 29.9e9),
    "qwen3-next-80b-a3b": (79.7e9, 79.05e9),
    "qwen3.5-27b": (26.9e9, 24.35e9),
}


def name_of(path):
    return str(path.relative_to(ROOT / "experiments"))


every = pytest.mark.parametrize("path", FILES, ids=name_of)


def points_of(path):
    """[(overrides, name)] that the file's sweep adds; [] where it has none."""
    module, _ = config.load_module(str(path))
    points = []
    if hasattr(module, "sweep"):
        module.sweep(lambda overrides, name="": points.append((overrides, name)))
        assert len(points) > 1, "a curve has more than one point"
    return points


def texts(overrides):
    return [(k, v if isinstance(v, str) else repr(v)) for k, v in overrides.items()]


def test_there_are_experiments():
    assert len(PRETRAIN) == 9 and len(FILES) > len(PRETRAIN)


@every
@pytest.mark.parametrize("arg", ["", ":tiny"])
def test_an_experiment_resolves(path, arg):
    exp = experiment.resolve(f"{path}{arg}")
    assert config.freeze(experiment.Experiment, config.thaw(exp)) == exp
    assert exp.data.sources and exp.train.batch_tokens % exp.data.seq_tokens == 0


@every
def test_the_tiny_variant_is_tiny_and_fits_this_machine(path):
    exp, setup = prepare.set_up(experiment.resolve(f"{path}:tiny"))
    assert flops.num_params(exp.model) < 1e6
    assert setup.derivation.num_steps * exp.train.batch_tokens <= 1 << 14
    assert exp.data.vocab_size <= exp.model.vocab_size
    assert setup.batch.micro_steps == 1 and setup.device_mesh.size == 8


@every
def test_an_unknown_argument_is_refused(path):
    with pytest.raises(
        config.InputError, match=r"argument 'tinny'; did you mean 'tiny'\?"
    ):
        experiment.resolve(f"{path}:tinny")


@pytest.mark.parametrize("path", PRETRAIN, ids=name_of)
def test_the_model_is_the_published_size_the_file_is_named_after(path):
    name = re.sub(r"(?<=\d)p(?=\d)", ".", path.stem).replace("_", "-")
    exp = experiment.resolve(str(path))
    want = config.thaw(sizes.get(name))
    got = config.thaw(exp.model)
    assert {key for key, *_ in config.diff(want, got)} <= set(CHOSEN)
    assert exp.model.param_dtype == "float32"
    weights, outside = WEIGHTS[name]
    assert abs(flops.num_params(exp.model) / weights - 1) < 0.02
    assert abs(flops.num_non_embedding(exp.model) / outside - 1) < 0.02
    # Its twenty tokens a weight, rounded to two digits (arXiv 2203.15556).
    ratio = exp.train.tokens / flops.num_non_embedding(exp.model)
    assert abs(ratio - 20) < 0.6


@pytest.mark.parametrize("path", PRETRAIN, ids=name_of)
def test_the_tiny_model_has_the_switches_of_the_real_one(path):
    real = experiment.resolve(str(path)).model
    tiny = experiment.resolve(f"{path}:tiny").model
    for switch in ("family", "qkv_bias", "qk_norm", "tie_embedding", "rope_theta"):
        assert getattr(tiny, switch) == getattr(real, switch), switch


@every
@pytest.mark.parametrize("arg", ["", ":tiny"])
def test_every_point_of_a_sweep_resolves_and_differs(path, arg):
    base = config.thaw(experiment.resolve(f"{path}{arg}"))
    seen = []
    for overrides, _ in points_of(path):
        exp = config.thaw(experiment.resolve(f"{path}{arg}", texts(overrides)))
        told = {key for key, *_ in config.diff(base, exp)}
        assert told <= set(overrides)
        assert exp not in seen
        seen.append(exp)
    # One of the points is the experiment itself, which the others are compared with.
    assert not seen or base in seen


@every
def test_what_a_file_plots_is_what_a_run_writes(path):
    module, _ = config.load_module(str(path))
    written = "loss bits_per_byte eval_loss eval_bits_per_byte tokens_per_s mfu".split()
    assert set(module.metrics()) <= set(written)


@every
def test_a_file_says_its_claim(path):
    module, _ = config.load_module(str(path))
    for word in ("Question:", "Source:", "Expected:", "Cost:", "Run:"):
        assert word in module.__doc__, word
    assert name_of(path) in module.__doc__ or "quickstart.sh" in module.__doc__
