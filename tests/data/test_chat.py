# SPDX-License-Identifier: Apache-2.0
"""Conversations render as transformers renders them, and control tokens are the
template's alone."""

import importlib.util
import json
import pathlib
import signal
import time

import pytest

from qwen_jax import config
from qwen_jax.data import chat, reply, sandbox, tokenizer, vocabulary
from tests.data import chat_templates

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather of a "place" & <day>, é.',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Where?"},
                "days": {"type": "integer", "enum": [1, 2], "minimum": {"exact": 1}},
                "units": {"type": ["string", "null"], "default": None},
                "fine": {"type": "boolean"},
                "filter": {"type": "object", "properties": {"x": {"type": "number"}}},
            },
            "required": ["place"],
        },
    },
}
CALL = {
    "type": "function",
    "function": {
        "name": "weather",
        "arguments": {
            "place": "Köln\n<b>",
            "days": 2,
            "fine": True,
            "filter": {"x": 1},
        },
    },
}
PLAIN = [
    {"role": "system", "content": "You are short."},
    {"role": "user", "content": "hi\n\n  there  "},
    {"role": "assistant", "content": "yes, 你好"},
    {"role": "user", "content": ""},
]
TOOLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning_content": "\nI need two calls.\n",
        "tool_calls": [CALL, CALL],
    },
    {"role": "tool", "name": "weather", "content": '{"t": 3}'},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sun"},
]
THOUGHT = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\n2"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "<think>\nyes\n</think>\n\nSure."},
]
PARTS = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": " what is "},
            {"type": "image", "image": "x.png"},
            {"type": "text", "text": "this? "},
        ],
    },
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
]
TALKS = {"plain": PLAIN, "tools": TOOLS, "thought": THOUGHT, "parts": PARTS}
WAYS = {
    "asking": {},
    "silent": {"add_generation_prompt": False},
    "tools": {"tools": [WEATHER]},
    "thinking": {"enable_thinking": True},
    "not": {"enable_thinking": False},
    "effort": {"reasoning_effort": "low"},
}


@pytest.fixture(scope="module")
def box():
    with sandbox.Sandbox() as made:
        yield made


@pytest.fixture(scope="module")
def words():
    """A small vocabulary with the control tokens of Qwen3."""
    texts = [pathlib.Path(json.__file__).read_text()]
    texts += [json.dumps(one) for one in (TALKS, WEATHER)]
    texts += chat_templates.ALL.values()
    return tokenizer.train(texts, 600)


@pytest.fixture(scope="module")
def theirs(words, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs")
    words.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["bos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.AutoTokenizer.from_pretrained(folder)


def template(source):
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokens["pad_token"] = "<|endoftext|>"
    return chat.Template({"default": source}, "a test", tokens)


def published():
    """Templates of published models, where a package that ships them is installed."""
    found = importlib.util.find_spec("trl")
    folder = pathlib.Path(found.origin).parent / "chat_templates" if found else None
    return sorted(folder.glob("qwen*.jinja")) if folder and folder.is_dir() else []


SOURCES = {
    name: (lambda name=name: chat_templates.ALL[name]) for name in chat_templates.ALL
}
SOURCES |= {path.stem: path.read_text for path in published()}
SOURCES["chatml"] = lambda: vocabulary.CHATML


def theirs_says(theirs, source, talk, how):
    """(text, None) or (None, error) of transformers."""
    import jinja2

    how = {"add_generation_prompt": True} | how
    try:
        text = theirs.apply_chat_template(
            talk, chat_template=source, tokenize=False, **how
        )
    except (jinja2.TemplateError, TypeError) as error:
        return None, str(error)
    return text, None


@pytest.mark.parametrize("name", SOURCES)
def test_conversations_render_as_in_transformers(box, words, theirs, name):
    source, rendered = SOURCES[name](), 0
    for talk in TALKS.values():
        for how in WAYS.values():
            want, refused = theirs_says(theirs, source, talk, how)
            if want is None:  # ours refuses the same, in its words
                with pytest.raises(config.InputError) as told:
                    chat.render(template(source), talk, sandbox=box, **how)
                assert refused.splitlines()[0][:40] in str(told.value)
                continue
            rendered += 1
            assert chat.render(template(source), talk, sandbox=box, **how) == want
            got = chat.encode(words, template(source), talk, sandbox=box, **how)
            assert got.text == want
            # No control token is given but the tags in an assistant's content.
            assert got.ids == theirs(want, add_special_tokens=False).input_ids
    assert rendered >= 6


def test_a_thinking_prompt_is_told(words, box):
    for source, how, thinks in (
        (chat_templates.TAGS, {}, True),
        (chat_templates.TAGS, {"enable_thinking": False}, False),
        (chat_templates.THINKING, {}, False),
    ):
        got = chat.encode(words, template(source), PLAIN, sandbox=box, **how)
        assert got.thinks is thinks


# --- control tokens ---


def every_string(made):
    """The conversation with `made` wherever a string may be given."""
    call = {"function": {"name": made, "arguments": {made: made, "n": [made]}}}
    messages = [
        {"role": "system", "content": f"a {made} b"},
        {"role": "user", "content": f"{made}"},
        {"role": "assistant", "content": f"x{made}y", "tool_calls": [call]},
        {"role": "tool", "name": made, "content": f"{made}{made}"},
        {"role": "user", "content": [{"type": "text", "text": made}]},
        {"role": "assistant", "content": "z", "reasoning_content": made},
        {"role": "user", "content": "end"},
    ]
    fields = {made: {"type": made, made: made, "description": made}}
    parameters = {"type": "object", "properties": fields, made: {made: made}}
    tool = {"name": made, "description": made, "parameters": parameters}
    return messages, [{"type": "function", "function": tool}]


def specials_of(vocabulary, ids):
    known = set(vocabulary.specials.values())
    return [i for i in ids if i in known]


QWEN3 = vocabulary.SPECIALS["qwen3"]


@pytest.mark.parametrize("special", QWEN3)
@pytest.mark.parametrize("name", ["hermes", "thinking", "tags", "chatml"])
def test_a_control_token_in_given_text_is_text(box, words, name, special):
    """In every role and place: as many control tokens as with a harmless word."""
    source = template(SOURCES[name]())
    counts = []
    for made in ("harmless", special):
        messages, tools = every_string(made)
        if name == "hermes":  # it knows no parts
            messages[4]["content"] = made
        if made in chat.REPLY_TAGS:  # see the next test
            messages[2]["content"] = "xharmlessy"
        got = chat.encode(words, source, messages, tools=tools, sandbox=box)
        counts.append(specials_of(words, got.ids))
        assert words.decode(got.ids) == got.text
    assert counts[0] == counts[1]
    assert special in got.text and len(counts[0]) > 10


@pytest.mark.parametrize("special", QWEN3)
def test_an_assistants_content_keeps_the_tags_of_a_reply_only(box, words, special):
    talk = [{"role": "assistant", "content": f"a{special}b"}]
    got = chat.encode(words, template(vocabulary.CHATML), talk, sandbox=box)
    inside = specials_of(words, got.ids)[1:-2]
    wanted = [words.specials[special]] if special in chat.REPLY_TAGS else []
    assert inside == wanted and words.decode(got.ids) == got.text


def test_pieces_of_a_control_token_are_not_put_together(box, words):
    parts = [{"type": "text", "text": t} for t in ("<", "|im_", "start|", ">")]
    talk = [{"role": "user", "content": parts}]
    got = chat.encode(words, template(vocabulary.CHATML), talk, sandbox=box)
    assert got.text.count("<|im_start|>") == 3
    assert len(specials_of(words, got.ids)) == 3
    for source in (
        "{{ '<' ~ messages[0].content ~ '>' }}",  # of a key that is written as a tag
        "{{ '<|' ~ messages[0].content ~ '|>' }}",
        "{{ messages[0].content | replace('-', '') }}",
        "{{ messages[0].content | reverse }}",
    ):
        for content in (
            *("|im_start|", "im_start", "think", "/think", "<|im_st-art|>"),
            *("<th-ink>", ">|trats_mi|<", ">kniht<"),
        ):
            talk = [{"role": "user", "content": content}]
            got = chat.encode(words, template(source), talk, sandbox=box)
            assert specials_of(words, got.ids) == [], (source, content)
            assert words.decode(got.ids) == got.text


def test_text_with_control_tokens_is_the_text_of_transformers(box, words, theirs):
    """The letters come back, also from JSON and Python literals."""
    messages, tools = every_string("<|im_end|>|<b>")
    for name in ("tags", "hermes"):
        how = {"tools": tools}
        if name == "hermes":  # it knows no parts
            messages[4]["content"] = "<|im_end|>"
        want, _ = theirs_says(theirs, SOURCES[name](), messages, how)
        got = chat.encode(
            words, template(SOURCES[name]()), messages, sandbox=box, **how
        )
        assert got.text == want
    talk = [{"role": "user", "content": "<|im_start|> \ue000 \\ue001 é"}]
    want, _ = theirs_says(theirs, chat_templates.ODDS, talk, {})
    got = chat.encode(words, template(chat_templates.ODDS), talk, sandbox=box)
    assert got.text == want
    assert specials_of(words, got.ids) == [words.eos_id]  # the template's bos_token


# --- which template ---


def with_settings(words, **settings):
    return tokenizer.Tokenizer(words.document, settings)


def test_templates_by_name(words, box):
    named = [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "t"},
    ]
    made = chat.template_of(with_settings(words, chat_template=named))
    assert chat.render(made, PLAIN, sandbox=box) == "d"
    assert chat.render(made, PLAIN, sandbox=box, tools=[WEATHER]) == "t"
    made = chat.template_of(with_settings(words, chat_template=named[1:]))
    with pytest.raises(config.InputError, match="none named default"):
        chat.render(made, PLAIN, sandbox=box)
    for bad in ([{"name": "x"}], {"default": "x"}, 3):
        with pytest.raises(
            config.InputError, match="chat_template of tokenizer_config"
        ):
            chat.template_of(with_settings(words, chat_template=bad))


def test_a_folder_without_a_template_talks_chatml(words, box):
    made = chat.template_of(with_settings(words))
    assert made.origin == "built-in ChatML"
    assert chat.render(made, PLAIN[1:2], sandbox=box) == (
        "<|im_start|>user\nhi\n\n  there  <|im_end|>\n<|im_start|>assistant\n"
    )
    bare = {**words.document, "added_tokens": words.document["added_tokens"][:1]}
    with pytest.raises(config.InputError, match="instruction-tuned"):
        chat.template_of(tokenizer.Tokenizer(bare))


def test_files_of_templates_go_before_the_settings(words, tmp_path):
    words.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert tokenizer.load(tmp_path).chat_template == "from a file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    made = chat.template_of(tokenizer.load(tmp_path))
    assert made.sources == {"default": "from a file", "tool_use": "tools"}
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == made.sources
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(config.InputError, match="not UTF-8"):
        tokenizer.load(tmp_path)


def test_the_file_that_processors_wrote_before(words, tmp_path):
    words.save(tmp_path)
    for old in tmp_path.glob("chat_template*"):
        old.unlink()
    old = tmp_path / "chat_template.json"
    old.write_text(json.dumps({"chat_template": "{{ messages }} of old"}))
    assert tokenizer.load(tmp_path).chat_template == "{{ messages }} of old"
    (tmp_path / "chat_template.jinja").write_text("of now")
    assert tokenizer.load(tmp_path).chat_template == "of now"
    (tmp_path / "chat_template.jinja").unlink()
    for text, says in (("[]", "JSON object"), ("{}", "wanted a text"), ("{", "JSON")):
        old.write_text(text)
        with pytest.raises(config.InputError, match=says):
            tokenizer.load(tmp_path)


# --- bad input ---

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWS = (
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
BROKEN = {
    "loops": (LOOPS, "1 s of the processor"),
    "one-call": ("{{ lipsum(n=10**7) }}", "1 s of the processor"),
    "huge": ("{{ 'a' * 10**9 }}", "memory"),
    "grows": (GROWS, "memory"),
    "padded": ("{{ 'a' | center(10**9) }}", "memory"),
    "long": ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "16,777,216"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nested": ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "recursion"),
    "attribute": ("{{ ''.__class__ }}", "'__class__' of str is not allowed"),
    "item": ("{{ ''['__class__'] }}", "'__class__' of str is not allowed"),
    "filter": ("{{ [1] | map(attribute='__class__') | list }}", "is not allowed"),
    "format": ("{{ '{0.__class__}'.format('') }}", "is not allowed"),
    "format_map": ("{{ '{a.__class__}'.format_map({'a': 1}) }}", "is not allowed"),
    "globals": ("{{ lipsum.__globals__ }}", "is not allowed"),
    "changes": ("{{ messages.append(1) }}", "is not allowed"),
    "namespace": ("{% set n = namespace() %}{% set n.__x__ = 1 %}", "__x__"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("{% if %}", "cannot be read"),
    "refuses": ("{{ raise_exception('no ' ~ 1) }}", "refuses this conversation: no 1"),
    "undefined": ("{{ a.b.c }}", "'a' is undefined"),
    "type": ("{{ 1 + 'a' }}", "TypeError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_misbehaves_is_told_quickly(box, name):
    source, told = BROKEN[name]
    box.render("{{ 1 }}", {})  # the child is there
    begun = time.process_time()
    with pytest.raises(config.InputError, match=told):
        box.render(source, {"messages": [], "add_generation_prompt": True})
    assert time.process_time() - begun < 0.5  # of ours
    assert box.render("{{ x }}", {"x": "and on"}) == "and on"


def test_a_signal_that_is_ignored_or_blocked_here_is_none_in_the_child():
    """Some libraries' profilers ignore or block the timer's signal in the process."""
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        with sandbox.Sandbox(wall_s=20.0) as own:
            with pytest.raises(config.InputError, match="1 s of the processor"):
                own.render(LOOPS, {})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGPROF, before)


def test_the_child_has_little_to_take(monkeypatch):
    """No secrets of the environment, and memory within its bound."""
    monkeypatch.setenv("SOME_TOKEN", "secret")
    with sandbox.Sandbox(cpu_s=20.0) as own:
        own.render("{{ 1 }}", {})
        status = pathlib.Path(f"/proc/{own._child.pid}")
        if not status.is_dir():
            pytest.skip("the system has no /proc")
        assert b"secret" not in (status / "environ").read_bytes()
        own.render("{% for i in range(999) %}{{ ('a' * 10**8)[:1] }}{% endfor %}", {})
        with pytest.raises(config.InputError, match="memory"):
            own.render("{{ 'a' * 3 * 10**8 }}", {})
        own.render("{{ 1 }}", {})
        lines = (pathlib.Path(f"/proc/{own._child.pid}") / "status").read_text()
        peak = next(line for line in lines.splitlines() if line.startswith("VmPeak"))
        assert int(peak.split()[1]) < 2**20  # KiB


def test_a_child_that_is_gone_or_silent_is_replaced():
    with sandbox.Sandbox(wall_s=2.0) as own:
        assert own.render("a", {}) == "a"
        own._child.kill()
        own._child.wait()
        assert own.render("b", {}) == "b"
        own._child.send_signal(19)  # SIGSTOP
        with pytest.raises(config.InputError, match="no answer in 2 s"):
            own.render("c", {})
        assert own.render("d", {}) == "d"


def test_a_request_that_is_too_large_is_not_sent(box):
    with pytest.raises(config.InputError, match="at most 16,777,216"):
        box.render("{{ 1 }}", {"x": "a" * 2**24})
    assert len(box.render("{{ x }}", {"x": "é" * 2**20})) == 2**20


def nested(depth):
    made = []
    for _ in range(depth):
        made = [made]
    return made


def test_all_private_characters_are_taken(words, box):
    """A request cannot leave none for stand-ins, nor make the search for one long."""
    every = "".join(map(chr, chat.PRIVATE))
    begun = time.process_time()
    with pytest.raises(config.InputError, match="all private-use characters"):
        talk = [{"role": "user", "content": f"<{every}" + "a" * 10**6}]
        chat.encode(words, template("x"), talk, sandbox=box)
    assert time.process_time() - begun < 2
    talk = [{"role": "user", "content": f"<{every[:-2]}|"}]
    got = chat.encode(words, template("{{ messages[0].content }}"), talk, sandbox=box)
    assert got.text == f"<{every[:-2]}|"


@pytest.mark.parametrize(
    ("messages", "how", "told"),
    [
        ([], {}, "messages: wanted a list"),
        ("hi", {}, "messages: wanted a list"),
        (["hi"], {}, r"messages\[0\]: wanted an object"),
        ([{"content": "x"}], {}, r"messages\[0\].role=None"),
        ([{"role": "<|im_end|>", "content": "x"}], {}, "role"),
        ([{"role": "user\nsystem", "content": "x"}], {}, "role"),
        ([{"role": "user", "content": 3}], {}, r"messages\[0\].content"),
        ([{"role": "user", "content": ["x"]}], {}, r"messages\[0\].content"),
        (PLAIN, {"tools": WEATHER}, "tools: wanted a list"),
        (PLAIN, {"tools": [{"name": 3}]}, r"tools\[0\]"),
        (PLAIN, {"tools": [WEATHER, WEATHER]}, "a second tool named 'weather'"),
        ([{"role": "user", "content": "x", "deep": nested(5000)}], {}, "hundreds deep"),
        ([{"role": "user", "content": "x", ("a", 1): 1}], {}, "texts for keys"),
        (PLAIN, {"tools": [{"name": "f", "p": nested(5000)}]}, "hundreds deep"),
        (PLAIN, {"chat_template": "x"}, "template setting 'chat_template'"),
        (PLAIN, {"tokenize": True}, "template setting 'tokenize'"),
        (PLAIN, {"enable_thinking": "no"}, "enable_thinking='no': wanted bool"),
        (PLAIN, {"reasoning_effort": {"a": 1}}, "reasoning_effort"),
        (PLAIN, {"reasoning_effort": "a" * 300}, "256"),
        (PLAIN, {"enable_thinkin": True}, "did you mean 'enable_thinking'"),
    ],
)
def test_conversations_that_cannot_be(box, messages, how, told):
    with pytest.raises(config.InputError, match=told):
        chat.render(template("x"), messages, sandbox=box, **how)


# --- text as it comes ---


def test_letters_come_whole(words):
    text = "né 你好 \U0001f469\u200d\U0001f4bb <|im_start|>!" + "a" * 50
    ids = [*words.encode(text), words.im_end_id, *words.encode("é")[:1]]
    coming = tokenizer.Detokenizer(words, skip_special=True)
    pieces = [coming.push([i]) for i in ids] + [coming.end()]
    assert "".join(pieces) == words.decode(ids, skip_special=True)
    assert "".join(pieces).startswith(text) and "\ufffd" not in "".join(pieces[:-1])


def test_a_reply_is_what_its_template_rendered(box):
    """Render, cut the assistant's turn out, parse: the same thinking and calls."""
    arguments = {
        "place": '  Köln\n\n<b> </function> {"a": 1} ',
        "days": 2,
        "fine": False,
        "filter": {"x": [1.5, None, "</parameter"]},
        "units": "True",
    }
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    for name, thought in (("hermes", ""), ("tags", ""), ("thinking", "Well\n\nso")):
        for content in ("Let me look.", ""):
            message = {"role": "assistant", "content": content}
            if thought:
                message |= {"reasoning_content": thought}
            else:
                message |= {"tool_calls": [call, call]}
            talk = [{"role": "user", "content": "?"}, message]
            how = {"add_generation_prompt": False, "sandbox": box}
            text = chat.render(template(SOURCES[name]()), talk, **how)
            text = text.rpartition("<|im_start|>assistant")[2]
            text = text.removeprefix("\n").removesuffix("<|im_end|>\n")
            got = reply.parse(text, tools=[WEATHER])
            assert got.message() == message and not got.problems
