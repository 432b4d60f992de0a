# SPDX-License-Identifier: Apache-2.0
"""Answers taken apart as they come: the same as `reply.parse` of the whole text,
however it is cut, and nothing is told before it is sure."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data import reply
from qwen_jax.serve import parts
from tests.data import test_reply

TOOLS = test_reply.TOOLS
CALL = test_reply.hermes("f", {"a": "x </tool_call> y"})
TAGS = test_reply.tags("f", {"a": "hi", "b": 3})
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, TAGS, "\n", " "]
WORDS += ["hello", "<", "{", '"', "<tool", "<function=f>", "</", "é", "🙂"]


def told(pieces, **how):
    made = parts.Parts(**how)
    found = [one for piece in pieces for one in made.push(piece)]
    return [*found, *made.end()]


def joined(found):
    texts = {parts.THINKING: "", parts.CONTENT: ""}
    calls = []
    for kind, one in found:
        if kind == parts.CALL:
            calls.append(one)
        else:
            assert one
            texts[kind] += one
    return texts[parts.THINKING], texts[parts.CONTENT], tuple(calls)


@pytest.mark.parametrize(
    ("text", "thinks"),
    [
        ("hello", False),
        (" hello \n", False),
        ("", False),
        ("", True),
        ("<think>\nso\n</think>\n\nhello", False),
        ("\n\n <think>a</think>b", False),
        ("so\n\nmore\n</think>\n\nhello ", True),
        ("<think>\nso\n</think>\n\nhello", True),
        ("<think>\n\n</think>\n\nhello", False),
        ("<think>\nstill\n", False),
        ("still", True),
        ("write </think> at the end", False),
        ("I <think> so", False),
        ("Yes.\n\n" + CALL, False),
        (CALL + "\n" + TAGS, False),
        ("<think>x</think>\n\n" + TAGS + "\n", False),
        ("so</think>" + CALL, True),
        ("a < b and <tool", False),
    ],
)
@given(data=st.data())
def test_as_the_whole_is_read(text, thinks, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    want = reply.parse(text, thinks=thinks, tools=TOOLS)
    got = joined(told(pieces, thinks=thinks, tools=TOOLS))
    assert got == (want.thinking, want.content, want.calls)


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.booleans(), st.data())
def test_cuts_do_not_matter(words, thinks, data):
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = joined(told([text], thinks=thinks, tools=TOOLS))
    assert joined(told(pieces, thinks=thinks, tools=TOOLS)) == whole
    assert joined(told(text, thinks=thinks, tools=TOOLS)) == whole
    thinking, content, calls = whole
    # Nothing is lost: what is in no part is blanks and tags that were understood.
    count = text.count("hello")
    assert thinking.count("hello") + content.count("hello") == count
    assert len(calls) <= text.count("<tool_call>")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>junk</tool_call> sorry",
        '<tool_call>\n{"name": "f", "argu',
        "<tool_call>" * 40,
        test_reply.hermes("unknown", {}),
        "a\n\n<tool_call></tool_call>b",
        "<tool_call></tool_call>" * 40 + "end",
    ],
)
def test_what_is_no_call_is_content(text):
    assert joined(told(text, tools=TOOLS)) == ("", text, ())


def test_a_good_call_after_a_bad_one():
    text = "<tool_call>junk</tool_call>" + CALL
    thinking, content, calls = joined(told(text, tools=TOOLS))
    assert [call.name for call in calls] == ["f"]
    assert content == "<tool_call>junk</tool_call>"


def test_without_tools_tags_are_text():
    assert joined(told(CALL)) == ("", CALL, ())


def test_text_is_told_as_soon_as_it_is_sure():
    made = parts.Parts(tools=TOOLS)
    assert list(made.push("Hello")) == [(parts.CONTENT, "Hello")]
    assert list(made.push(" you <")) == [(parts.CONTENT, " you")]
    assert list(made.push("b")) == [(parts.CONTENT, " <b")]
    assert list(made.push(CALL[:-1])) == []
    assert list(made.push(CALL[-1])) == [(parts.CALL, reply.parse(CALL).calls[0])]


def test_long_answers_take_linear_time():
    begun_s = time.monotonic()
    for text in ("<tool_call>" * 50_000, "<" * 500_000, " " * 500_000, CALL * 2000):
        made = parts.Parts(tools=TOOLS)
        for at in range(0, len(text), 1000):
            for _ in made.push(text[at : at + 1000]):
                pass
        list(made.end())
    assert time.monotonic() - begun_s < 5
