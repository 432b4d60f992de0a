# SPDX-License-Identifier: Apache-2.0
"""/v1/embeddings: vectors of documents, from the engine.

They are of unit length; with `dimensions`, the first of them, made of unit length again
(Matryoshka, arXiv 2205.13147). A text gets the ids that the model's tokenizer.json puts
behind every text (an embedding model's own end id, whose state is the vector); ids are
taken as they are.

Formats: base64 is of little-endian float32, which OpenAI's SDK asks for by itself.
Raises: errors.ApiError 400 for inputs or dimensions that do not fit.
"""

import asyncio
import base64
from typing import Any

import numpy as np

from qwen_jax.data import tokenizer
from qwen_jax.serve import errors, fields, prompts, protocol
from qwen_jax.serve import served as served_lib


async def embeddings(
    wanted: protocol.Embedding, served: served_lib.Served
) -> dict[str, Any]:
    """The answer of /v1/embeddings.

    Raises:
      errors.ApiError: an input that does not fit, or more dimensions than there are.
    """
    width = served.model.spec.width
    if wanted.dimensions is not None and wanted.dimensions > width:
        said = f"Invalid dimensions: {wanted.dimensions}; wanted at most {width}."
        raise errors.invalid("dimensions", "integer_above_max_value", said)
    inputs = await asyncio.to_thread(_inputs, wanted, served)
    vectors_nd = await asyncio.to_thread(served.engine.embed, inputs)
    if wanted.dimensions is not None:
        vectors_nd = vectors_nd[:, : wanted.dimensions]
        norms_n1 = np.linalg.norm(vectors_nd, axis=1, keepdims=True)
        vectors_nd = vectors_nd / np.maximum(norms_n1, 1e-12)
    vectors_nd = np.asarray(vectors_nd, "<f4")
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(vector_d.tobytes()).decode()
            if wanted.base64
            else vector_d.tolist(),
        }
        for i, vector_d in enumerate(vectors_nd)
    ]
    count = sum(map(len, inputs))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": served.name, "usage": usage}


def _inputs(
    wanted: protocol.Embedding, served: served_lib.Served
) -> list[tuple[int, ...]]:
    limit, made, words = served.engine.max_tokens, [], served.model.tokenizer
    behind = ending(words)
    for one in wanted.inputs:
        if isinstance(one, str):
            prompts.check_length(one, served, "input")
            ids = words.encode(one) + behind
        else:
            ids = one
        if len(ids) > limit:
            said = f"This model's maximum context length is {limit} tokens, and an "
            said += f"input has {len(ids)}; shorten it."
            raise errors.invalid("input", "context_length_exceeded", said)
        if max(ids) >= served.model.spec.vocab_size:
            said = f"ids below {served.model.spec.vocab_size}"
            raise fields.wrong_value("input", said, max(ids))
        made.append(tuple(ids))
    return made


def ending(words: tokenizer.Tokenizer) -> list[int]:
    """Ids that a tokenizer.json puts behind every text."""
    found = words.document.get("post_processor") or {}
    for step in (found, *(found.get("processors") or ())):
        if step.get("type") == "TemplateProcessing":
            names: list[str] = []
            for item in step["single"]:
                if "Sequence" in item:
                    names = []
                else:
                    names.append(item["SpecialToken"]["id"])
            return [words.specials[name] for name in names]
    return []
