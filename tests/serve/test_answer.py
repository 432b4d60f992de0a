# SPDX-License-Identifier: Apache-2.0
"""Ids of an answer become the text that clients are told."""

from qwen_jax.data import tokenizer
from qwen_jax.serve import answer
from qwen_jax.serve import request as request_lib


def test_control_tokens_are_no_text():
    """What is drawn of them counts, and is not told; marks of thinking are."""
    vocabulary = tokenizer.train(["some words of a text " * 9], 300)
    names = ["<|im_start|>", "<think>", "</think>"]
    ids = [vocabulary.specials[name] for name in names]
    request = request_lib.Request(id="r", prompt=(1,), max_tokens=9)
    made = answer.Answer(request, (), vocabulary)
    told = "".join(made.push(token)[0] for token in [ids[0], *ids[1:], *ids[:1]])
    assert (told, made.count) == ("<think></think>", 4)
