# SPDX-License-Identifier: Apache-2.0
"""Messages -> text -> ids, by the chat template of the model's folder.

    template = template_of(vocabulary)
    prompt = encode(vocabulary, template, messages, tools=..., enable_thinking=False)

A message is {"role", "content"} and what the template knows besides: reasoning_content,
tool_calls, name. The text is the one that transformers' `apply_chat_template` gives
(5.x: None values dropped, `reasoning_content` also under its older names).

Control tokens: `<|im_start|>` from the template is a control token, the same letters
from anybody else are letters. Before rendering, the letters that control tokens begin
with, and the bar in them, are replaced in every given string (keys of tool schemas and
settings too) by private-use characters that occur nowhere in the request; a string that
is the inside of a control token (`think`) has its first letter replaced. The rendered
text is cut at the control tokens that are still whole, and only then do the letters
come back. One character stands for one, so templates may strip, split, slice, escape
(JSON's and Python's escapes of the stand-ins are undone as well) and join pieces, and a
token that falls apart over two strings is not put together either.
What a template cannot see is a control token in given text. Two places matter in
Qwen's: `</think>` in an assistant's content, at which its thinking is cut off, so
there REPLY_TAGS stay what they are, being what a model wrote; and a user message that
is a whole <tool_response>, which is taken for a question (give it the role tool).

Formats: a template is Jinja (`sandbox`); several are known by name, "tool_use" being
taken where tools are given. Settings are scalars on SETTINGS, never what a request
calls `chat_template`.
Raises: config.InputError for messages, tools or settings that cannot be, a model
without a template, and whatever `sandbox` says.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_jax import config
from qwen_jax.data import sandbox as sandbox_lib
from qwen_jax.data import tokenizer as tokenizer_lib
from qwen_jax.data import vocabulary as vocabulary_lib

REPLY_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
REASONING = ("reasoning_content", "thinking", "reasoning")
# Switches of published templates that a caller may set.
SETTINGS = {
    "enable_thinking": bool,
    "preserve_thinking": bool,
    "clear_thinking": bool,
    "add_vision_id": bool,
    "reasoning_effort": str,
    "thinking_budget": int,
    "date_string": str,
}
MAX_SETTING = 256  # letters
PRIVATE = range(0xE000, 0xF900)
_PRIVATE = re.compile(f"[{chr(PRIVATE[0])}-{chr(PRIVATE[-1])}]")
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclasses.dataclass(frozen=True)
class Template:
    """Templates by name, where they come from, and the tokens they may write by name
    (bos_token, eos_token and so on)."""

    sources: Mapping[str, str]
    origin: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def source(self, tools: Any = None) -> str:
        """The one for a conversation with or without tools.

        Raises:
          config.InputError: there is none to take by default.
        """
        if tools is not None and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" not in self.sources:
            raise config.InputError(
                f"the model has chat templates named {', '.join(sorted(self.sources))} "
                "and none named default; rename one in its folder"
            )
        return self.sources["default"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model reads: ids, and their text for people.

    thinks: the text ends inside a <think> block, so the answer begins with thinking.
    """

    ids: list[int]
    text: str

    @property
    def thinks(self) -> bool:
        """See the class."""
        return self.text.rstrip().endswith("<think>")


def template_of(vocabulary: tokenizer_lib.Tokenizer) -> Template:
    """The template of a model's folder, or ChatML.

    Raises:
      config.InputError: none, and no ChatML marks in the vocabulary; or one that is
        no text.
    """
    own = vocabulary.settings.get("chat_template")
    tokens = {}
    for key, value in vocabulary.settings.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            tokens[key] = value
    if not own:
        if vocabulary.im_start_id is None:
            raise config.InputError(
                "the model has neither a chat template nor <|im_start|> in its "
                "vocabulary: it continues texts (`qwen-jax generate`); for chat, take "
                "an instruction-tuned model"
            )
        return Template({"default": vocabulary_lib.CHATML}, "built-in ChatML", tokens)
    if isinstance(own, str):
        return Template({"default": own}, "the model's folder", tokens)
    try:
        sources = {one["name"]: one["template"] for one in own}
    except (TypeError, KeyError, IndexError):
        sources = {None: None}
    if not all(isinstance(x, str) for pair in sources.items() for x in pair):
        raise config.InputError(
            "chat_template of tokenizer_config.json: wanted a text or a list of "
            '{"name": ..., "template": ...}'
        )
    return Template(sources, "the model's folder", tokens)


def render(template: Template, messages: Any, **how: Any) -> str:
    """The text of a conversation, for people to look at; see `encode` for arguments."""
    text, back = _render(template, messages, (), **how)
    return back(text)


def encode(
    vocabulary: tokenizer_lib.Tokenizer,
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    **how: Any,
) -> Prompt:
    """A conversation as the model reads it.

    Args:
      vocabulary: its tokenizer.
      template: its chat template.
      messages: the conversation, at least one message.
      **how: tools (JSON schemas), add_generation_prompt (default True), sandbox
        (default: the shared one), and SETTINGS of the template.
    Raises:
      config.InputError: see the module docstring.
    """
    text, back = _render(template, messages, vocabulary.specials, **how)
    ids = []
    for piece, special in _pieces(vocabulary, text):
        ids += [special] if special is not None else vocabulary.encode(back(piece))
    return Prompt(ids, back(text))


def _render(
    template: Template,
    messages: Any,
    specials: Iterable[str],
    *,
    tools: Any = None,
    add_generation_prompt: bool = True,
    sandbox: sandbox_lib.Sandbox | None = None,
    **settings: Any,
) -> tuple[str, Any]:
    """(text with stand-ins, function that puts the letters back)."""
    messages = _checked(messages)
    check_settings(settings)
    if tools is not None:
        check_tools(tools)
    source = template.source(tools)
    try:
        guard = _Guard(specials, [messages, tools, settings, source])
        variables = {
            **template.tokens,
            **guard.value(settings),
            "messages": [guard.message(message) for message in messages],
            "tools": guard.value(tools),
            "documents": None,
            "add_generation_prompt": bool(add_generation_prompt),
        }
    except (RecursionError, TypeError, ValueError) as error:
        if isinstance(error, config.InputError):
            raise
        raise config.InputError(
            f"messages or tools cannot be written as JSON ({error}); wanted dicts with "
            "texts for keys, lists, texts and numbers, not nested hundreds deep"
        ) from error
    text = (sandbox or sandbox_lib.shared()).render(source, variables)
    return text, guard.back


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Messages as templates expect them."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise config.InputError(
            "messages: wanted a list of at least one {role, content}"
        )
    made = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise config.InputError(f"messages[{i}]: wanted an object with a role")
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise config.InputError(
                f"messages[{i}].role={role!r}: wanted system, user, assistant or tool"
            )
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else []
        if not isinstance(content, str | list | tuple | None) or not all(
            isinstance(part, Mapping) for part in parts
        ):
            raise config.InputError(
                f"messages[{i}].content: wanted a text or a list of parts such as "
                '{"type": "text", "text": ...}'
            )
        kept = {k: v for k, v in message.items() if v is not None}
        thought = next((kept[key] for key in REASONING if key in kept), None)
        if thought is not None:
            kept = {"thinking": thought, **kept, "reasoning_content": thought}
        made.append(kept)
    return made


def check_tools(tools: Any) -> None:
    """Refuse tools that are no list of JSON schemas of functions.

    Raises:
      config.InputError: naming the first that is not.
    """
    if not isinstance(tools, list | tuple):
        raise config.InputError("tools: wanted a list of JSON schemas")
    names = set()
    for i, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not name:
            raise config.InputError(
                f'tools[{i}]: wanted {{"type": "function", "function": {{"name": ..., '
                '"description": ..., "parameters": {...}}}'
            )
        if name in names:
            raise config.InputError(f"tools[{i}]: a second tool named {name!r}")
        names.add(name)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what is not a setting of templates.

    Raises:
      config.InputError: an unknown name or a value of another type.
    """
    for name, value in settings.items():
        if name not in SETTINGS:
            hint = config.nearest(name, SETTINGS)
            raise config.InputError(f"template setting {name!r}{hint}")
        wanted = SETTINGS[name]
        if type(value) is not wanted or len(str(value)) > MAX_SETTING:
            raise config.InputError(
                f"template setting {name}={str(value)[:40]!r}: wanted {wanted.__name__}"
                f" of at most {MAX_SETTING} letters"
            )


class _Guard:
    """Stand-ins for the letters of control tokens, for one request."""

    def __init__(self, specials: Iterable[str], request: Any):
        specials = [token for token in specials if token]
        first = {token[0] for token in specials}
        # A letter or a blank cannot be replaced wherever it stands: templates compare
        # and strip. Such tokens are met as a whole.
        whole = {c for c in first if c.isalnum() or c.isspace()}
        letters = (first - whole) | {"|" for token in specials if "|" in token}
        insides = {token.strip("<>|[]{}/") for token in specials}
        self._insides = insides | {token[1:-1] for token in specials}
        words = sorted((t for t in specials if t[0] in whole), key=len, reverse=True)
        self._found = _any_of([*words, *sorted(letters)])
        self._found_by_model = _any_of([*REPLY_TAGS, *words, *sorted(letters)])
        self._free = self._unused(request)
        self._stand_ins: dict[str, str] = {}

    @staticmethod
    def _unused(request: Any):
        """Private characters that are not in the request, escaped or not."""
        text = json.dumps(request, ensure_ascii=False, default=str)
        used = {ord(found) for found in _PRIVATE.findall(text)}
        used |= {int(found, 16) for found in _ESCAPED.findall(text)}
        return (chr(point) for point in PRIVATE if point not in used)

    def _for(self, letter: str) -> str:
        if letter not in self._stand_ins:
            stand_in = next(self._free, None)
            if stand_in is None:
                raise config.InputError(
                    "the messages use all private-use characters (U+E000 to U+F8FF); "
                    "take some out"
                )
            self._stand_ins[letter] = stand_in
        return self._stand_ins[letter]

    def text(self, text: str, *, by_model: bool = False) -> str:
        """A given string with its control letters replaced."""
        if text in self._insides and text:
            return self._for(text[0]) + text[1:]

        def replace(found):
            word = found[0]
            if by_model and word in REPLY_TAGS:
                return word
            return self._for(word[0]) + word[1:]

        found = self._found_by_model if by_model else self._found
        return found.sub(replace, text)

    def value(self, value: Any) -> Any:
        """The same in lists and dicts, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            # The kind of a part is compared by templates, which write it nowhere.
            return {
                self.value(k): v if k == "type" and _is_name(v) else self.value(v)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.value(one) for one in value]
        return value

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message; an assistant's content keeps the tags of a reply."""
        content, made = message.get("content"), self.value(message)
        made["role"] = message["role"]
        if message["role"] == "assistant" and isinstance(content, str):
            made["content"] = self.text(content, by_model=True)
        return made

    def back(self, text: str) -> str:
        """A rendered text with the letters back."""
        for letter, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, letter)
            text = text.replace(f"\\u{ord(stand_in):04x}", letter)
        return text


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w+", value) is not None


def _any_of(words: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def _pieces(vocabulary: tokenizer_lib.Tokenizer, text: str):
    """(text, None) and (control token, its id) in order, as `tokenizers` cuts them."""
    tokens = {}
    for token in vocabulary.document.get("added_tokens") or []:
        pattern = re.escape(token["content"])
        if token.get("single_word"):
            pattern = rf"(?<!\w){pattern}(?!\w)"
        pattern = (r"\s*" if token.get("lstrip") else "") + f"({pattern})"
        tokens[token["content"]] = pattern + (r"\s*" if token.get("rstrip") else "")
    longest = sorted(tokens, key=len, reverse=True)
    cut = re.compile("|".join(tokens[token] for token in longest) or "(?!)")
    end = 0
    for found in cut.finditer(text):
        if found.start() > end:
            yield text[end : found.start()], None
        word = found[found.lastindex]
        yield word, vocabulary.specials[word]
        end = found.end()
    if end < len(text):
        yield text[end:], None
