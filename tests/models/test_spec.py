# SPDX-License-Identifier: Apache-2.0
"""Published sizes: parameter counts and FLOPs against the published totals."""

import dataclasses

import pytest

from qwen_jax import config, models
from qwen_jax.models import decoder, flops, hf_config, sizes, stretches
from qwen_jax.models import spec as spec_lib

# Weights of the published checkpoints (the sum over their safetensors files, a tied
# head once), and the billions "non-embedding" of the model cards and reports.
PUBLISHED = {
    "qwen2-0.5b": (494_032_768, 0.36),
    "qwen2-1.5b": (1_543_714_304, 1.31),
    "qwen2-7b": (7_615_616_512, 6.53),
    "qwen2-72b": (72_706_203_648, 70.21),
    "qwen2.5-0.5b": (494_032_768, 0.36),
    "qwen2.5-1.5b": (1_543_714_304, 1.31),
    "qwen2.5-3b": (3_085_938_688, 2.77),
    "qwen2.5-7b": (7_615_616_512, 6.53),
    "qwen2.5-14b": (14_770_033_664, 13.1),
    "qwen2.5-32b": (32_763_876_352, 31.0),
    "qwen2.5-72b": (72_706_203_648, 70.0),
    "qwen3-0.6b": (596_049_920, 0.44),
    "qwen3-1.7b": (1_720_574_976, 1.4),
    "qwen3-4b": (4_022_468_096, 3.6),
    "qwen3-8b": (8_190_735_360, 6.95),
    "qwen3-14b": (14_768_307_200, 13.2),
    "qwen3-32b": (32_762_123_264, 31.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    spec = sizes.get(name)
    total, non_embedding = PUBLISHED[name]
    assert flops.num_params(spec) == total
    # Cards round freely: 13.21 is given as 13.1, 31.21 as 31.0, 70.21 as 70.0.
    assert flops.num_non_embedding(spec) / 1e9 == pytest.approx(
        non_embedding, rel=0.01, abs=0.06
    )


# Sums over published files where they hold the text model alone, else billions (those
# files hold vision and prediction heads, too); then the active billions.
PUBLISHED_HYBRID_OR_SPARSE = {
    "qwen3-30b-a3b": (30_532_122_624, 3.35),
    "qwen3-235b-a22b": (235_093_634_560, 22.2),
    "qwen3-coder-480b-a35b": (480_154_875_392, 35.5),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2.7),
    "qwen2-57b-a14b": (57.4e9, 14.2),
    "qwen3-next-80b-a3b": (79.7e9, 3.9),
    "qwen3.5-0.8b": (0.75e9, 0.75),
    "qwen3.5-2b": (1.88e9, 1.88),
    "qwen3.5-4b": (4.2e9, 4.2),
    "qwen3.5-9b": (8.95e9, 8.95),
    "qwen3.5-27b": (26.9e9, 26.9),
    "qwen3.5-35b-a3b": (34.7e9, 3.45),
    "qwen3.5-122b-a10b": (122e9, 9.8),
    "qwen3.5-397b-a17b": (397e9, 17.3),
}


@pytest.mark.parametrize("name", PUBLISHED_HYBRID_OR_SPARSE)
def test_published_totals_of_experts_and_hybrids(name):
    spec = sizes.get(name)
    total, active = PUBLISHED_HYBRID_OR_SPARSE[name]
    exact = isinstance(total, int)
    assert flops.num_params(spec) == pytest.approx(total, rel=0 if exact else 0.01)
    assert flops.num_active(spec) / 1e9 == pytest.approx(active, rel=0.01)


def test_what_hybrids_keep_of_a_row():
    """Qwen3.5-27B: 16 attention layers of 4 heads of 256, 48 linear ones."""
    spec = sizes.get("qwen3.5-27b")
    assert flops.kv_bytes_per_token(spec) == 16 * 2 * 4 * 256 * 2
    matrices, taps = 48 * 128 * 128 * 4, 3 * (2 * 16 + 48) * 128 * 2
    assert flops.state_bytes(spec) == 48 * (matrices + taps)


TOLD = ["qwen2-1.5b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "qwen1.5-moe-a2.7b"]
TOLD += ["qwen3-30b-a3b", "qwen3-next-80b-a3b", "qwen3.5-27b", "qwen3.5-35b-a3b"]


@pytest.mark.parametrize("name", TOLD)
def test_as_many_weights_as_transformers_makes_of_the_configuration(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = hf_config.config_of(sizes.get(name))
    kind = raw["architectures"][0].removesuffix("ForCausalLM")
    text = "Text" if kind.startswith("Qwen3_5") else ""
    settings = getattr(transformers, f"{kind}{text}Config")(**raw)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(settings)
    theirs = sum(weight.numel() for weight in model.parameters())
    assert flops.num_params(sizes.get(name)) == theirs


@pytest.mark.parametrize("name", sizes.NAMED)
def test_a_published_size_is_told_by_its_config(name):
    yarn = spec_lib.RopeScaling("yarn", 4.0, attention_factor=1.1, truncate=False)
    for changes in (
        {},
        {
            "compute_dtype": "bfloat16",
            "attention": "splash",
            "eos_ids": (),
            "bos_id": 3,
        },
        {"rope_scaling": yarn},
        {"rope_scaling": spec_lib.RopeScaling("linear", 2.0, original_positions=7)},
        {"window": 64, "full_layers": 3},
        {"window": 64, "full_layers": 999},  # a window for no layer
        {"full_layers": 3},  # no window
        {"head_width": 8, "norm_eps": 1e-5, "rope_theta": 5e5, "max_positions": 77},
    ):
        spec = sizes.get(name)
        whole = spec.mixers == ("attention",) and not spec.mrope_interleaved
        if "window" in changes and not whole:
            continue
        if spec.mrope_sections:  # they are parts of a head
            changes = {k: x for k, x in changes.items() if k != "head_width"}
        hf_config.check_spec(dataclasses.replace(spec, **changes))


@pytest.mark.parametrize(
    "name, changes, told, fix",
    [
        (
            "qwen3-8b",
            {"qk_norm": False},
            "of a qwen3 would tell of another model than this one: qk_norm is False, "
            "there True; set",
            "set --config.model.family=llama, or --config.export=false",
        ),
        (
            "qwen3-8b",
            {"qkv_bias": True, "qk_norm": False},
            "qkv_bias is True, there False, qk_norm is False, there True",
            "set --config.model.family=qwen2, or",
        ),
        (
            "qwen2-7b",
            {"qkv_bias": False},
            "of a qwen2 would tell of another model than this one: qkv_bias is False",
            "set --config.model.family=llama, or",
        ),
        ("qwen2-7b", {"family": "qwen3"}, "qkv_bias is", "model.family=qwen2, or"),
        ("qwen3-8b", {"family": "qwen3_vl"}, "vision is None", "family=qwen3, or"),
        ("qwen3-vl-8b", {"family": "qwen3"}, "there None", "family=qwen3_vl, or"),
        (
            "qwen2-7b",
            {"family": "qwen22"},
            "'qwen22' has no published form; did you mean 'qwen2'?",
            "set --config.model.family, or --config.export=false",
        ),
    ],
)
def test_a_model_that_a_config_cannot_tell_is_refused(
    name, changes, told, fix, tmp_path
):
    spec = sizes.get(name, **changes)
    with pytest.raises(config.InputError) as caught:
        hf_config.check_spec(spec)
    assert told in str(caught.value) and fix in str(caught.value)
    with pytest.raises(config.InputError):
        models.save(spec, {}, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_flops_of_a_token_are_those_of_its_products():
    """Every product of the forward pass of one token of Qwen3-8B, written out."""
    spec, t = sizes.get("qwen3-8b"), 4096
    layer = 2 * 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 2 * 4096 * 12288
    scores = 2 * 2 * 32 * 128 * t
    head = 2 * 4096 * 151_936
    products = 36 * (layer + scores) + head
    got = flops.forward_per_token(spec, t)
    assert got == pytest.approx(products, rel=1e-4)  # norms count as weights
    assert flops.train_per_token(spec, t) == 3 * got
    causal = flops.forward_per_token(spec, t, causal=True)
    assert got - causal == pytest.approx(36 * 2 * 2 * 32 * 128 * (t - 1) / 2)
    # 6 N per token without attention, as in scaling laws.
    assert flops.train_per_token(spec, 1) == pytest.approx(6 * 7.568e9, rel=1e-3)


def test_keys_that_a_window_leaves():
    spec = sizes.get("qwen3-0.6b", window=4, num_layers=2, full_layers=1)
    heads = 4 * 16 * 128
    weights = 2 * flops.num_params(spec)
    got = flops.forward_per_token(spec, 10, causal=True)
    # Queries see 1, 2, 3, 4, 4, ... keys in one layer and 1 .. 10 in the other.
    assert got - weights == pytest.approx(heads * ((1 + 2 + 3 + 4 * 7) / 10 + 5.5))


def test_keys_and_values_of_a_token():
    # 36 layers, 8 heads of 128, two of them, two bytes each: 144 KiB.
    assert flops.kv_bytes_per_token(sizes.get("qwen3-8b")) == 144 * 1024


def test_the_window_begins_after_the_full_layers():
    spec = sizes.get("qwen3-0.6b", num_layers=4, window=128, full_layers=3)
    assert spec.windows == (0, 0, 0, 128)
    assert [(x.start, x.repeats) for x in stretches.stretches(spec.kinds)] == [
        *((0, 3), (3, 1))
    ]
    (whole,) = stretches.stretches(sizes.get("qwen3-8b").kinds)
    assert whole.repeats == 36
    (whole,) = stretches.stretches(sizes.get("qwen3-next-80b-a3b").kinds)
    assert (whole.repeats, len(whole.kinds)) == (12, 4)


def test_one_tree_whatever_the_loop():
    spec = sizes.get("qwen3-0.6b", num_layers=3)
    tree = decoder.decoder_params(spec)
    assert tree["layers"]["attention"]["q_ldnk"].shape == (3, 1024, 16, 128)
    assert "head_vd" not in tree
    untied = dataclasses.replace(spec, tie_embedding=False)
    assert decoder.decoder_params(untied)["head_vd"].shape == (151_936, 1024)
    assert set(models.__all__) >= {"init", "load", "save", "forward"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_heads": 3}, "num_heads=3 must be a multiple of num_kv_heads=8"),
        ({"head_width": 7}, "head_width=7 must be even"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"attention": "splish"}, "did you mean 'splash'"),
        ({"compute_dtype": "bf16"}, "compute_dtype='bf16': wanted one of"),
        ({"rope_scaling": {"kind": "ntk"}}, "kind 'ntk': wanted linear or yarn"),
        ({"rope_scaling": {"factor": 0.5}}, "factor 0.5 must be at least 1"),
        ({"depth": 3}, "unknown key 'depth' in model"),
    ],
)
def test_sizes_that_make_no_model(change, told):
    with pytest.raises(config.InputError, match=told):
        sizes.get("qwen3-0.6b", **change)


def test_a_part_of_a_group_leaves_the_rest_of_it():
    spec = sizes.get("qwen3-next-80b-a3b", moe={"exchange": "all_to_all"})
    told = sizes.get("qwen3-next-80b-a3b").moe
    assert spec.moe == dataclasses.replace(told, exchange="all_to_all")
    with pytest.raises(config.InputError, match="did you mean 'exchange'"):
        sizes.get("qwen3-30b-a3b", moe={"exchang": "gather"})


def test_an_unknown_size_gets_the_nearest():
    with pytest.raises(config.InputError, match=r"did you mean 'qwen3-8b'"):
        sizes.get("qwen3-8B")


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        # Published as 30.5B and 3.3B, 235B and 22B, 57.4B and 14B, 80B and 3B.
        ("qwen3-30b-a3b", 30.53, 3.35),
        ("qwen3-235b-a22b", 235.09, 22.2),
        ("qwen2-57b-a14b", 57.41, 14.2),
        ("qwen3-next-80b-a3b", 79.67, 3.9),
    ],
)
def test_weights_that_a_token_meets(name, billions, active):
    spec = sizes.get(name)
    assert flops.num_params(spec) / 1e9 == pytest.approx(billions, abs=0.1)
    assert flops.num_active(spec) / 1e9 == pytest.approx(active, rel=0.03)
