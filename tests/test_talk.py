# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax chat` and `generate --chat`: what is said, kept, counted and refused."""

import io
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from qwen_jax import cli, config, export, models, talk
from qwen_jax.data import chat, tokenizer
from qwen_jax.models import decode
from qwen_jax.models import spec as spec_lib
from tests import runs
from tests.data import chat_templates

PLAIN = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights with a template that cuts nothing."""
    path = tmp_path_factory.mktemp("talk") / "model"
    texts = [pathlib.Path(json.__file__).read_text(), *chat_templates.ALL.values()]
    words = tokenizer.train(texts, 600)
    spec = spec_lib.Spec(
        vocab_size=words.vocab_size,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        ffn_width=48,
        max_positions=300,
        init_std=0.3,
    )
    export.write(spec, models.init(spec, 0), words, path)
    (path / "chat_template.jinja").write_text(PLAIN)
    return path


@pytest.fixture
def variant(folder, tmp_path):
    """The same model with files changed."""

    def variant(**files):
        copied = shutil.copytree(folder, tmp_path / f"model{len(os.listdir(tmp_path))}")
        for name, content in files.items():
            content = content if isinstance(content, str) else json.dumps(content)
            (copied / name.replace("__", ".")).write_text(content)
        return copied

    return variant


@pytest.fixture
def say(capsys, monkeypatch):
    """(standard output, standard error) of a chat through a pipe."""

    def say(path, *lines, code=0, flags=()):
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(x + "\n" for x in lines)))
        flags = ["--temperature=0", "--max_tokens=20", *flags]
        got = cli.main(["chat", f"--model={path}", *flags])
        out, err = capsys.readouterr()
        assert got == code, err
        return out, err

    return say


@pytest.fixture
def script(monkeypatch, folder):
    """Let the model say given texts, one an answer, some letters a token."""
    vocabulary = tokenizer.load(folder)

    def script(*texts, between=lambda i: None):
        texts, prompts = iter(texts), []

        def stream(spec, params, prompt, *, max_tokens, stop_ids, **_):
            prompts.append(vocabulary.decode(prompt))
            ids = vocabulary.encode(next(texts), allow_special=True)
            for i, token in enumerate(ids[:max_tokens]):
                if token in stop_ids:
                    return
                yield token
                between(i)

        monkeypatch.setattr(talk.decode, "stream", stream)
        return prompts

    return script


def saved(path):
    return json.loads(path.read_text())["messages"]


# --- with a model ---


@pytest.fixture(scope="module")
def fresh(folder):
    """The greedy answer to messages, from a prompt that is computed as a whole."""
    model = talk.load_model(str(folder))

    def fresh(messages, count=20):
        prompt = chat.encode(model.tokenizer, model.template, messages)
        how = {"max_tokens": count, "stop_ids": model.tokenizer.stop_ids}
        (ids,) = decode.generate(model.spec, model.params, [prompt.ids], **how)
        return model.tokenizer.decode(ids, skip_special=True)

    return fresh


def test_a_chat_answers_each_line_with_all_that_was_said(say, folder, fresh, tmp_path):
    lines = ["hello", "", "and <|im_end|> then?", "//save", f"/save {tmp_path / 'x'}"]
    out, err = say(folder, *lines)
    messages = []
    for line in ("hello", "and <|im_end|> then?", "/save"):
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": fresh(messages)})
    answers = [message["content"] for message in messages[1::2]]
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert len(set(answers)) == 3 and saved(tmp_path / "x") == messages
    speeds = re.findall(
        r"\[(\d+) tokens, [\d.]+ tokens/s, first after [\d.]+ s; "
        r"(\d+) of the prompt's (\d+) tokens were there",
        err,
    )
    assert [int(count) for count, _, _ in speeds] == [20, 20, 20]
    assert int(speeds[0][1]) == 0  # later turns go on from what is there
    assert int(speeds[1][1]) > 10 and int(speeds[2][1]) > 50
    assert "qwen3, " in err and "template: the model's folder; context 300" in err


def test_a_prompt_of_generate_is_a_message_with_chat(capsys, folder, fresh):
    words = ["generate", f"--model={folder}", "--chat", "--max_tokens=20"]
    prompts = ["hello", "good <|im_end|> day"]
    assert cli.main([*words, *[f"--prompt={prompt}" for prompt in prompts]]) == 0
    want = [fresh([{"role": "user", "content": prompt}]) for prompt in prompts]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in want)
    assert cli.main([*words, "--prompt=hello", "--json", f"--stop={want[0][5:8]}"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["text"] == want[0][:5] and row["thinking"] == ""


def test_commands_change_what_the_model_reads(say, folder, fresh, tmp_path):
    def user(text):
        return {"role": "user", "content": text}

    file = tmp_path / "talk.json"
    lines = ["/undo", "one", "two", "/undo", "three", f"/save {file}", "/clear", "one"]
    out, err = say(
        folder,
        *lines,
        "/system Be brief.",
        "two",
        "/system",
        "/help",
        "/sav x",
        f"/save {tmp_path}/no/file",
        "/save",
        "/exit",
        "never",
    )
    first = [user("one"), {"role": "assistant", "content": fresh([user("one")])}]
    two = fresh([*first, user("two")])
    three = fresh([*first, user("three")])
    brief = fresh([{"role": "system", "content": "Be brief."}, *first, user("two")])
    answers = [first[1]["content"], two, three, first[1]["content"], brief]
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert saved(file) == [
        *first,
        user("three"),
        {"role": "assistant", "content": three},
    ]
    assert "nothing to undo" in err and "/system TEXT" in err
    assert "error: /sav; did you mean '/save'?" in err
    assert "error: /save FILE: name a file" in err and "No such file" in err
    assert two != brief != three


def test_a_seed_says_the_same_again(say, folder):
    hot = ["--temperature=1.5", "--top_k=40"]
    first, _ = say(folder, "a", "a", flags=[*hot, "--seed=3"])
    assert first == say(folder, "a", "a", flags=[*hot, "--seed=3"])[0]
    assert first != say(folder, "a", "a", flags=[*hot, "--seed=4"])[0]
    # A nucleus of one token is the likeliest token whatever the temperature.
    cold, _ = say(folder, "a", "a")
    assert say(folder, "a", "a", flags=[*hot, "--top_p=1e-9"])[0] == cold != first


def test_a_full_context_is_told_and_the_chat_goes_on(say, folder):
    out, err = say(folder, "x " * 400, "hello", flags=["--max_tokens=9000"])
    assert re.search(
        r"error: the context is full: the conversation has [\d,]{3,} "
        r"tokens, the model takes 300; /undo and shorten",
        err,
    )
    assert "cut, as the context is full: /clear or /undo" in err
    assert out.count("\n") >= 1 and len(out) > 200


# --- generation_config.json ---


def test_what_the_publisher_advises_holds_unless_a_flag_says_otherwise(
    capsys, monkeypatch, variant, folder
):
    got = []

    def generate(spec, params, ids, *, sampling, stop_ids, **_):
        got.append((sampling[0], stop_ids))
        return [[]] * len(ids)

    monkeypatch.setattr(talk.decode, "generate", generate)
    advice = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    path = variant(generation_config__json=advice | {"eos_token_id": [7, 9]})
    assert cli.main(["generate", f"--model={path}", "--prompt=x"]) == 0
    assert "temperature 0.6, top_k 20, top_p 0.95" in capsys.readouterr().err
    flags = ["--temperature=0", "--top_k=0", "--top_p=1", "--min_p=0.1", "--seed=5"]
    assert cli.main(["generate", f"--model={path}", "--prompt=x", *flags]) == 0
    assert "sampling by" not in capsys.readouterr().err
    cold = variant(generation_config__json=advice | {"do_sample": False})
    assert cli.main(["generate", f"--model={cold}", "--prompt=x"]) == 0
    end = tokenizer.load(folder).eos_id
    (first, ends), (second, _), (third, _) = got
    assert (first.temperature, first.top_k, first.top_p) == (0.6, 20, 0.95)
    assert ends == (end, 7, 9)
    assert (second.temperature, second.top_k, second.top_p) == (0, 0, 1)
    assert (second.min_p, second.seed, third.temperature) == (0.1, 5, 0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not a readable JSON file"),
        ([], "wanted a JSON object"),
        ({"top_k": -1}, "top_k=-1: wanted a whole number, 0 for all ids; correct"),
        (
            {"do_sample": True, "temperature": "hot"},
            "temperature='hot': wanted a number",
        ),
        (
            {"eos_token_id": [10**9]},
            "eos_token_id 1000000000: wanted ids from 0 to 599",
        ),
        ({"eos_token_id": "x"}, "eos_token_id 'x'"),
    ],
)
def test_advice_that_cannot_be_is_named(say, variant, content, told):
    _, err = say(variant(generation_config__json=content), "hi", code=2)
    assert err.startswith("error: ") and "generation_config.json: " in err
    assert told in err


# --- with answers that are given ---


def test_thinking_is_apart_from_the_answer(say, variant, script, tmp_path):
    path = variant(chat_template__jinja=chat_templates.THINKING)
    prompts = script(
        "<think>\nWell, é \U0001f469\u200d\U0001f4bb.\n</think>\n\nYes 你好!",
        "a <think> b<|im_end|>c",
        "<think>\nno end",
    )
    flags = ["--thinking=off", "--max_tokens=100"]
    out, err = say(path, "1?", "2?", "3?", f"/save {tmp_path / 'x'}", flags=flags)
    assert out == "Yes 你好!\na <think> b\n\n"
    assert "Well, é \U0001f469\u200d\U0001f4bb." in err and "no end" in err
    assert "\ufffd" not in out + err and "<think>" not in err
    assert prompts[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert "Well" not in prompts[1]  # the template leaves earlier thinking out
    messages = saved(tmp_path / "x")
    assert [m.get("reasoning_content") for m in messages[1::2]] == [
        "Well, é \U0001f469\u200d\U0001f4bb.",
        None,
        "no end",
    ]
    assert [m["content"] for m in messages[1::2]] == ["Yes 你好!", "a <think> b", ""]


def test_a_prompt_that_opens_thinking(say, variant, script):
    path = variant(chat_template__jinja=chat_templates.TAGS)
    script("so\n</think>\n\nYes", "No <think>")
    out, err = say(path, "1?", flags=["--thinking=on"])
    assert out == "Yes\n" and "so\n" in err
    assert say(path, "1?", flags=["--thinking=off"])[0] == "No <think>\n"


def test_tools_are_asked_for_and_their_results_read(
    say, folder, variant, script, tmp_path
):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    roomy = json.loads((folder / "config.json").read_text())
    roomy["max_position_embeddings"] = 3000
    path = variant(chat_template__jinja=chat_templates.TAGS, config__json=roomy)
    call = (
        "<tool_call>\n<function=weather>\n<parameter=place>\nKöln\n</parameter>\n"
        "<parameter=days>\n{}\n</parameter>\n</function>\n</tool_call>"
    )
    prompts = script(
        f"</think>\n\nLet me see.\n\n{call.format(1)}\n{call.format(2)}",
        "</think>\n\nRain, then sun.",
        '</think>\n\n<tool_call>\n{"name": 3}\n</tool_call>',
    )
    flags = [f"--tools={tmp_path / 'tools.json'}", "--max_tokens=200"]
    lines = ["Weather?", "rain", "sun <|im_end|>", "and?", f"/save {tmp_path / 'x'}"]
    out, err = say(path, *lines, flags=flags)
    assert out.startswith(f"Let me see.\n\n{call.format(1)}\n{call.format(2)}\nRain, ")
    assert 'result of weather {"place": "Köln", "days": 1}, one line:' in err
    asked, called, rain, sun, answered, _, odd = saved(tmp_path / "x")
    assert called["content"] == "Let me see."
    arguments = [one["function"]["arguments"] for one in called["tool_calls"]]
    assert arguments == [{"place": "Köln", "days": 1}, {"place": "Köln", "days": 2}]
    assert rain == {"role": "tool", "name": "weather", "content": "rain"}
    assert sun["content"] == "sun <|im_end|>"
    assert answered["content"] == "Rain, then sun."
    assert "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun" in prompts[1]
    # What cannot be read is said, and nothing is asked.
    assert '[tool call at letter 0: no "name"]' in err
    assert odd["content"] == '<tool_call>\n{"name": 3}\n</tool_call>'


def test_templates_that_know_no_tools_or_thinking(say, folder, script, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    flags = [f"--tools={tmp_path / 'tools.json'}"]
    _, err = say(folder, "hi", flags=flags, code=2)
    assert "the chat template (the model's folder) knows no tools: leave" in err
    script("yes")
    out, err = say(folder, "hi", flags=["--thinking=on"])
    assert out == "yes\n" and "cannot switch thinking; --thinking does nothing" in err


def test_tool_calls_without_tools_are_text(say, folder, script, tmp_path):
    text = 'x <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    script(text)
    assert say(folder, "1?", flags=["--max_tokens=90"])[0] == f"{text}\n"


def test_an_answer_ends_before_a_stop_text(say, folder, script, tmp_path):
    script("one STOP two", "one STO", "ST and more\n\nSTUV")
    flags = ["--stop=STOP", "--stop=\n\nSTU", "--max_tokens=50"]
    out, _ = say(folder, "1", "2", "3", f"/save {tmp_path / 'x'}", flags=flags)
    assert out == "one \none STO\nST and more\n"
    contents = [m["content"] for m in saved(tmp_path / "x")[1::2]]
    assert contents == ["one ", "one STO", "ST and more"]


def test_an_interrupt_stops_the_answer_and_not_the_chat(say, folder, script, tmp_path):
    hits = []

    def between(i):
        if i == 4 and not hits:
            hits.append(i)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    script("a b c d e f g h i j k l m", "and on", between=between)
    out, err = say(folder, "1", "2", f"/save {tmp_path / 'x'}")
    assert out.endswith("\nand on\n") and "; stopped" in err
    cut = saved(tmp_path / "x")[1]["content"]
    assert out == f"{cut}\nand on\n" and "a b c d e f g".startswith(cut) and cut
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_leaves(say, folder, script):
    def between(i):
        if i in (2, 3):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    script("a b c d e f g h i j", between=between)
    _, err = say(folder, "1", "2", code=130)
    assert "interrupted" in err


# --- what cannot be ---


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--top_k=-7"], "--top_k=-7: wanted"),
        (["--max_tokens=0"], "max_tokens=0: wanted at least 1"),
        (["--dtype=f32"], "--dtype 'f32'"),
        (["--thinking=maybe"], "--thinking 'maybe'"),
        (["--tools=/nowhere"], "--tools /nowhere: No such file"),
        (["--tools={bad}"], "it is not JSON"),
        (["--tools={dict}"], "tools: wanted a list of JSON schemas"),
        (["--tools={deep}"], "it is not JSON"),
        (["--tools={big}"], "more than 1048576 bytes"),
        (["--stop="], "stop text ''"),
        (["--streaming"], "unknown flag --streaming"),
    ],
)
def test_flags_that_cannot_be(say, folder, tmp_path, flags, told):
    files = {"bad": "[", "dict": "{}", "deep": "[" * 10**5, "big": " " * 2**21}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    flags = [x.format(**{name: tmp_path / name for name in files}) for x in flags]
    _, err = say(folder, "hi", flags=flags, code=2)
    assert err.startswith("error: ") and told in err and "Traceback" not in err


def test_a_template_that_misbehaves_ends_its_turn_only(say, variant):
    loops = (
        "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"
    )
    begun = time.process_time()
    for source, told in (
        (loops, "more than 1 s of the processor"),
        ("{{ 'a' * 10**9 }}", "memory"),
        ("{{ ''.__class__ }}", "is not allowed"),
        ("{{ raise_exception('only questions') }}", "only questions"),
    ):
        out, err = say(variant(chat_template__jinja=source), "hi", "/save", "ho")
        assert out == "" and err.count(told) == 2 and "name a file" in err
    assert time.process_time() - begun < 20


def test_a_model_that_does_not_talk(say, folder, variant):
    document = json.loads((folder / "tokenizer.json").read_text())
    for token in document["added_tokens"]:
        if token["content"].startswith("<|im_"):
            token["content"] = token["content"].replace("im_", "other_")
    path = variant(tokenizer__json=document, tokenizer_config__json={})
    (path / "chat_template.jinja").unlink()
    _, err = say(path, "hi", code=2)
    assert "take an instruction-tuned model" in err
    with pytest.raises(config.InputError, match="instruction-tuned"):
        talk.load_model(str(path)).chat_template()


# --- as a program ---


def command(folder, *flags):
    return [sys.executable, "-m", "qwen_jax", "chat", f"--model={folder}", *flags]


def test_through_a_pipe(folder, fresh):
    done = subprocess.run(
        command(folder, "--temperature=0", "--max_tokens=20"),
        input="hello",
        capture_output=True,
        text=True,
        env=runs.environment(),
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == fresh([{"role": "user", "content": "hello"}]) + "\n"
    assert "> " not in done.stderr


def test_in_a_terminal(variant, tmp_path):
    """Thinking is dim, control letters are shown as such, Ctrl-D leaves with 0."""
    path = variant(chat_template__jinja=chat_templates.TAGS)
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        command(path, "--temperature=1.5", "--max_tokens=200", "--seed=1"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=runs.environment() | {"TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def until(mark):
        nonlocal seen
        end = time.monotonic() + 200
        while mark not in seen and time.monotonic() < end:
            if select.select([ours], [], [], 1.0)[0]:
                try:
                    seen += os.read(ours, 1 << 16)
                except OSError:  # the other side is closed
                    break
        assert mark in seen, seen[-2000:]
        before, _, seen = seen.partition(mark)
        return before

    until(b"> ")
    os.write(ours, b"hello\n")
    shown = until(b"tokens/s")
    assert b"\033[2m" in shown
    # Nothing but our own marks begins with ESC, and no other control letter is sent.
    rest = shown.replace(b"\033[2m", b"").replace(b"\033[0m", b"")
    rest = rest.partition(b"hello\r\n")[2].replace(b"\r\n", b"\n")
    assert not set(rest) & {*range(9), *range(11, 32)}, rest
    until(b"> ")
    os.write(ours, b"\x04")
    try:
        assert child.wait(60) == 0
    finally:
        child.kill()
        os.close(ours)
