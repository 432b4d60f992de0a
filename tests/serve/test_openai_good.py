# SPDX-License-Identifier: Apache-2.0
"""Requests that are right, through the official SDK: what must hold of the answers.

Penalties, samplers and speeds are the engine's and tested there; here they must reach
it, whole and unchanged.

Rows of the table of what must work, by number:
1 models. 2 chat. 3 max_tokens. 4 stop. 5 seed_and_temperature. 6 several_answers.
7 logprobs. 8 logit_bias. 9 sampling_reaches_the_engine. 10 stream. 11 usage_of_streams.
12 answers_of_a_form. 13-16 test_openai_tools: tools, streamed_tools,
a_round_with_a_tool, thinking. 17 completions, suffix_is_refused. 18 embeddings.
19 pictures_for_a_model_without_eyes. 20 roles_and_parts. 21 cached_tokens.
22 test_openai_faults: moderations. 23 responses_are_honestly_not_there. 24 raw_answers.
25 test_openai_faults and test_real_server: clients_that_hang_up.
"""

import base64
import json
import math
import time

import numpy as np
import openai
import pydantic
import pytest

from tests.serve import scripts


def test_models(client):
    """Row 1."""
    listed = client.models.list()
    assert listed.object == "list" and [one.id for one in listed.data] == ["tiny"]
    one = client.models.retrieve("tiny")
    assert (one.object, one.owned_by) == ("model", "qwen_jax")
    assert isinstance(one.created, int) and one.created > 0
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("none/such")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_chat(client, hermes):
    """Row 2: the shape, and usage by the tokenizer."""
    made = [scripts.ask(client, scripts.SAY) for _ in range(2)]
    assert len({one.id for one in made}) == 2
    one, words = made[0], hermes.engine.model.tokenizer
    assert one.id.startswith("chatcmpl-") and one.object == "chat.completion"
    assert abs(one.created - time.time()) < 60 and one.model == "tiny"
    choice = one.choices[0]
    assert (
        choice.message.role == "assistant" and choice.message.content == scripts.HELLO
    )
    assert choice.finish_reason == "stop" and choice.logprobs is None
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nsay hello"
    text += "<|im_end|>\n<|im_start|>assistant\n"
    assert one.usage.prompt_tokens == len(words.encode(text, allow_special=True))
    assert one.usage.completion_tokens == len(words.encode(scripts.HELLO)) + 1
    total = one.usage.prompt_tokens + one.usage.completion_tokens
    assert one.usage.total_tokens == total


@pytest.mark.parametrize("most", [1, 3])
def test_max_tokens(client, most):
    """Row 3: max_completion_tokens goes before max_tokens."""
    made = scripts.ask(client, scripts.SAY, max_completion_tokens=most, max_tokens=100)
    assert made.usage.completion_tokens == most
    assert made.choices[0].finish_reason == "length"
    assert scripts.HELLO.startswith(made.choices[0].message.content)
    assert (
        scripts.ask(client, scripts.SAY, max_tokens=most).usage.completion_tokens
        == most
    )


@pytest.mark.parametrize("stop", ["there", ["zzz", " 世界"], ["🙂!", "a", "b", "c"]])
def test_stop(client, stop):
    """Row 4."""
    first = [stop] if isinstance(stop, str) else stop
    want = min(
        (scripts.HELLO[: scripts.HELLO.index(s)] for s in first if s in scripts.HELLO),
        key=len,
    )
    made = scripts.ask(client, scripts.SAY, stop=stop)
    assert made.choices[0].message.content == want
    assert made.choices[0].finish_reason == "stop"
    chunks = scripts.streamed(client, scripts.SAY, stop=stop)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == want


def test_seed_and_temperature(client, hermes):
    """Row 5: the engine gets them; the same seed is answered the same."""
    say = scripts.user("something")
    texts = {
        scripts.ask(client, say, seed=7).choices[0].message.content for _ in range(3)
    }
    assert len(texts) == 1
    others = {
        scripts.ask(client, say, seed=s).choices[0].message.content for s in range(9)
    }
    assert len(others) > 1
    made = [scripts.ask(client, say, temperature=0) for _ in range(2)]
    assert made[0].choices[0].message.content == made[1].choices[0].message.content
    assert made[0].system_fingerprint == made[1].system_fingerprint
    assert made[0].system_fingerprint.startswith("fp_")
    seeds = {
        scripts.ask(client, say) and hermes.engine.seen[-1].sampling.seed for _ in "ab"
    }
    assert len(seeds) == 2  # none given: drawn anew
    scripts.ask(client, say, seed=-1)
    assert 0 <= hermes.engine.seen[-1].sampling.seed < 2**64


def test_several_answers(client):
    """Row 6: the prompt counts once; chunks say whose they are."""
    one, three = (
        scripts.ask(client, scripts.user("x"), seed=1),
        scripts.ask(client, scripts.user("x"), n=3, seed=1),
    )
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert three.choices[0].message.content == one.choices[0].message.content
    assert len({c.message.content for c in three.choices}) > 1
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens > one.usage.completion_tokens
    texts = ["", "", ""]
    for chunk in scripts.streamed(client, scripts.user("x"), n=3, seed=1):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in three.choices]


@pytest.mark.parametrize("k", [None, 0, 3, 20])
def test_logprobs(client, hermes, k):
    """Row 7: bytes that join to the answer, alternatives in order."""
    how = {} if k is None else {"top_logprobs": k}
    made = scripts.ask(client, scripts.SAY, logprobs=True, **how).choices[0]
    entries = made.logprobs.content
    joined = b"".join(bytes(one.bytes) for one in entries)
    assert joined.decode() == made.message.content == scripts.HELLO
    for one in entries:
        assert one.logprob <= 0 and len(one.top_logprobs) == (k or 0)
        shares = [top.logprob for top in one.top_logprobs]
        assert shares == sorted(shares, reverse=True)
        assert sum(map(math.exp, shares)) <= 1
    assert hermes.engine.seen[-1].logprobs == (k or 0)
    chunks = scripts.streamed(client, scripts.SAY, logprobs=True, **how)
    told = [c.choices[0].logprobs for c in chunks]
    parts = [one for x in told if x is not None for one in x.content]
    assert [one.token for one in parts] == [one.token for one in entries]


def test_logit_bias(client, hermes):
    """Row 8."""
    words = hermes.engine.model.tokenizer
    never, always = words.encode("Hello")[0], words.encode("é")[0]
    assert scripts.ask(client, scripts.SAY, logit_bias={str(never): -100}).choices[
        0
    ].message.content[0] != ("H")
    made = scripts.ask(
        client, scripts.SAY, logit_bias={str(always): 100}, max_tokens=5, logprobs=True
    )
    want = list(words.decode_bytes([always]))
    assert [one.bytes for one in made.choices[0].logprobs.content] == [want] * 5


def test_sampling_reaches_the_engine(client, hermes):
    """Row 9."""
    given = {"top_k": 5, "min_p": 0.25, "repetition_penalty": 1.5}
    scripts.ask(client, scripts.SAY, temperature=0.5, top_p=0.75, extra_body=given)
    sampling = hermes.engine.seen[-1].sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.75)
    assert (sampling.top_k, sampling.min_p) == (5, 0.25)
    assert sampling.repetition_penalty == 1.5
    scripts.ask(client, scripts.SAY, presence_penalty=0.5, frequency_penalty=-0.5)
    sampling = hermes.engine.seen[-1].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    scripts.ask(client, scripts.SAY)
    sampling = hermes.engine.seen[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


def test_stream(client):
    """Row 10: role, content, finish; joined it is the whole answer."""
    chunks = scripts.streamed(client, scripts.SAY)
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1].choices[0].finish_reason == "stop"
    parts = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(parts) == scripts.HELLO and len([p for p in parts if p]) > 5
    for part in parts:
        part.encode("utf-8")  # whole code points


def test_usage_of_streams(client):
    """Row 11."""
    chunks = scripts.streamed(
        client, scripts.SAY, stream_options={"include_usage": True}
    )
    assert chunks[-1].choices == [] and all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].usage == scripts.ask(client, scripts.SAY).usage
    assert all(c.usage is None for c in scripts.streamed(client, scripts.SAY))


@pytest.mark.parametrize("n", [1, 2])
def test_usage_so_far(client, n):
    """As vLLM has it: every chunk tells the tokens up to it, so that who stops an
    answer knows what it took."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = scripts.streamed(client, scripts.SAY, n=n, stream_options=options)
    counts = [c.usage.completion_tokens for c in chunks]
    last = chunks[-1].usage
    assert counts == sorted(counts) and counts[0] == 0 and len(set(counts)) > 5
    assert counts[-2] == counts[-1] == last.completion_tokens
    assert {c.usage.prompt_tokens for c in chunks} == {last.prompt_tokens}
    assert {c.usage.total_tokens - c.usage.completion_tokens for c in chunks} == {
        last.prompt_tokens
    }
    how = {"model": "tiny", "prompt": "say hello", "stream": True, "n": n}
    made = list(client.completions.create(**how, stream_options=options))
    counts = [c.usage.completion_tokens for c in made]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1]
    with pytest.raises(openai.BadRequestError) as caught:
        list(client.completions.create(**how, stream_options={list(options)[1]: True}))
    assert caught.value.param == "stream_options.continuous_usage_stats"


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_answers_of_a_form(client):
    """Row 12."""
    text = scripts.ask(
        client, scripts.user("as json"), response_format={"type": "text"}
    )
    assert text.choices[0].message.content.startswith("Sure")
    made = scripts.ask(
        client, scripts.user("as json"), response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(made.choices[0].message.content), dict)
    parsed = client.chat.completions.parse(
        model="tiny", messages=scripts.user("as json"), response_format=Person
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="tiny", messages=scripts.SAY, response_format=Person, max_tokens=2
        )


def test_answers_of_a_form_after_thinking(thinking):
    """Row 12 with 16: thinking is free, what follows is by the schema."""
    parsed = thinking.client().chat.completions.parse(
        model="tiny", messages=scripts.user("as json"), response_format=Person
    )
    message = parsed.choices[0].message
    assert message.parsed == Person(name="Ada", age=36)
    assert message.reasoning_content == "Hm {}."


def test_completions(client, hermes):
    """Row 17: a text, texts, ids; echo; log-probabilities."""
    words = hermes.engine.model.tokenizer
    ids = words.encode("please say hello")
    for prompt in ("please say hello", ids, [ids], ["please say hello"]):
        made = client.completions.create(model="tiny", prompt=prompt, max_tokens=90)
        assert made.id.startswith("cmpl-") and made.object == "text_completion"
        assert made.choices[0].text == scripts.HELLO
        assert made.choices[0].finish_reason == "stop"
        assert made.usage.prompt_tokens == len(ids)
    made = client.completions.create(
        model="tiny", prompt=["say hello", "sunny"], n=2, max_tokens=90
    )
    assert [c.index for c in made.choices] == [0, 1, 2, 3]
    assert [c.text for c in made.choices] == [
        scripts.HELLO,
        scripts.HELLO,
        "It is sunny.",
        "It is sunny.",
    ]
    assert (
        client.completions.create(model="tiny", prompt="x").usage.completion_tokens
        == 16
    )


def test_completions_with_logprobs(client):
    """Row 17: offsets point into the text, the first token has no probability."""
    made = client.completions.create(
        model="tiny", prompt="say hello", max_tokens=90, echo=True, logprobs=2
    ).choices[0]
    assert made.text == "say hello" + scripts.HELLO
    told = made.logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(x <= 0 for x in told.token_logprobs[1:])
    assert all(len(x) == 2 for x in told.top_logprobs[1:])
    for token, at in zip(told.tokens, told.text_offset, strict=True):
        if "\ufffd" not in token:  # half a letter
            assert made.text[at:].startswith(token) or "\ufffd" in "".join(told.tokens)


@pytest.mark.parametrize("n", [1, 2])
def test_completions_streamed(client, n):
    """Row 17: joined, the chunks are the whole answer."""
    how = {"model": "tiny", "prompt": ["say hello", "x"], "max_tokens": 90, "n": n}
    how |= {"seed": 3, "echo": True, "logprobs": 1}
    whole = client.completions.create(**how)
    options = {"include_usage": True}
    chunks = list(client.completions.create(**how, stream=True, stream_options=options))
    texts = [""] * (2 * n)
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in whole.choices]
    assert chunks[-1].usage == whole.usage


def test_suffix_is_refused(client):
    """Row 17."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", suffix="y")
    assert (caught.value.param, caught.value.code) == (
        "suffix",
        "unsupported_parameter",
    )


def test_embeddings(client, hermes):
    """Row 18: the SDK asks for base64 by itself; both are the same floats."""
    texts = ["one", "two äö"]
    made = client.embeddings.create(model="tiny", input=texts)
    floats = client.embeddings.create(
        model="tiny", input=texts, encoding_format="float"
    )
    assert [one.index for one in made.data] == [0, 1]
    for one, other in zip(made.data, floats.data, strict=True):
        assert one.embedding == other.embedding
        assert len(one.embedding) == hermes.engine.model.spec.width
    words = hermes.engine.model.tokenizer
    assert made.usage.prompt_tokens == sum(len(words.encode(text)) for text in texts)
    few = client.embeddings.create(model="tiny", input="one", dimensions=8)
    full = np.array(made.data[0].embedding[:8])
    np.testing.assert_allclose(
        few.data[0].embedding, full / np.linalg.norm(full), rtol=1e-6
    )
    by_ids = client.embeddings.create(model="tiny", input=words.encode("one"))
    assert by_ids.data[0].embedding == made.data[0].embedding


def test_embeddings_end_as_the_tokenizer_says(client, hermes):
    """The id that tokenizer.json puts behind every text is behind ours."""
    words = hermes.engine.model.tokenizer
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, end]
    steps = [{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": single}]
    before = words.document.get("post_processor")
    words.document["post_processor"] = {"type": "Sequence", "processors": steps}
    try:
        made = client.embeddings.create(model="tiny", input="one")
    finally:
        words.document["post_processor"] = before
    ids = [*words.encode("one"), words.specials["<|endoftext|>"]]
    want = client.embeddings.create(model="tiny", input=ids)
    assert made.data[0].embedding == want.data[0].embedding
    assert made.usage.prompt_tokens == len(ids)


def picture(color=(255, 0, 0), size=(4, 4), kind="PNG"):
    import io

    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_pictures_for_a_model_without_eyes(client):
    """Row 19: an honest error that names the part."""
    url = {"type": "image_url", "image_url": {"url": picture(), "detail": "low"}}
    with pytest.raises(openai.BadRequestError) as caught:
        scripts.ask(client, scripts.user([{"type": "text", "text": "what?"}, url]))
    assert caught.value.code == "invalid_value"
    assert caught.value.param == "messages[0].content[1]"


def test_roles_and_parts(client, hermes):
    """Row 20."""
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "hello"}]
    said = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ada"},
    ]
    assert scripts.ask(client, said).choices[0].message.content == scripts.HELLO
    prompt = hermes.engine.model.tokenizer.decode(hermes.engine.seen[-1].prompt)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_cached_tokens(client, hermes):
    """Row 21."""
    assert (
        scripts.ask(client, scripts.SAY).usage.prompt_tokens_details.cached_tokens == 0
    )
    hermes.engine.cached = 7
    assert (
        scripts.ask(client, scripts.SAY).usage.prompt_tokens_details.cached_tokens == 7
    )


def test_salts(client, hermes):
    """Prompts share pages only where the caller says so."""
    salts = []
    for body in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {}):
        scripts.ask(client, scripts.SAY, extra_body=body)
        salts.append(hermes.engine.seen[-1].salt)
    assert salts[0] == salts[3] and len(set(salts)) == 3


def test_raw_answers(client):
    """Row 24."""
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=scripts.SAY, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=scripts.SAY, extra_headers={"x-request-id": "no good id"}
    )
    assert raw.headers["x-request-id"].startswith("req_")
    assert scripts.ask(client, scripts.SAY)._request_id.startswith("req_")


def test_responses_are_honestly_not_there(client):
    """Row 23."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="tiny", input="x")
    assert caught.value.code == "unsupported_endpoint"
