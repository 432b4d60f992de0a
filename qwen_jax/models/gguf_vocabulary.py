# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a GGUF file: its tokens and merges as a tokenizer.json document.

Source: the keys `tokenizer.ggml.*` of ggml's GGUF specification; the rules by which
text is cut are those of the published tokenizers that each name in `tokenizer.ggml.pre`
stands for.

Formats: the file has tokens in the order of their ids, in the byte alphabet of GPT-2;
kinds of tokens (1 normal, 3 control, 4 added by a user, 5 unused); merges as "a b".
Deviations: a file does not say whether text is normalized, the published Qwen
tokenizers do (NFC); unused ids (padding of the table) are no tokens; a file of a Qwen
architecture that names no rules, or "default", is cut by Qwen's.
Invariants: ids are those of the file.
Raises: config.InputError for a vocabulary of another kind, unknown rules, tokens that
are twice there, merges that are no pairs of tokens.
"""

from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import tokenizer as tokenizer_lib
from qwen_jax.data import vocabulary
from qwen_jax.models import gguf_file

_KEY = "tokenizer.ggml."
CONTROL, ADDED, UNUSED = 3, 4, 5
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_NFC = {"normalizer": {"type": "NFC"}}
_PLAIN = {"normalizer": None}
_DIGITS = {"type": "Digits", "individual_digits": True}
# Name of the rules -> (pattern, changes to the document that is made with it).
_QWEN2 = (vocabulary.QWEN2_PATTERN, _NFC, {})
_LLAMA3 = (LLAMA3_PATTERN, _PLAIN, {"ignore_merges": True})
_BYTES = ("", _PLAIN | {"pre_tokenizer": _GPT2}, {})
RULES = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": (vocabulary.QWEN35_PATTERN, _NFC, {}),
    "smollm": (
        "",
        _PLAIN
        | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]}},
        {},
    ),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "gpt-2": _BYTES,
    "default": _BYTES,
}


def tokenizer(header: gguf_file.Header) -> tokenizer_lib.Tokenizer:
    """The tokenizer that the facts of a file describe."""
    model = header.fact(_KEY + "model", str, "")
    if model != "gpt2":
        raise config.InputError(
            f"{header.path}: {_KEY}model is {model[:80]!r}; wanted 'gpt2', a "
            "byte-level BPE such as Qwen's"
        )
    embed = header.tensors.get("token_embd.weight")
    tokens = _texts(header, "tokens", embed.shape[0] if embed else 0)
    kinds = header.facts.get(_KEY + "token_type", np.ones(len(tokens), np.int32))
    kinds = kinds.tolist() if isinstance(kinds, np.ndarray) else []
    if len(kinds) != len(tokens):
        raise config.InputError(
            f"{header.path}: {_KEY}token_type has {len(kinds):,} entries for "
            f"{len(tokens):,} tokens"
        )
    vocab = {t: i for i, t in enumerate(tokens) if kinds[i] != UNUSED}
    if len(vocab) != len(tokens) - kinds.count(UNUSED):
        raise config.InputError(f"{header.path}: a token is twice in {_KEY}tokens")
    added = [
        _added(tokens[i], i, kind) for i, kind in enumerate(kinds) if kind in (3, 4)
    ]
    pattern, changes, model_changes = _rules(header)
    document = vocabulary.tokenizer_json(vocab, _merges(header, vocab), (), pattern)
    document |= {"added_tokens": added} | changes
    document["model"] |= model_changes
    return tokenizer_lib.Tokenizer(document, _settings(header, tokens))


def _texts(header: gguf_file.Header, name: str, most: int) -> list[str]:
    found = header.facts.get(_KEY + name)
    if not isinstance(found, gguf_file.Texts) or not len(found):
        raise config.InputError(f"{header.path} has no array of texts {_KEY}{name}")
    if len(found) > most:
        raise config.InputError(
            f"{header.path}: {_KEY}{name} has {len(found):,} texts; its embedding has "
            f"place for {most:,}"
        )
    return list(found)


def _merges(header: gguf_file.Header, vocab: dict[str, int]) -> list[tuple[str, str]]:
    most = 8 * len(vocab)  # some tokens have several
    merges = [tuple(text.split(" ")) for text in _texts(header, "merges", most)]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise config.InputError(
                f"{header.path}: the merge {' '.join(pair)[:80]!r} is no pair of "
                "tokens that makes a token"
            )
    return merges


def _added(token: str, i: int, kind: int) -> dict[str, Any]:
    return {
        "id": i,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind == CONTROL and token not in vocabulary.CONTENT_TOKENS,
    }


def _rules(header: gguf_file.Header) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """How text is cut: an entry of RULES."""
    name = header.fact(_KEY + "pre", str, "default")
    if name not in RULES:
        raise config.InputError(
            f"{header.path}: {_KEY}pre is {name[:80]!r}: rules that are not known; "
            f"known: {', '.join(RULES)}"
        )
    architecture = header.fact("general.architecture", str, "")
    if name == "default" and architecture.startswith("qwen"):
        name = "qwen2"
    return RULES[name]


def _settings(header: gguf_file.Header, tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json: named tokens, whether one begins a text, the template."""
    out = {}
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    for name, there in names.items():
        i = header.fact(f"{_KEY}{there}_token_id", int)
        if i is None:
            continue
        if not 0 <= i < len(tokens):
            raise config.InputError(
                f"{header.path}: {_KEY}{there}_token_id is {i}; there are "
                f"{len(tokens):,} tokens"
            )
        out[f"{name}_token"] = tokens[i]
    begins = header.fact(_KEY + "add_bos_token", bool)
    if begins is not None:
        out["add_bos_token"] = begins
    template = header.fact("tokenizer.chat_template", str)
    if template is not None:
        out["chat_template"] = template
    return out
