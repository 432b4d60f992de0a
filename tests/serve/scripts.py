# SPDX-License-Identifier: Apache-2.0
"""What the fake engine says to what, and how the tests ask."""

SAY = [{"role": "user", "content": "say hello"}]
HELLO = "Hello there, 世界 🙂🙂! Ready."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm", "days": 2}}\n'
CALL += "</tool_call>"
TAGGED = "<tool_call>\n<function=weather>\n<parameter=place>\nUlm\n</parameter>\n"
TAGGED += "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
SCRIPT = {
    "say hello": HELLO,
    "the weather?": "Let me see.\n\n" + CALL,
    "two weathers?": CALL + "\n" + CALL.replace("Ulm", "Bonn"),
    "tagged weather?": TAGGED,
    "broken call": '<tool_call>\n{"name": "weather", "argu</tool_call> sorry',
    "think hard": "<think>\nFirst 1.\n\nThen 2.\n</think>\n\nThe answer.",
    "as json": 'Sure! {"name": "Ada", "age": 36}',
    "sunny": "It is sunny.",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, messages, **how):
    return client.chat.completions.create(model="tiny", messages=messages, **how)


def streamed(client, messages, **how):
    return list(ask(client, messages, stream=True, **how))
