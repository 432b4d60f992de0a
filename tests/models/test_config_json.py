# SPDX-License-Identifier: Apache-2.0
"""A config.json of a stranger: every wrong field is named, quickly and cheaply.

What is right is compared with transformers reading the same file.
"""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import config
from qwen_jax.models import hf_config, json_files, sizes
from qwen_jax.models import spec as spec_lib

DENSE = hf_config.config_of(sizes.get("qwen3-0.6b"))
EXPERTS = hf_config.config_of(sizes.get("qwen3-30b-a3b"))
HYBRID = hf_config.config_of(sizes.get("qwen3-next-80b-a3b"))
SEVERAL = {"dense": DENSE, "experts": EXPERTS, "hybrid": HYBRID}
# Neither is text of a number a number, nor is true, nor a count 10^9 of anything.
WRONG = (True, "8", 1.5, -3, 10**9 + 7, 10**40, 1e999, float("nan"), [], {}, [8])


def refused(raw):
    """The message of a file that is not taken, which must come at once."""
    start = time.process_time()
    with pytest.raises(config.InputError) as caught:
        hf_config.spec_from_config(raw)
    assert time.process_time() - start < 0.5
    assert len(str(caught.value)) < 500
    return str(caught.value)


def counts(raw):
    return [k for k, v in raw.items() if type(v) is int]


@pytest.mark.parametrize("name", SEVERAL)
def test_published_configurations_are_taken(name):
    assert hf_config.spec_from_config(SEVERAL[name]).num_layers > 20


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("name", SEVERAL)
def test_every_count_that_is_none_is_named(name, value):
    raw = SEVERAL[name]
    fields = [f for f in counts(raw) if f not in ("eos_token_id", "bos_token_id")]
    assert {"hidden_size", "num_hidden_layers", "vocab_size"} < set(fields)
    for field in fields:
        if field == "max_position_embeddings" and value == 10**9 + 7:
            continue  # positions cost nothing
        assert field in refused(raw | {field: value})


@pytest.mark.parametrize("value", [True, "1e6", -1.0, float("nan"), 1e999, [1.0]])
def test_every_number_that_is_none_is_named(value):
    for field in ("rope_theta", "rms_norm_eps", "initializer_range"):
        assert field in refused(DENSE | {field: value})
    for key in ("factor", "beta_fast", "attention_factor"):
        scaling = {"rope_type": "yarn", "factor": 4.0} | {key: value}
        told = refused(DENSE | {"rope_scaling": scaling})
        assert f"rope_scaling.{key}" in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7, "head_dim": None}, "no multiple of"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 7}, "head_width=7 must be even"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": None, "hidden_size": None}, "hidden_size, num_hidden"),
        ({"model_type": None}, "model_type ''"),
        ({"model_type": ["qwen3"]}, "model_type=['qwen3']"),
        ({"model_type": "x" * 10**6}, "model_type"),
        ({"torch_dtype": 32}, "torch_dtype=32"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
        ({"architectures": True}, "architectures=True: wanted a list"),
        ({"id2label": 3}, "id2label=3: wanted a group of keys"),
        (
            {"dual_chunk_attention_config": {"chunk_size": "8"}},
            "dual_chunk_attention_config.chunk_size='8'",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "has factor=None: wanted a number"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2}}, "rope type 'su'"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id='2'"),
        ({"eos_token_id": list(range(10**5))}, "eos_token_id"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'"),
        ({"quantization_config": "fp8"}, "quantization_config ('fp8')"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    assert words in refused(DENSE | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 16_384}, "more experts than"),
        ({"moe_intermediate_size": 1 << 22, "hidden_size": 1 << 20}, "weights, more"),
        ({"num_experts_per_tok": 129}, "experts_per_token=129"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers='0'"),
        ({"mlp_only_layers": list(range(10**5))}, "mlp_only_layers"),
    ],
)
def test_what_does_not_fit_of_experts_is_named(change, words):
    assert words in refused(EXPERTS | change)


@pytest.mark.parametrize(
    "kinds",
    [["full_attention"], ["mamba"] * 48, [1] * 48, "full", ["full_attention"] * 10**6],
    ids=["few", "unknown", "numbers", "text", "many"],
)
def test_layer_types_are_checked(kinds):
    assert "layer_types" in refused(HYBRID | {"layer_types": kinds})


def test_the_text_part_is_checked_and_so_is_what_stands_around_it():
    outer = {"model_type": "qwen3_5", "text_config": DENSE | {"hidden_size": True}}
    assert "hidden_size=True" in refused(outer)
    outer = {"text_config": DENSE, "quantization_config": {"quant_method": "gptq"}}
    assert "'gptq'" in refused(outer)


def test_code_of_the_folder_is_noted_and_not_run(tmp_path, capsys):
    ran = tmp_path / "ran"
    (tmp_path / "modeling_x.py").write_text(f"open({str(ran)!r}, 'w')")
    raw = DENSE | {"auto_map": {"AutoModel": "modeling_x.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    spec = hf_config.spec_from_config(hf_config.read_config(tmp_path))
    assert spec == hf_config.spec_from_config(DENSE)
    assert "auto_map), which is not run" in capsys.readouterr().err
    assert not ran.exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        (b'{"b": {"a": 1, "a": 1}}', "key 'a' is given twice"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"\x00" * 100, "is not JSON"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_files_that_are_no_plain_json_are_named(tmp_path, data, words):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(config.InputError, match=words) as caught:
        hf_config.read_config(tmp_path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_of_another_size_or_kind_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(config.InputError, match="100,000,000,000 bytes, more than"):
        hf_config.read_config(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(config.InputError, match="no regular file"):
        json_files.read(path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(0, 64)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["full_attention", "linear_attention", "yarn", "silu", "qwen3"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
    ),
    max_leaves=6,
)
ROPE = st.dictionaries(
    st.sampled_from(
        "rope_type type factor rope_theta beta_fast beta_slow attention_factor "
        "truncate original_max_position_embeddings partial_rotary_factor mscale".split()
    ),
    VALUES,
)


def test_a_model_without_experts_in_a_family_that_has_them():
    raw = dict(HYBRID) | {"num_experts": 0}
    spec = hf_config.spec_from_config(raw)
    assert spec.moe is None
    told = hf_config.config_of(spec)
    assert told["num_experts"] == 0 and hf_config.spec_from_config(told) == spec


@given(st.data())
@settings(max_examples=400)
def test_a_changed_file_is_a_model_or_a_named_mistake(data):
    raw = dict(data.draw(st.sampled_from(list(SEVERAL.values()))))
    for _ in range(data.draw(st.integers(1, 4))):
        field = data.draw(st.sampled_from(sorted(raw)))
        if field.startswith("rope_") and data.draw(st.booleans()):
            raw[field] = data.draw(ROPE)
        elif data.draw(st.integers(0, 4)) == 0:
            raw.pop(field, None)
        else:
            raw[field] = data.draw(VALUES)
        if not raw:
            return
    try:
        spec = hf_config.spec_from_config(raw)
    except config.InputError:
        return
    assert isinstance(spec, spec_lib.Spec)
    again = hf_config.spec_from_config(hf_config.config_of(spec))
    assert hf_config._function(again) == hf_config._function(spec)
