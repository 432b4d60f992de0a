# SPDX-License-Identifier: Apache-2.0
"""A checked record and a model -> what its engine is asked.

Everything here may take long (templates, tokenizers, compiling schemas) and is called
from threads beside the server's loop.

Units: tokens. Invariants: a request that comes out of here fits the model: prompt and
max_tokens fit its context, all ids are in its vocabulary, its template knows the
settings.
Raises: errors.ApiError naming the field.
"""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import chat
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.serve import errors, fields, grammar, pictures, protocol
from qwen_jax.serve import images as images_lib
from qwen_jax.serve import request as request_lib
from qwen_jax.serve import served as served_lib

MANY_LETTERS = 12  # for one token; most texts have 2 to 5


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """thinks: the answer begins with thinking. tools: those that may be called."""

    request: request_lib.Request
    thinks: bool
    tools: tuple[dict[str, Any], ...]


def of_chat(
    wanted: protocol.Chat, served: served_lib.Served, request_id: str, salt: str
) -> ChatPrompt:
    """The request of a conversation."""
    template, model = served.model.template, served.model
    if template is None:
        said = "This model has no chat template: it continues texts (/v1/completions)."
        raise errors.invalid("messages", "invalid_value", said)
    _check_sees(wanted.given.images, served)
    for message in wanted.given.messages:
        if message["role"] == "user":  # which every template writes whole
            text = message["content"]
            if isinstance(text, list):
                text = "".join(part.get("text", "") for part in text)
            check_length(text, served, "messages")
    tools = wanted.tools if wanted.tool_choice != "none" else None
    source = template.source(tools)
    if tools and "tools" not in source:
        said = "The chat template of this model knows no tools."
        raise errors.invalid("tools", "invalid_value", said)
    if isinstance(wanted.tool_choice, tuple):
        names = wanted.tool_choice
        offered = [tool for tool in tools if tool["function"]["name"] in names]
    else:
        offered = tools or []
    try:
        prompt = chat.encode(
            model.tokenizer,
            template,
            wanted.given.messages,
            tools=tools,
            **_settings(wanted, source),
        )
    except config.InputError as error:
        raise errors.invalid("messages", "invalid_value", str(error)) from None
    ids, images = _with_images(prompt.ids, wanted.given.images, served)
    made = request(
        wanted,
        served,
        ids,
        images=images,
        request_id=request_id,
        salt=salt,
        param="messages",
        grammar=_grammar(wanted, served, offered, prompt.thinks, source),
        most=wanted.max_tokens,
    )
    return ChatPrompt(made, prompt.thinks, tuple(tools or ()))


def _check_sees(given: Sequence[pictures.Picture], served: served_lib.Served) -> None:
    """Refuse images for a model or an engine that takes none, or not so many."""
    if not given:
        return
    most = served.engine.settings.images if served.model.spec.vision else 0
    if not most:
        said = f"The model {served.name} takes no images."
        raise errors.invalid(given[0].at, "invalid_value", said)
    if len(given) > most:
        raise pictures.too_many(given, most)


def _with_images(
    ids: list[int], given: Sequence[pictures.Picture], served: served_lib.Served
) -> tuple[list[int], tuple[images_lib.Image, ...]]:
    """Ids of a conversation with a placeholder for each feature of its images, and the
    images."""
    if not given:
        return ids, ()
    sees = served.model.sees
    pictures.check_places(sees, ids, given)
    most = served.engine.settings.image_patches
    images = pictures.read(given, sees.images, most)
    grids = np.array([one.grid for one in images])
    return sees.expand(ids, grids, grids[:0]).tolist(), images


def check_length(text: str, served: served_lib.Served, param: str) -> None:
    """Refuse a text of megabytes by its beginning, in a fraction of the time.

    Raises:
      errors.ApiError: 400 context_length_exceeded.
    """
    limit = served.engine.max_tokens
    if len(text) <= MANY_LETTERS * limit:
        return
    # More text changes how its beginning is cut in tokens, but not by half.
    count = len(served.model.tokenizer.encode(text[: MANY_LETTERS * limit]))
    if count > 1.5 * limit + 256:
        raise _too_long(limit, f"for more than {count * 2 // 3}", param)


def _too_long(limit: int, asked: str, param: str) -> errors.ApiError:
    said = f"This model's maximum context length is {limit} tokens, and you asked "
    said += f"{asked}; shorten the {param} or the answer."
    return errors.invalid(param, "context_length_exceeded", said)


def _settings(wanted: protocol.Chat, source: str) -> dict[str, Any]:
    """Settings for the template, none of which it would not look at."""
    settings = dict(wanted.settings)
    if wanted.effort is not None:
        knows = "reasoning_effort" in source
        if knows and wanted.effort != "none":
            settings.setdefault("reasoning_effort", wanted.effort)
        elif "enable_thinking" in source or wanted.effort == "none":
            settings.setdefault("enable_thinking", wanted.effort != "none")
        else:
            said = "none: this model's template has no thinking"
            raise fields.wrong_value("reasoning_effort", said, wanted.effort)
    for name, value in list(settings.items()):
        if name not in source:
            if name == "enable_thinking" and value is False:
                del settings[name]  # it does not think anyway
                continue
            at = f"chat_template_kwargs.{name}"
            said = f"Invalid {at}: the chat template of this model does not have it."
            raise errors.invalid(at, "invalid_value", said)
    return settings


def _grammar(
    wanted: protocol.Chat,
    served: served_lib.Served,
    offered: list[dict[str, Any]],
    thinks: bool,
    source: str,
) -> grammar.Compiled | None:
    """What the answer must look like, if anything."""
    shape = wanted.answer_format
    forced = bool(offered) and wanted.tool_choice not in ("auto", "none")
    strict = any(tool["function"].get("strict") for tool in offered)
    if shape == "text" and not forced and not strict:
        return None
    if wanted.ignore_eos:
        raise fields.wrong_value("ignore_eos", "false where answers have a form", True)
    compiler = served.grammars
    schema = shape if isinstance(shape, dict) else None
    if shape == "json_object":
        schema = {"type": "object"}
    if not offered:
        return _compiled(
            protocol.FORMAT_AT, lambda: compiler.json(schema, thinks=thinks)
        )
    if not forced:  # schemas that are not strict are for the model to read
        offered = [tool if _strict(tool) else _loose(tool) for tool in offered]
    if schema is not None:  # so that an error names its own field
        _compiled(protocol.FORMAT_AT, lambda: compiler.json(schema))
    return _compiled(
        "tools",
        lambda: compiler.calls(
            offered,
            tags="<function=" in source,
            many=wanted.parallel,
            text=not forced and schema is None,
            schema=schema,
            thinks=thinks,
        ),
    )


def _strict(tool: dict[str, Any]) -> bool:
    return bool(tool["function"].get("strict"))


def _loose(tool: dict[str, Any]) -> dict[str, Any]:
    return {"function": {"name": tool["function"]["name"], "free": True}}


def _compiled(at: str, make: Any) -> grammar.Compiled:
    try:
        return make()
    except config.InputError as error:
        said = f"Invalid schema for {at}: {error}."
        raise errors.invalid(at, "invalid_json_schema", said) from None


def request(
    wanted: protocol.Common,
    served: served_lib.Served,
    ids: list[int] | tuple[int, ...],
    *,
    request_id: str,
    salt: str,
    param: str,
    most: int | None,
    grammar: grammar.Compiled | None = None,
    prompt_logprobs: int | None = None,
    images: tuple[images_lib.Image, ...] = (),
) -> request_lib.Request:
    """The request of a prompt's ids; param: the field that the prompt came in."""
    model, limit = served.model, served.engine.max_tokens
    room = limit - len(ids)
    if not ids:
        said = f"Invalid {param}: no token is in it; wanted at least one."
        raise errors.invalid(param, "invalid_value", said)
    if room < 1 or (most is not None and most > room):
        asked = f"for {len(ids) + (most or 1)} ({len(ids)} in the {param}"
        asked += ")" if most is None else f" and {most} in the answer)"
        raise _too_long(limit, asked, param)
    for name, listed in (
        ("logit_bias", wanted.logit_bias),
        ("stop_token_ids", wanted.stop_ids),
        (param, ids),
    ):
        top = max(listed, default=0)
        if top >= model.spec.vocab_size:
            said = f"ids below {model.spec.vocab_size}"
            raise fields.wrong_value(name, said, top)
    ends = (*model.stop_ids, *model.tokenizer.stop_ids, *wanted.stop_ids)
    return request_lib.Request(
        id=request_id,
        prompt=tuple(ids),
        max_tokens=room if most is None else most,
        sampling=_sampling(wanted, served),
        n=wanted.n,
        stop=wanted.stop,
        stop_ids=() if wanted.ignore_eos else tuple(dict.fromkeys(ends)),
        logprobs=wanted.logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=wanted.logit_bias,
        grammar=grammar,
        salt="\x00".join((salt, wanted.salt)),
        images=images,
    )


def _sampling(
    wanted: protocol.Common, served: served_lib.Served
) -> sampling_lib.Sampling:
    """What the request says, else what the model's publisher advises, else OpenAI's
    default of temperature 1."""
    seed = secrets.randbits(63) if wanted.seed is None else wanted.seed % 2**63
    settings = {"temperature": 1.0} | dict(served.model.advised)
    settings |= wanted.chosen
    return sampling_lib.Sampling(**settings, seed=seed)
