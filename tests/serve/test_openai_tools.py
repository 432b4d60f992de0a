# SPDX-License-Identifier: Apache-2.0
"""Tools and thinking through the official SDK, streamed and not."""

import json

import pytest

from qwen_jax.data import reply
from tests.data import chat_templates
from tests.serve import fake_engine, scripts, servers


def check_call(call, **arguments):
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == arguments


@pytest.mark.parametrize("how", [{}, {"tool_choice": "auto"}])
def test_tools(client, how):
    """Row 13."""
    made = scripts.ask(
        client, scripts.user("the weather?"), tools=[scripts.WEATHER], **how
    ).choices[0]
    assert made.finish_reason == "tool_calls"
    assert made.message.content == "Let me see."
    check_call(made.message.tool_calls[0], place="Ulm", days=2)
    made = scripts.ask(
        client, scripts.user("two weathers?"), tools=[scripts.WEATHER], **how
    ).choices[0]
    assert made.message.content is None
    calls = made.message.tool_calls
    assert len({call.id for call in calls}) == 2
    check_call(calls[1], place="Bonn", days=2)
    made = scripts.ask(client, scripts.SAY, tools=[scripts.WEATHER], **how).choices[0]
    assert (made.message.content, made.finish_reason) == (scripts.HELLO, "stop")
    assert made.message.tool_calls is None


def test_no_tools(client, hermes):
    """Row 13: tool_choice none; and without tools, a call is only text."""
    for how in ({"tools": [scripts.WEATHER], "tool_choice": "none"}, {}):
        made = scripts.ask(client, scripts.user("the weather?"), **how).choices[0]
        assert made.message.content == "Let me see.\n\n" + scripts.CALL
        assert made.message.tool_calls is None and made.finish_reason == "stop"
        prompt = hermes.engine.model.tokenizer.decode(hermes.engine.seen[-1].prompt)
        assert "<tools>" not in prompt


OTHER = {"type": "function", "function": {"name": "other"}}


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("required", None),
        ({"type": "function", "function": {"name": "weather"}}, "weather"),
        ({"type": "function", "function": {"name": "other"}}, "other"),
    ],
)
@pytest.mark.parametrize("which", ["hermes", "thinking"])
def test_calls_that_must_be(request, which, choice, name):
    """Row 13: the model says hello, the grammar makes it call."""
    client = request.getfixturevalue(which).client()
    how = {"tools": [scripts.WEATHER, OTHER], "tool_choice": choice}
    if which == "thinking":
        how["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
    made = scripts.ask(client, scripts.user("sunny"), **how, max_tokens=400).choices[0]
    assert made.finish_reason == "tool_calls"
    for call in made.message.tool_calls:
        assert call.function.name in ((name,) if name else ("weather", "other"))
        arguments = json.loads(call.function.arguments)
        assert set(arguments) <= {"place", "days"}
        if call.function.name == "weather":
            assert isinstance(arguments["place"], str)


@pytest.mark.parametrize("name", ["__class__", "constructor", "-", "x" * 64])
def test_a_tool_of_any_name(client, hermes, name):
    """A name is a name: nothing is looked up by it."""
    call = json.dumps({"name": name, "arguments": {"a": 1}})
    hermes.engine.script["odd"] = f"<tool_call>\n{call}\n</tool_call>"
    tool = {"type": "function", "function": {"name": name}}
    made = scripts.ask(client, scripts.user("odd"), tools=[tool]).choices[0]
    assert made.finish_reason == "tool_calls"
    (found,) = made.message.tool_calls
    assert found.function.name == name
    assert json.loads(found.function.arguments) == {"a": 1}


def test_one_call_only(client, hermes):
    """Row 13: parallel_tool_calls=false ends the answer after one call."""
    how = {"tools": [scripts.WEATHER], "parallel_tool_calls": False}
    made = scripts.ask(client, scripts.user("two weathers?"), **how).choices[0]
    assert len(made.message.tool_calls) == 1 and made.finish_reason == "tool_calls"
    chunks = scripts.streamed(client, scripts.user("two weathers?"), **how)
    indices = {t.index for c in chunks for t in c.choices[0].delta.tool_calls or ()}
    assert indices == {0} and chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_strict_tool_is_called_by_its_schema(client):
    """Row 13: auto stays auto, but a call, once begun, is by the schema."""
    strict = json.loads(json.dumps(scripts.WEATHER))
    strict["function"]["strict"] = True
    strict["function"]["parameters"]["properties"]["days"] = {"const": 9}
    strict["function"]["parameters"]["required"] = ["place", "days"]
    made = scripts.ask(client, scripts.user("the weather?"), tools=[strict]).choices[0]
    assert made.message.content.startswith("Let me see.")
    check_call(made.message.tool_calls[0], place="Ulm", days=9)
    assert (
        scripts.ask(client, scripts.SAY, tools=[strict]).choices[0].message.content
        == scripts.HELLO
    )


@pytest.mark.parametrize("say", ["the weather?", "as json"])
def test_a_call_or_an_answer_of_a_form(client, say):
    """Row 13 with 12: tools may be called, what is no call is by the schema."""
    schema = {"type": "object", "required": ["name"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    made = scripts.ask(
        client, scripts.user(say), tools=[scripts.WEATHER], response_format=form
    ).choices[0]
    if made.finish_reason == "tool_calls":
        assert made.message.content is None
    else:
        assert "name" in json.loads(made.message.content)


@pytest.mark.parametrize(
    ("which", "say"),
    [
        ("hermes", "the weather?"),
        ("hermes", "two weathers?"),
        ("hermes", "broken call"),
        ("thinking", "tagged weather?"),
    ],
)
def test_streamed_tools(request, which, say):
    """Row 14: joined, the chunks are the whole answer."""
    client = request.getfixturevalue(which).client()
    whole = scripts.ask(client, scripts.user(say), tools=[scripts.WEATHER]).choices[0]
    content, calls = "", {}
    for chunk in scripts.streamed(client, scripts.user(say), tools=[scripts.WEATHER]):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            if part.index not in calls:
                assert part.id and part.function.name
                calls[part.index] = [part.function.name, part.function.arguments]
            else:
                assert part.id is None and part.function.name is None
                calls[part.index][1] += part.function.arguments
    assert content == (whole.message.content or "")
    want = [
        [c.function.name, c.function.arguments] for c in whole.message.tool_calls or ()
    ]
    assert list(calls.values()) == want and sorted(calls) == list(range(len(calls)))
    assert choice.finish_reason == whole.finish_reason
    assert (choice.finish_reason == "tool_calls") == (say != "broken call")


def test_a_round_with_a_tool(client, hermes):
    """Row 15: the call and its result go back; the template writes them."""
    first = (
        scripts.ask(client, scripts.user("the weather?"), tools=[scripts.WEATHER])
        .choices[0]
        .message
    )
    result = {
        "role": "tool",
        "tool_call_id": first.tool_calls[0].id,
        "content": "sunny",
    }
    said = [*scripts.user("the weather?"), first.model_dump(), result]
    made = scripts.ask(client, said, tools=[scripts.WEATHER])
    assert made.choices[0].message.content == "It is sunny."
    prompt = hermes.engine.model.tokenizer.decode(hermes.engine.seen[-1].prompt)
    assert (
        scripts.CALL in prompt and "<tool_response>\nsunny\n</tool_response>" in prompt
    )


def test_thinking(thinking):
    """Row 16, where the prompt opens the thinking."""
    client = thinking.client()
    made = scripts.ask(client, scripts.user("think hard"))
    message = made.choices[0].message
    assert message.content == "The answer."
    assert message.reasoning_content == "First 1.\n\nThen 2."
    words = thinking.engine.model.tokenizer
    before = len(words.encode("First 1.\n\nThen 2.\n")) + 1  # and </think>
    assert made.usage.completion_tokens_details.reasoning_tokens == before
    texts = {"content": "", "reasoning_content": ""}
    for chunk in scripts.streamed(client, scripts.user("think hard")):
        delta = chunk.choices[0].delta
        for name in texts:
            texts[name] += getattr(delta, name, None) or ""
    assert texts["content"] == message.content
    assert texts["reasoning_content"] == message.reasoning_content


def test_thinking_that_the_model_begins(client):
    """Row 16, where the model writes <think> itself."""
    made = scripts.ask(client, scripts.user("think hard")).choices[0].message
    assert made.content == "The answer."
    assert made.reasoning_content == "First 1.\n\nThen 2."


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, "off"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, "on"),
        ({"reasoning_effort": "none"}, "off"),
        ({"reasoning_effort": "high"}, "on"),
    ],
)
def test_thinking_is_switched(thinking, how, ends):
    """Row 16: the switch reaches the template."""
    scripts.ask(thinking.client(), scripts.SAY, max_tokens=3, **how)
    words = thinking.engine.model.tokenizer
    prompt = words.decode(thinking.engine.seen[-1].prompt)
    assert prompt.endswith({"on": "<think>\n", "off": "</think>\n\n"}[ends])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_earlier_thinking_is_taken(name):
    """Row 16: inbound, under both names."""
    model = fake_engine.model(chat_templates.THINKING)
    with servers.running(model, scripts.SCRIPT) as one:
        said = [{"role": "assistant", "content": "It.", name: "I thought so."}]
        scripts.ask(one.client(), [*scripts.SAY, *said])
        prompt = model.tokenizer.decode(one.engine.seen[-1].prompt)
    assert "<think>\nI thought so.\n</think>\n\nIt." in prompt


def test_tags_of_reply_are_what_the_script_has():
    """The scripts above are calls for our own parser as well."""
    assert (
        reply.parse(scripts.TAGGED, tools=[scripts.WEATHER]).calls[0].arguments["days"]
        == 2
    )
