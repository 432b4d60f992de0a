# SPDX-License-Identifier: Apache-2.0
"""Answers in their parts: thinking, content and calls; what is malformed stays."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax import config
from qwen_jax.data import reply

SCHEMA = {
    "a": {"type": "string"},
    "b": {"type": "integer"},
    "c": {"type": "boolean"},
    "d": {"type": "object"},
    "e": {"type": ["number", "null"]},
    "f": {"enum": [1, 2]},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": SCHEMA}},
    }
]


def hermes(name, arguments):
    said = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"


def tags(name, arguments):
    inner = "".join(
        f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "thinks", "want"),
    [
        ("hello", False, ("hello", "", True)),
        ("<think>\nso\n</think>\n\nhello", False, ("hello", "so", True)),
        ("\n<think>a</think>b", False, ("b", "a", True)),
        ("so\n</think>\n\nhello", True, ("hello", "so", True)),
        ("<think>\nso\n</think>\n\nhello", True, ("hello", "so", True)),
        ("<think>\n\n</think>\n\nhello", False, ("hello", "", True)),
        ("<think>\nstill", False, ("", "still", False)),
        ("still", True, ("", "still", False)),
        # Not thinking: a word that is quoted.
        ("write </think> at the end", False, ("write </think> at the end", "", True)),
        ("I <think> so", False, ("I <think> so", "", True)),
    ],
)
def test_thinking_is_apart(text, thinks, want):
    got = reply.parse(text, thinks=thinks)
    assert (got.content, got.thinking, got.finished_thinking) == want


def test_calls_of_both_styles():
    text = "Look:\n" + hermes("f", {"a": "x"}) + "\n" + tags("f", {"b": "3", "g": "4"})
    got = reply.parse(text, tools=TOOLS)
    assert got.content == "Look:" and not got.problems
    assert got.calls == (
        reply.Call("f", {"a": "x"}),
        reply.Call("f", {"b": 3, "g": "4"}),
    )
    # What stands in thinking is no call.
    got = reply.parse(f"<think>\n{text}\n</think>\n\nno")
    assert got.content == "no" and not got.calls


@pytest.mark.parametrize(
    ("key", "value", "want"),
    [
        *[("a", v, v) for v in ("12", "true", "  x ", '{"a": 1}', "null", "")],
        *[("b", "12", 12), ("b", "twelve", "twelve"), ("b", "1 2", "1 2")],
        *[("c", "true", True), ("c", "True", True), ("c", "False", False)],
        *[("d", '{"x": [1]}', {"x": [1]}), ("d", "{x}", "{x}")],
        *[("e", "1.5", 1.5), ("e", "null", None), ("e", "None", None), ("f", "1", "1")],
        *[("b", "NaN", "NaN"), ("b", "9" * 9999, "9" * 9999)],
        *[("b", "__import__('os').abort()", "__import__('os').abort()")],
    ],
)
def test_values_are_of_the_type_of_the_schema(key, value, want):
    got = reply.parse(tags("f", {key: value}), tools=TOOLS)
    assert got.calls == (reply.Call("f", {key: want}),)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
).filter(lambda x: "Infinity" not in json.dumps(x))
NAMES = st.text(
    st.characters(categories=["L", "N"], include_characters="_-."), min_size=1
)
NO_TAG = st.text().filter(
    lambda x: not any(tag in x for tag in ("<tool_call>", "<think>", "</parameter>"))
)


@given(NAMES, st.dictionaries(st.text(), VALUES, max_size=4), st.integers(1, 3))
def test_hermes_there_and_back(name, arguments, count):
    text = "\n".join([hermes(name, arguments)] * count)
    got = reply.parse(text)
    assert got.calls == (reply.Call(name, arguments),) * count
    assert got.content == "" and not got.problems


@given(NAMES, st.dictionaries(NAMES, NO_TAG, max_size=4), NO_TAG)
def test_tags_there_and_back(name, arguments, content):
    content = content.strip()
    got = reply.parse(content + "\n" + tags(name, arguments))
    assert got.calls == (reply.Call(name, arguments),) and got.content == content


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<tool_call>", "wanted a JSON object or <function=NAME>"),
        ("<tool_call>\nf(x)\n</tool_call>", "wanted a JSON object"),
        ('<tool_call>{"name": "f"', "no JSON"),
        ('<tool_call>{"name": "f", "arguments": {}}', "no </tool_call>"),
        ('<tool_call>{"arguments": {}}</tool_call>', 'no "name"'),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "is no object"),
        ('<tool_call>{"name": "f", "arguments": "{"}</tool_call>', "no JSON"),
        ('<tool_call>{"name": "f", "arguments": "{} 1"}</tool_call>', "not one JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is no"),
        ('<tool_call>{"name": ' + "[" * 100_000, "nested too deeply"),
        ('<tool_call>{"name": ' + "1" * 5000 + "}</tool_call>", "too long"),
        ("<tool_call><function=>", "no name"),
        ("<tool_call><function=f><parameter=x>1</function></tool_call>", "'x' has no"),
        ("<tool_call><function=f></tool_call>", "no </function>"),
        (
            tags("f", {"x": "1"}).replace("</function>", "<parameter=x>2</parameter>"),
            "'x' comes twice",
        ),
    ],
)
def test_a_malformed_call_stays_text_and_is_told(text, told):
    got = reply.parse(f"before {text}")
    assert got.content == f"before {text}" and not got.calls
    assert told in got.problems[0] and "letter 7" in got.problems[0]
    after = reply.parse(f"before {text}\n{hermes('g', {'y': 1})}")
    if "[[[" not in text and "1111" not in text:
        assert after.calls == (reply.Call("g", {"y": 1}),) and len(after.problems) == 1


@pytest.mark.parametrize(
    "piece",
    [
        *("<tool_call>", '<tool_call>{"a', '<tool_call>{"name": "f", "x": ['),
        *("<tool_call><function=f>", "<tool_call><function=f><parameter=x>"),
        *("<think>", "</think>", "<tool_call>\n<function=f><parameter=x></parameter>"),
        *("<tool_call>\n", "<tool_call><function=", " \n", '<tool_call>{"a":"\\'),
    ],
)
def test_time_is_linear_in_the_text(piece):
    """Megabytes of what cannot be read take moments, where n squared takes hours."""
    begun = time.process_time()
    got = reply.parse(piece * (2_000_000 // len(piece)), tools=TOOLS)
    assert time.process_time() - begun < 5
    assert not got.calls


def test_as_many_good_calls_as_there_are():
    got = reply.parse(hermes("f", {"a": "x"}) * 2000 + tags("f", {"b": "1"}) * 2000)
    assert len(got.calls) == 4000


# --- words in a text that comes in pieces ---


def test_the_word_that_is_whole_first_counts():
    """Also where a longer one that began before it might still have come."""
    for pieces in (["<b<"], ["<b", "<"], ["<", "b", "<"]):
        watch = reply.Watch(["b", "<b<"])
        found = [one for piece in pieces for one in watch.push(piece)]
        assert found[0] == ("<", "b")
    assert reply.cut("<b<", ["b", "<b<"]) == "<"


@given(st.data())
def test_a_watch_finds_what_find_finds(data):
    words = data.draw(
        st.lists(st.text("ab<", min_size=1, max_size=3), min_size=1, max_size=3)
    )
    text = data.draw(st.text("abc<", max_size=20))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    watch, before = reply.Watch(words), ""
    stopped = False
    for piece in pieces:
        for part, word in watch.push(piece):
            before += part
            if word is not None:
                assert word in words
                stopped = True
                break
        # Nothing is kept back that cannot be the beginning of a word.
        if stopped:
            break
    if not stopped:
        before += watch.end()
    ends = [(text.find(w) + len(w), text.find(w)) for w in words if w in text]
    assert stopped == bool(ends)
    assert before == (text[: min(ends)[1]] if ends else text)
    assert reply.cut(text, words) == before


def test_stop_texts_that_cannot_be():
    for stops, told in (([""], "''"), (["a"] * 17, "17 stop"), (["a" * 257], "256")):
        with pytest.raises(config.InputError, match=told):
            reply.check_stops(stops)
    reply.check_stops(["a", "\n\n"])
    assert reply.cut("abc", []) == "abc"
