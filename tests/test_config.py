# SPDX-License-Identifier: Apache-2.0
"""Experiment files and overrides become frozen records, and a mistake says its fix."""

import dataclasses
import json
import os
import sys

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import config, experiment
from tests import runs


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    words: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate={self.rate} must not be negative")


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    name: str = "x"
    on: bool = False
    share: float = 0.0
    pair: tuple[int, str] = (1, "a")
    axes: str | tuple[str, ...] | None = None
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    table: dict[str, float] = dataclasses.field(default_factory=dict)


numbers, texts = st.floats(0, 1e9), st.text(max_size=8)
lists = st.lists(texts, max_size=3).map(tuple)
inners = st.builds(Inner, numbers, lists)
outers = st.builds(
    Outer,
    st.integers(),
    texts,
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.tuples(st.integers(), texts),
    st.none() | st.text("ab") | lists,
    inners,
    st.lists(inners, max_size=3).map(tuple),
    st.dictionaries(st.text("abc", max_size=4), numbers, max_size=3),
)


def group(**changes):
    """A record of every kind of field as a ConfigDict, as an experiment file gives."""
    return ml_collections.ConfigDict(config.thaw(Outer(3, **changes)))


def put(**assignments):
    """The frozen record after these overrides."""
    pairs = [(key.replace("__", "."), text) for key, text in assignments.items()]
    return config.freeze(Outer, config.override(group(many=(Inner(),)), pairs))


def refuse(**assignments):
    with pytest.raises(config.InputError) as caught:
        put(**assignments)
    return str(caught.value)


@given(outers)
def test_a_record_comes_back_from_plain_values_and_from_json(record):
    plain = config.thaw(record)
    assert config.freeze(Outer, plain) == record
    assert config.freeze(Outer, json.loads(json.dumps(plain))) == record
    assert config.thaw(ml_collections.ConfigDict({"r": plain}))["r"] == plain


@given(outers)
def test_every_value_can_be_written_on_the_command_line(record):
    plain = config.thaw(record)
    pairs = [(f"inner.{key}", value) for key, value in plain["inner"].items()]
    pairs += [(key, plain[key]) for key in ("name", "on", "share", "pair", "many")]
    words = [(k, v if isinstance(v, str) else repr(v)) for k, v in pairs]
    got = config.freeze(Outer, config.override(group(), words))
    kept = dataclasses.replace(record, count=3, axes=None, table={})
    assert got == kept


@settings(max_examples=300)
@given(
    st.sampled_from(["count", "share", "on", "pair", "inner", "axes", "inner.rate"]),
    st.text() | st.sampled_from(["{[]: 1}", "1e999", "(" * 300, "9" * 5000, "-", "0x"]),
)
def test_no_text_ends_in_another_error_than_an_input_error(key, text):
    try:
        config.freeze(Outer, config.override(group(), [(key, text)]))
    except config.InputError as error:
        assert key.split(".")[-1] in str(error)


def test_a_value_takes_the_type_of_its_field():
    assert type(put(count="1e6").count) is int and put(count="1e6").count == 10**6
    assert type(config.override(group(), [("count", "1e6")]).count) is int
    assert put(count="1_000").count == 1000
    assert type(put(share="1").share) is float
    for text, value in {"true": True, "Yes": True, "0": False, "FALSE": False}.items():
        assert put(on=text).on is value
    assert put(name="1e6").name == "1e6" and put(name="").name == ""
    assert put(axes="data").axes == "data"
    assert put(axes="('data', 'fsdp')").axes == ("data", "fsdp")
    assert put(pair="[2, 'b']").pair == (2, "b")
    assert put(inner__rate="2").inner == Inner(2.0)
    assert put(many='[{"rate": 1}, {"words": ["a"]}]').many == (
        Inner(1.0),
        Inner(words=("a",)),
    )


@pytest.mark.parametrize("old", [None, "x", ("x", "y")])
def test_a_field_of_several_types_takes_each_whatever_it_held(old):
    for text, value in {
        "('a', 'b')": ("a", "b"),
        "['a']": ("a",),
        "None": None,
        "'a'" if isinstance(old, tuple) else "a": "a",
    }.items():
        changed = config.override(group(axes=old), [("axes", text)])
        assert config.freeze(Outer, changed).axes == value


@pytest.mark.parametrize(
    "key, text, told",
    [
        ("count", "1.5", "--config.count=1.5: wanted a whole number like 3"),
        ("count", "many", "--config.count=many: wanted a value like 3 (int)"),
        ("count", "[1]", "--config.count=[1]: wanted a number like 3"),
        ("count", "True", "count: wanted int, got True"),
        ("share", "'a'", "--config.share='a': wanted a number like 0.0"),
        ("on", "maybe", "--config.on=maybe: wanted true or false"),
        ("pair", "[1]", "pair: wanted 2 values, got (1,)"),
        ("pair", "5", "pair: wanted a list, got 5"),
        ("pair", "['a', 'b']", "pair[0]: wanted int, got 'a'"),
        ("many", "[{'rat': 1}]", "unknown key 'rat' in many[0]; did you mean 'rate'?"),
        ("many", "[3]", "many[0]: wanted a group of keys, got 3"),
        ("inner__rate", "-1", "inner: rate=-1.0 must not be negative"),
        ("inner", "5", "--config.inner=5: 'inner' is a group with the keys rate, wor"),
        ("cuont", "5", "--config.cuont: unknown key 'cuont'; did you mean 'count'?"),
        (
            "inner__rats",
            "5",
            "--config.inner.rats: unknown key 'rats'; did you mean 'r",
        ),
        ("count__deep", "5", "--config.count.deep: 'count' is a value, not a group"),
        ("qqq", "5", "unknown key 'qqq'; known: axes, count, inner, many, name, on"),
        ("axes", "[1]", "axes: wanted str, got [1]; or axes[0]: wanted str, got 1"),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_what_was_wanted(key, text, told):
    assert told.replace("(1,)", "[1]") in refuse(**{key: text}).replace("(1,)", "[1]")


def test_a_missing_key_is_named():
    with pytest.raises(config.InputError, match="^the config: missing count$"):
        config.freeze(Outer, {"name": "y"})


def test_flatten_and_diff_tell_every_difference_once():
    old = {"a": {"b": 1, "c": [1]}, "d": {}, "e": 1}
    assert config.flatten(old) == {"a.b": 1, "a.c": [1], "d": {}, "e": 1}
    new = {"a": {"b": 1, "c": [2]}, "d": {"x": 0}, "e": 1.0}
    assert config.diff(old, new) == [
        ("a.c", [1], [2]),
        ("d", {}, "<absent>"),
        ("d.x", "<absent>", 0),
    ]
    assert config.diff(old, old) == []


@given(outers, outers)
def test_a_diff_is_empty_for_equal_records_only(one, other):
    plain, changed = config.thaw(one), config.thaw(other)
    flat = config.flatten(changed)
    told = config.diff(plain, changed)
    assert bool(told) == (config.flatten(plain) != flat)
    assert all(flat.get(key, "<absent>") == new for key, _, new in told)


def write(folder, text, name="one.py"):
    path = folder / name
    path.write_text(text)
    return path


GIVES = "import ml_collections\ndef get_config(arg=None):\n    return "


def test_a_file_changed_within_a_second_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for n in (1, 2):
        path = write(tmp_path, f"{GIVES}ml_collections.ConfigDict({{'n': {n}}})\n")
        os.utime(path, (1e9, 1e9))
        assert config.load(str(path)).n == n


def test_the_text_after_the_colon_is_the_argument(tmp_path):
    path = write(tmp_path, f"{GIVES}ml_collections.ConfigDict({{'got': arg}})\n")
    assert config.load(f"{path}:a=1:b").got == "a=1:b"
    assert config.load(str(path)).got is None
    assert config.load(f"{path}:").got is None


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("quickstrat.py", None, r"experiment file '.*strat.py' does not exist; did yo"),
        ("far/x.py", None, r"experiment file '.*far/x.py' does not exist$"),
        ("quickstart.py", "x = 1\n", r"quickstart.py: the file has no get_config"),
        ("notes.md", "x", r"notes.md: .*is not a Python file"),
        ("a.py", f"{GIVES}None\n", r"a.py: get_config returned None; .*ConfigDict"),
    ],
)
def test_a_file_that_is_no_experiment_says_what_was_wanted(tmp_path, name, text, told):
    write(tmp_path, GIVES + "{}", "quickstart.py")
    if text is not None:
        write(tmp_path, text, name)
    with pytest.raises(config.InputError, match=told):
        config.load(str(tmp_path / name))


def test_a_group_given_as_a_value_is_refused(tmp_path):
    path = write(tmp_path, GIVES + "{'model': 'qwen3-8b', 'data': {}}\n")
    with pytest.raises(
        config.InputError, match="^model: wanted a group of keys, got 'qwen3-8b'"
    ):
        experiment.resolve(str(path))


def test_every_field_of_an_experiment_can_be_set_by_name(tmp_path):
    whole = config.thaw(experiment.resolve(f"{runs.EXPERIMENT}:adamw"))
    flat = config.flatten(whole)
    assert len(flat) > 70
    words = [
        (key, value if isinstance(value, str) else repr(value))
        for key, value in flat.items()
        if value is not None
    ]
    again = experiment.resolve(f"{runs.EXPERIMENT}:muon", words)
    assert config.thaw(again) == whole
    changed = experiment.resolve(f"{runs.EXPERIMENT}:muon", [("model.bos_id", "7")])
    assert changed.model.bos_id == 7 and changed.optim.name == "muon"


def test_a_published_size_is_the_default_of_the_model(tmp_path):
    text = "{'data': {}, 'model': {'base': 'qwen3-8b', 'num_layers': 2}}\n"
    path = str(write(tmp_path, GIVES + text))
    model = experiment.resolve(path).model
    assert (model.width, model.num_layers, model.tie_embedding) == (4096, 2, False)
    words = [("model.base", "qwen2-7b"), ("model.ffn_width", "64")]
    model = experiment.resolve(path, words, "somewhere").model
    assert (model.family, model.num_layers, model.ffn_width) == ("qwen2", 2, 64)
    with pytest.raises(config.InputError, match=r"'qwen3-8'; did you mean 'qwen3-8b'"):
        experiment.resolve(path, [("model.base", "qwen3-8")])
    paths = experiment.resolve(path, [], "somewhere").data.sources
    assert [one.path for one in paths] == ["somewhere"]


def test_nearest_lists_all_names_where_none_is_near():
    assert config.nearest("lr_peek", ["lr_peak", "b1"]) == "; did you mean 'lr_peak'?"
    assert config.nearest("zzz", {"b": 1, "a": 2}) == "; known: a, b"
    assert config.nearest("zzz", []) == ""
