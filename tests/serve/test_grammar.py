# SPDX-License-Identifier: Apache-2.0
"""Answers by a grammar: random walks through what is allowed give what is right, and
only that; the judges are json, jsonschema's rules written out, and reply.parse."""

import json
import pathlib
import random
import time

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.data import reply, tokenizer
from qwen_jax.serve import grammar, schemas

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/end"}, {"type": "null"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"end": {"const": "<|im_end|>"}},
}
TOOLS = [
    {
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {
                    "what": {"type": "string", "enum": ["x y", "z"]},
                    "count": {"type": "integer", "minimum": 1, "maximum": 9},
                    "deep": {"type": "boolean"},
                },
                "required": ["what"],
                "additionalProperties": False,
            },
        }
    },
    {"function": {"name": "stop"}},
]


@pytest.fixture(scope="module")
def words():
    return tokenizer.train([pathlib.Path(json.__file__).read_text()] * 2, 700)


@pytest.fixture(scope="module")
def compiler(words):
    # Padded, as published models are: ids that stand for nothing are never allowed.
    return grammar.Compiler(words, words.vocab_size + 40, words.stop_ids)


def bits(mask_w):
    assert mask_w.dtype == np.uint32
    return np.unpackbits(mask_w.view(np.uint8), bitorder="little").astype(bool)


def walk(compiler, words, made, seed, most=600):
    """(text, whether it ended) of an answer that takes any allowed id."""
    draw, matcher, ids = random.Random(seed), made.start(), []
    while not matcher.done():
        allowed_v = bits(matcher.allowed())
        assert len(allowed_v) == -(-(words.vocab_size + 40) // 32) * 32
        can = np.flatnonzero(allowed_v)
        assert len(can) and can.max() < words.vocab_size
        control = set(can) & {i for t, i in words.specials.items() if t[:2] == "<|"}
        ends = control & set(words.stop_ids)
        content = {words.specials[t] for t in words.specials if "tool" in t or "_" in t}
        assert control <= ends | content
        if ends and (draw.random() < 0.5 or len(ids) > most):
            matcher.accept(int(min(ends)))
            assert matcher.done()
            return words.decode(ids), True
        if len(ids) > most:
            return words.decode(ids), False
        can = [i for i in can if i not in ends]
        # Short ways out are preferred, or texts would hardly ever end.
        out = [i for i in can if words.decode([i]) in ('"', "}", "]", "\n", "</")]
        token = draw.choice(out) if out and draw.random() < 0.4 else draw.choice(can)
        matcher.accept(int(token))
        ids.append(int(token))
    return words.decode(ids), True


def test_answers_are_by_the_schema(compiler, words):
    made, ended = compiler.json(PERSON), 0
    for seed in range(40):
        text, whole = walk(compiler, words, made, seed)
        if not whole:
            continue
        ended += 1
        one = json.loads(text)
        assert set(one) <= {"name", "age", "tags", "next"} and {"name", "age"} <= set(
            one
        )
        assert isinstance(one["name"], str) and len(one["name"]) <= 6
        assert type(one["age"]) is int and 0 <= one["age"] <= 150
        assert set(one.get("tags", [])) <= {"a", "b"} and len(one.get("tags", [])) <= 3
        assert one.get("next") in (None, "<|im_end|>")
        # Blanks cannot go on for ever.
        assert " " * (grammar.MAX_BLANKS + 1) not in text.replace("\n", " ")
    assert ended >= 30


def test_any_object(compiler, words):
    ended = 0
    for seed in range(20):
        text, whole = walk(compiler, words, compiler.json(), seed, 100)
        ended += whole and isinstance(json.loads(text), dict)
    assert ended >= 5


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_calls(compiler, words, tags, many):
    made, counts = compiler.calls(TOOLS, tags=tags, many=many), set()
    for seed in range(25):
        text, whole = walk(compiler, words, made, seed)
        if not whole:
            continue
        found = reply.parse(text, tools=TOOLS)
        assert found.calls and not found.problems and not found.content
        counts.add(len(found.calls))
        assert text.count("<function=") == (len(found.calls) if tags else 0)
        for call in found.calls:
            given = call.arguments
            if call.name == "stop":
                assert given == {}
                continue
            assert given["what"] in ("x y", "z") and 1 <= given.get("count", 1) <= 9
            assert type(given.get("deep", True)) is bool
    assert 1 in counts and (max(counts) > 1) == many


def test_text_is_free_until_a_call(compiler, words):
    """With `text`, any ids but control tokens, until <tool_call>."""
    made = compiler.calls(TOOLS[:1], text=True)
    said = words.encode('Well: {"a": 1} </tool_call> <b>. ')
    matcher = made.start()
    for token in said:
        assert bits(matcher.allowed())[token]
        matcher.accept(token)
    assert bits(matcher.allowed())[words.im_end_id]
    call = '\n{"name": "find", "arguments": {"what": "z"}}\n'
    opened = words.specials["<tool_call>"]
    for token in [opened, *words.encode(call)]:
        assert bits(matcher.allowed())[token]
        matcher.accept(token)
        assert not bits(matcher.allowed())[words.im_end_id]
    with pytest.raises(grammar.GrammarError):
        matcher.accept(words.im_end_id)


def test_thinking_is_free(compiler, words):
    """Until </think>, whether that is an id or letters; but the answer cannot end."""
    for end in ([words.specials["</think>"]], words.encode("</think>")):
        matcher = compiler.json(PERSON, thinks=True).start()
        for token in [*words.encode('I {"know'), *end]:
            allowed_v = bits(matcher.allowed())
            assert allowed_v[token] and not allowed_v[list(words.stop_ids)].any()
            matcher.accept(token)
        allowed_v = bits(matcher.allowed())
        assert allowed_v[words.encode("{")[0]] and not allowed_v[words.encode("I")[0]]


def test_matchers_do_not_share(compiler, words):
    made = compiler.json(PERSON)
    first, second = made.start(), made.start()
    for token in words.encode('{"name"'):
        first.accept(token)
    assert bits(second.allowed())[words.encode("{")[0]]
    assert not bits(first.allowed())[words.encode("{")[0]]


def test_what_breaks_the_grammar_is_an_error(compiler, words):
    matcher = compiler.json(PERSON).start()
    with pytest.raises(grammar.GrammarError):
        matcher.accept(words.encode("x")[0])


def test_grammars_are_kept(compiler):
    """By their text; a thousand of others do not pile up."""
    compiler.json(PERSON)
    first = compiler.json(PERSON).first
    assert compiler.json(dict(PERSON)).first is first
    for i in range(grammar.MAX_KEPT + 10):
        compiler.json({"const": i})
    assert len(compiler._kept) == grammar.MAX_KEPT
    assert compiler.json(PERSON).first is not first


def chain(count):
    defs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": defs | {f"d{count}": {"type": "null"}}}


@pytest.mark.parametrize(
    ("schema", "words_of_it"),
    [
        ({"type": "banana"}, "banana"),
        ({"type": 7}, ""),
        ({"properties": 7}, ""),
        ({"required": [[1]], "type": "object"}, ""),
        ({"type": "object", "x-guidance": {"lenient": True}, "not": {}}, "not"),
        ({"$ref": "#"}, "back to itself"),
        ({"allOf": [{"$ref": "#"}]}, "back to itself"),
        ({"$ref": "#/a/0", "a": [7]}, "no schema"),
        ({"$ref": "other.json"}, "#"),
        ({"type": "string", "pattern": "["}, ""),
        ({"type": "string", "pattern": "a" * 1001}, "1,000"),
        ({"type": "array", "minItems": 1e9}, "65,536"),
        ({"enum": list(range(5001))}, "5,000"),
        ({"const": "x" * 200_000}, "bytes"),
        (json.loads('{"items":' * 25 + "{}" + "}" * 25), "levels"),
        (
            {
                "allOf": [
                    {
                        "anyOf": [
                            {"properties": {f"{k}{i}": {"const": 1}}} for k in "abcd"
                        ]
                    }
                    for i in range(9)
                ]
            },
            "",
        ),
        ({"multipleOf": 1e-300, "type": "number"}, ""),
    ],
    ids=lambda x: str(x)[:30],
)
def test_schemas_that_cannot_be(compiler, schema, words_of_it):
    begun_s = time.monotonic()
    with pytest.raises(config.InputError) as caught:
        compiler.json(schema)
    said = str(caught.value)
    assert words_of_it in said and said.isascii() and len(said) <= 250
    assert time.monotonic() - begun_s < 5


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "(x|y)*" * 100},
        {"type": "string", "pattern": "a{1000}{1000}{1000}"},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
        {"properties": {"n": {"$ref": "#"}}, "additionalProperties": False},
        chain(50),
        {"enum": [f"{i:04}" for i in range(3000)]},
        {"type": "integer", "multipleOf": 7919, "minimum": 0, "maximum": 10**15},
        {
            "anyOf": [
                {"properties": {f"p{i}": {"type": "string"} for i in range(40)}}
                for _ in range(9)
            ]
        },
    ],
    ids=lambda x: str(x)[:30],
)
def test_schemas_that_look_dear_are_not(compiler, words, schema):
    """Compiled and walked in bounded time, or refused; never a hang."""
    begun_s = time.monotonic()
    try:
        made = compiler.json(schema)
        walk(compiler, words, made, 1, 40)
    except (config.InputError, grammar.GrammarError):
        pass
    assert time.monotonic() - begun_s < 5


def test_references_with_escapes():
    root = {"a/b": {"~x": {"type": "null"}}, "$ref": "#/a~1b/~0x"}
    assert schemas.target(root, "#/a~1b/~0x") == {"type": "null"}
    assert json.loads(schemas.check(root)) == root
