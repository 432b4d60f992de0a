# SPDX-License-Identifier: Apache-2.0
"""Facts and pure functions about byte-level BPE vocabularies: patterns, ids, merges.

Source: GPT-2's byte alphabet (each byte has a printable character, so that merges are
text); the pre-tokenizer patterns and the special tokens are those of the published
Qwen2, Qwen2.5, Qwen3 and Qwen3.5 tokenizers. Qwen 1 used the same 151,643 ranks with
other specials after them (<|extra_0|> ... from 151,646); packages that ship
`qwen.tiktoken` still list those, so specials are taken from here, never from there.
Formats: a tiktoken file has one "BASE64 RANK" pair a line; `tokenizer.json` is the
document of the `tokenizers` library.
Invariants: ranks are ids; a token's merge is the pair its bytes stand in when every
merge of a lower rank has been applied to them.
Raises: InputError for a file that is not such a vocabulary.
"""

import base64
import binascii
import itertools
from typing import Any

from qwen_jax import config

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LETTERS_35 = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|{_SPACES}"
QWEN35_PATTERN = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS_35}|{_SPACES}"
# What `ByteLevel(use_regex=True)` of the tokenizers library splits by.
GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)

_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VISION = tuple(
    f"<|{name}|>"
    for name in (
        *("object_ref_start", "object_ref_end", "box_start", "box_end"),
        *("quad_start", "quad_end", "vision_start", "vision_end"),
        *("vision_pad", "image_pad", "video_pad"),
    )
)
_TOOLS = ("<tool_call>", "</tool_call>")
_CODE = tuple(
    f"<|{name}|>"
    for name in (
        *("fim_prefix", "fim_middle", "fim_suffix", "fim_pad"),
        *("repo_name", "file_sep"),
    )
)
_THINK = ("<tool_response>", "</tool_response>", "<think>", "</think>")
_AUDIO = (
    *("<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>"),
    *("<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>"),
)
_QWEN25 = _CONTROL + _VISION + _TOOLS + _CODE

# Special tokens in id order; the first id is the number of ranks.
SPECIALS = {
    "qwen2": _CONTROL,
    "qwen2.5": _QWEN25,
    "qwen3": _QWEN25 + _THINK,
    "qwen3.5": _QWEN25 + _THINK + _AUDIO,
}
# Tokens that decoding with skip_special must keep: they are content of an answer.
CONTENT_TOKENS = frozenset(_TOOLS + _CODE + _THINK)
NUM_RANKS = {
    "qwen2": 151_643,
    "qwen2.5": 151_643,
    "qwen3": 151_643,
    "qwen3.5": 248_044,
}

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content if part.text is defined %}{{- part.text }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def pattern_of(family: str) -> str:
    """The pre-tokenizer pattern of a family of SPECIALS."""
    return QWEN35_PATTERN if family == "qwen3.5" else QWEN2_PATTERN


def _byte_characters() -> list[str]:
    """Byte -> the character that stands for it (printable Latin-1 stays itself)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in kept}
    others = [byte for byte in range(256) if byte not in characters]
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


CHARACTER_OF_BYTE = _byte_characters()
BYTE_OF_CHARACTER = {c: byte for byte, c in enumerate(CHARACTER_OF_BYTE)}


def to_text(token: bytes) -> str:
    """Bytes -> the text that stands for them in a vocabulary."""
    return "".join([CHARACTER_OF_BYTE[byte] for byte in token])


def to_bytes(token: str) -> bytes:
    """Inverse of to_text; KeyError where a character stands for no byte."""
    return bytes([BYTE_OF_CHARACTER[c] for c in token])


def read_tiktoken(path: str) -> dict[bytes, int]:
    """A tiktoken rank file -> {token: rank}."""
    try:
        with open(path, "rb") as file:
            lines = [line.split() for line in file if line.strip()]
        return {base64.b64decode(token): int(rank) for token, rank in lines}
    except OSError as error:
        raise config.InputError(
            f"cannot read the vocabulary {path!r} ({error.strerror}); give the path "
            "of a .tiktoken file"
        ) from error
    except (ValueError, binascii.Error) as error:
        raise config.InputError(
            f"{path!r} is no tiktoken vocabulary ({error}); wanted lines of a token in "
            "base64 and its rank"
        ) from error


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge of every token of two or more bytes that has one, in rank order.

    A token's own bytes are merged by lower ranks only, lowest first, until two parts
    are left: these are its merge. A token that keeps more parts (some of Qwen3.5's)
    has none; it is met as a whole piece only.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = rank, -1
            for i in range(len(parts) - 1):
                found = ranks.get(parts[i] + parts[i + 1], rank)
                if found < best:
                    best, at = found, i
            if at < 0:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def tokenizer_json(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    specials: tuple[str, ...],
    pattern: str,
    *,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The tokenizer.json document of a byte-level BPE with specials after its ids."""
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    first = max(vocab.values()) + 1
    added = [
        {
            "id": first + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in CONTENT_TOKENS,
        }
        for i, token in enumerate(specials)
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": {"type": "ByteLevel", **byte_level},
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def tiktoken_parts(document: dict[str, Any]) -> tuple[str, dict[bytes, int]] | None:
    """(pattern, ranks) when tiktoken gives the same ids as this tokenizer.json.

    tiktoken joins the adjacent pair whose union has the lowest rank; `tokenizers` joins
    the pair that stands first in the merge list. These are one rule when the i-th merge
    makes the i-th multi-byte id and every such id has one merge: below a token's rank
    nothing joins across its ends without joining more later, so its bytes always come
    to the same two parts, the pair in the list. None where the file does anything else
    (another normalizer, dropout, prefixes, single bytes missing).
    """
    model = document["model"]
    pattern = _pattern(document.get("pre_tokenizer"))
    normalizer = document.get("normalizer")
    plain = not any(
        model.get(key)
        for key in (
            *("dropout", "unk_token", "continuing_subword_prefix"),
            *("end_of_word_suffix", "byte_fallback"),
        )
    )
    if pattern is None or not plain or normalizer not in (None, {"type": "NFC"}):
        return None
    added = {token["content"] for token in document.get("added_tokens", ())}
    vocab = {t: i for t, i in model["vocab"].items() if t not in added}
    try:
        ranks = {to_bytes(token): rank for token, rank in vocab.items()}
    except KeyError:
        return None
    merged = [vocab.get(a + b) for a, b in map(split_merge, model["merges"])]
    ordered = None not in merged and all(a < b for a, b in itertools.pairwise(merged))
    single_bytes = all(bytes([byte]) in ranks for byte in range(256))
    whole = len(merged) == len(ranks) - 256 or model.get("ignore_merges")
    return (pattern, ranks) if ordered and single_bytes and whole else None


def split_merge(merge: Any) -> tuple[str, str]:
    """A merge of tokenizer.json in its old form "a b" or its new form [a, b]."""
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The one regular expression that a pre-tokenizer splits by, or None."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    level = parts[-1]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        return None
    use_regex = level.get("use_regex", True)
    if len(parts) == 1:
        return GPT2_PATTERN if use_regex else None
    split = parts[0]
    wanted = {"type": "Split", "behavior": "Isolated", "invert": False}
    if len(parts) > 2 or use_regex or any(split.get(k) != wanted[k] for k in wanted):
        return None
    return split["pattern"].get("Regex")
