# SPDX-License-Identifier: Apache-2.0
"""A model to talk with, and a conversation: what `generate` and `chat` share.

`load_model` is the one place where a path becomes a model, its tokenizer, its chat
template and what its publisher advises (generation_config.json: sampling and end ids).
`Talk` holds the messages and the cache: `answer` gives pieces of text as they come and
adds the answer to the history, in its parts (thinking, content, tool calls).

Invariants: a turn that cannot be answered leaves the history as it was; the answers do
not depend on what the cache kept of earlier turns.
Raises: config.InputError for what is missing or does not fit, the context being full
among it.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from qwen_jax import checks, config, models
from qwen_jax import params as params_lib
from qwen_jax.data import chat, image, multimodal, reply, tokenizer, video
from qwen_jax.models import decode, gguf, hf_config
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.models import spec as spec_lib

APART_WEIGHTS = 1_000_000_000  # beyond, taking them apart would need the memory twice
ADVISED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that talks.

    template: None where the vocabulary has no chat marks either. advised: settings of
    sampling in generation_config.json. stop_ids: what ends a text.
    """

    spec: spec_lib.Spec
    params: Any
    tokenizer: tokenizer.Tokenizer
    template: chat.Template | None
    advised: dict[str, Any]
    stop_ids: tuple[int, ...]
    path: str

    @functools.cached_property
    def sees(self) -> multimodal.Processor | None:
        """What makes prompts of pictures; None for a model without vision.

        Raises:
          config.InputError: its folder does not say how, or its vocabulary has no marks
            of images.
        """
        if self.spec.vision is None:
            return None
        settings = image.load_settings(self.path), video.load_settings(self.path)
        return multimodal.Processor(self.tokenizer, *settings)

    def chat_template(self) -> chat.Template:
        """The template, or an InputError that says why there is none."""
        return self.template or chat.template_of(self.tokenizer)


def load_model(path: str, dtype: str = "float32", *, lay_out: bool = True) -> Model:
    """A model, its tokenizer and template from a path.

    Args:
      path: a Hugging Face folder or a GGUF file.
      dtype: of weights and compute.
      lay_out: as `decode` reads them fastest; an engine wants them as they are.
    Raises:
      config.InputError: a run folder, or what `models.load` and `tokenizer.load` say.
    """
    folder = pathlib.Path(path)
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        raise config.InputError(
            f"{folder} is a run folder: give --model {folder}/export, or make a model "
            f"of its newest checkpoint with `qwen-jax convert {folder} DIR`"
        )
    if gguf.is_gguf(folder):
        vocabulary = gguf.tokenizer(folder)
        spec, params = models.load(folder, dtype=dtype)
    else:
        told = hf_config.spec_from_config(hf_config.read_config(folder))
        vocabulary = tokenizer.load(folder)
        checks.ids_fit(vocabulary, told, folder)
        spec, params = models.load(folder, dtype=dtype)
    advised, ends = _advised(folder / "generation_config.json", spec.vocab_size)
    stop_ids = tuple(dict.fromkeys((*spec.eos_ids, *ends))) or (vocabulary.eos_id,)
    own = vocabulary.settings.get("chat_template")
    apart = lay_out and _apart(spec, params)
    talks = own or vocabulary.im_start_id is not None
    return Model(
        spec=spec,
        params=decode.laid_out(spec, params) if apart else params,
        tokenizer=vocabulary,
        template=chat.template_of(vocabulary) if talks else None,
        advised=advised,
        stop_ids=stop_ids,
        path=str(path),
    )


def _apart(spec: spec_lib.Spec, params: Any) -> bool:
    """Whether layers are compiled one by one. A CPU copies slices of stacked weights at
    each step: with 30 layers and 135 M weights a token takes 0.21 s of the processor
    stacked and 0.06 s apart, and the compiler three times as long once."""
    small = params_lib.count(params) <= APART_WEIGHTS
    return spec.num_layers <= 12 or (small and jax.default_backend() == "cpu")


def _advised(path: pathlib.Path, vocab_size: int) -> tuple[dict[str, Any], list[int]]:
    """(settings of sampling, end ids) of a generation_config.json, if there is one."""
    if not path.is_file():
        return {}, []
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise config.InputError(f"{path}: not a readable JSON file") from error
    if not isinstance(raw, dict):
        raise config.InputError(f"{path}: wanted a JSON object")
    advised = {name: raw[name] for name in ADVISED if raw.get(name) is not None}
    if raw.get("do_sample") is not True:  # transformers is greedy then
        advised.pop("temperature", None)
    elif "temperature" not in advised:
        advised["temperature"] = 1.0
    try:
        sampling_lib.Sampling(**advised)
    except config.InputError as error:
        raise config.InputError(f"{path}: {error}; correct or remove it") from error
    ends = raw.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    for end in ends:
        if type(end) is not int or not 0 <= end < vocab_size:
            raise config.InputError(
                f"{path}: eos_token_id {end!r}: wanted ids from 0 to {vocab_size - 1}"
            )
    return advised, ends


def wishes(given: dict[str, Any], model: Model) -> sampling_lib.Sampling:
    """Settings of the command line (None where a flag is left out), else advised ones.

    Raises:
      config.InputError: naming the flag.
    """
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return sampling_lib.Sampling(**model.advised | given)
    except config.InputError as error:
        raise config.InputError(f"--{error}") from error


def told_wishes(given: dict[str, Any], model: Model) -> str:
    """A line on advised settings that hold, "" where none does."""
    held = [name for name in model.advised if given.get(name) is None]
    if not held:
        return ""
    words = ", ".join(f"{name} {model.advised[name]:g}" for name in held)
    return f"sampling by generation_config.json: {words}"


@dataclasses.dataclass(frozen=True)
class Told:
    """How an answer went.

    why: "end" (a stop id or text), "length" (max_tokens), "context" (no position is
    left), "stopped" (the caller). Times are seconds since the question.
    """

    reply: reply.Reply
    why: str
    num_tokens: int
    prompt_tokens: int
    reused_tokens: int
    first_s: float
    whole_s: float

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token; with only one, of all."""
        if self.num_tokens > 1:
            return (self.num_tokens - 1) / max(self.whole_s - self.first_s, 1e-9)
        return self.num_tokens / max(self.whole_s, 1e-9)


class Talk:
    """A handle on one conversation: messages, settings, and the cache of its model."""

    def __init__(
        self,
        model: Model,
        *,
        system: str = "",
        tools: Sequence[dict] | None = None,
        sampling: sampling_lib.Sampling | None = None,
        settings: dict[str, Any] | None = None,
        max_tokens: int = 2048,
        stops: Sequence[str] = (),
    ):
        """See `chat.encode` for tools and settings, `decode.stream` for sampling."""
        reply.check_stops(stops)
        chat.check_settings(settings or {})
        if tools is not None:
            chat.check_tools(tools)
        if max_tokens < 1:
            raise config.InputError(f"max_tokens={max_tokens}: wanted at least 1")
        self.model, self.template = model, model.chat_template()
        if tools and "tools" not in self.template.source(tools):
            raise config.InputError(
                f"the chat template ({self.template.origin}) knows no tools: leave "
                "--tools out, or take a model that was trained with tools"
            )
        self.tools, self.settings = tools, dict(settings or {})
        self.sampling = sampling or sampling_lib.Sampling()
        self.max_tokens, self.stops = max_tokens, tuple(stops)
        self.messages: list[dict[str, Any]] = []
        self.system = system
        self.told: Told | None = None
        self._kept = decode.Kept()

    def close(self) -> None:
        """Let the cache go."""
        self._kept.close()

    def clear(self) -> None:
        """Forget the messages; the system message stays."""
        self.messages = []

    def undo(self) -> bool:
        """Forget the last question and what followed; False where there is none."""
        while self.messages:
            if self.messages.pop()["role"] == "user":
                return True
        return False

    def history(self) -> list[dict[str, Any]]:
        """All messages, the system message first."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.messages

    def answer(
        self, *said: dict[str, Any], stopped: Callable[[], bool] = bool
    ) -> Iterator[tuple[str, str]]:
        """Add messages and answer: ("thinking", "content" or "call", text) as it comes.

        The answer is in the history and in `told` when the iterator is at its end.

        Args:
          *said: messages, such as {"role": "user", "content": ...}.
          stopped: asked after each token; True ends the answer there.
        Raises:
          config.InputError: the template refuses, or the context is full; the messages
            are taken back.
        """
        before = len(self.messages)
        self.messages += said
        try:
            prompt = self._prompt()
            yield from self._answer(prompt, stopped)
        except BaseException:
            del self.messages[before:]
            raise

    def _prompt(self) -> chat.Prompt:
        model = self.model
        prompt = chat.encode(
            model.tokenizer,
            self.template,
            self.history(),
            tools=self.tools,
            **self.settings,
        )
        if len(prompt.ids) >= model.spec.max_positions:
            raise config.InputError(
                f"the context is full: the conversation has {len(prompt.ids):,} tokens,"
                f" the model takes {model.spec.max_positions:,}; /undo and shorten the "
                "message, or /clear"
            )
        return prompt

    def _answer(self, prompt: chat.Prompt, stopped: Callable[[], bool]):
        model, begun = self.model, time.monotonic()
        left = model.spec.max_positions - len(prompt.ids)
        most = min(self.max_tokens, left)
        letters = tokenizer.Detokenizer(model.tokenizer, skip_special=True)
        watch, shown = reply.Watch(self.stops), Shown(prompt.thinks)
        text, count, first_s, why = "", 0, 0.0, "end"
        # Turns of one seed are drawn apart.
        turn = sum(message["role"] == "user" for message in self.messages)
        seed = (self.sampling.seed + turn - 1) % 2**64
        ids = decode.stream(
            model.spec,
            model.params,
            prompt.ids,
            max_tokens=most,
            sampling=dataclasses.replace(self.sampling, seed=seed),
            stop_ids=dict.fromkeys((*model.stop_ids, *model.tokenizer.stop_ids)),
            kept=self._kept,
        )
        met = False  # a stop text
        for token in ids:
            count += 1
            first_s = first_s or time.monotonic() - begun
            for part, word in watch.push(letters.push([token])):
                text += part
                yield from shown.push(part)
                if word is not None:
                    met = True
                    break
            if met or stopped():
                why = "end" if met else "stopped"
                ids.close()
                break
        else:
            if count == most:
                why = "context" if most == left else "length"
        if not met:
            rest = watch.end() + letters.end()
            text += rest
            yield from shown.push(rest)
        yield from shown.end()
        whole_s = time.monotonic() - begun
        parts = reply.parse(
            text, thinks=prompt.thinks, tools=self.tools or (), calls=bool(self.tools)
        )
        self.messages.append(parts.message())
        self.told = Told(
            parts,
            why,
            count,
            len(prompt.ids),
            self._kept.reused,
            first_s or whole_s,
            whole_s,
        )


class Shown:
    """An answer's text in pieces -> ("thinking", "content" or "call", text) in pieces,
    without the tags of thinking and the blanks around it."""

    def __init__(self, thinks: bool):
        tags = (reply.THINK, reply.THOUGHT, reply.OPEN, reply.CLOSE)
        self._watch = reply.Watch(tags)
        self._kind = "thinking" if thinks else "content"
        self._may_think = True  # nothing but blanks yet
        self._blank = True  # blanks are left out until there is a letter

    def push(self, text: str) -> Iterator[tuple[str, str]]:
        """What can be told of one more piece."""
        for part, tag in self._watch.push(text):
            yield from self._part(part)
            if tag is not None:
                yield from self._tag(tag)

    def end(self) -> Iterator[tuple[str, str]]:
        """What was kept back, as it might have become a tag."""
        yield from self._part(self._watch.end())

    def _part(self, text: str) -> Iterator[tuple[str, str]]:
        if self._blank:
            text = text.lstrip("\n")
        if not text:
            return
        self._may_think = self._may_think and not text.strip()
        if self._kind == "content" and self._may_think:
            return  # blanks before what may be thinking
        self._blank = False
        yield self._kind, text

    def _tag(self, tag: str) -> Iterator[tuple[str, str]]:
        begins = tag == reply.THINK and self._may_think
        if begins or (tag == reply.THOUGHT and self._kind == "thinking"):
            self._kind = "thinking" if begins else "content"
            self._may_think, self._blank = False, True
            return
        self._may_think = False
        if self._kind == "content" and tag == reply.OPEN:
            self._kind = "call"
        yield self._kind, tag
        if self._kind == "call" and tag == reply.CLOSE:
            self._kind = "content"
