# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of GGUF files, and the commands that take such a file.

Oracles: the tokenizer that a file was written from, and the one that transformers makes
of the file. That one normalizes nothing, so it is asked for texts in NFC; and it takes
SmolLM's rules for GPT-2's, so it is told that digits stand alone, as the published
tokenizer has it ("  9" is two blanks and a digit, not a blank and " 9").
"""

import json
import unicodedata

import jax
import numpy as np
import pytest
import tokenizers

from qwen_jax import cli, config, models
from qwen_jax.data import tokenizer, vocabulary
from qwen_jax.models import gguf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
package = pytest.importorskip("gguf")
from tests import ggufs  # noqa: E402 (it needs the three)

SPECIMENS = [
    "Hello, world!",
    "  leading and   inner   blanks \n\n\t mixed\r\nends  ",
    "naïve café — ẛ̣ ﬁ Å",
    "你好，世界！数字123与４５６。ひらがな カタカナ 한국어 हिन्दी",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # it's done, they'LL see\n",
    "12345 1234567 ½ ٣٤ x²  9 a1b2\n3",
    "\U0001f469\u200d\U0001f4bb\U0001f1e8\U0001f1f3 \u0000\u007f\ufeff",
    "<|im_start|>user\n<think> hi</think><|im_end|>\n<|endoftext|>",
    "'ſ 'S K Å ǅ İ ı ß ẞ 'RE",
    "",
]
PROSE = """
 The quick brown fox jumps over the lazy dog; she sells sea shells, they'll say it
 isn't so. return self.value if value is None else [x for x in range(10)]
"""
ADDED = [(t, 3) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
ADDED += [("<think>", 4), ("</think>", 4)]
TRAINED = tokenizer.train([PROSE * 4, *SPECIMENS * 3], 500)
MERGES = [vocabulary.split_merge(m) for m in TRAINED.document["model"]["merges"]]
VOCAB = 256 + len(MERGES) + len(ADDED) + 7
START, END = 257 + len(MERGES), 258 + len(MERGES)
SIZES = {"num_hidden_layers": 1, "vocab_size": VOCAB}
SIZES |= {"bos_token_id": START, "eos_token_id": END}


@pytest.fixture(scope="module")
def model():
    made = ggufs.model("llama", **SIZES)
    return made, ggufs.tensors(made, "llama")


def write(model, folder, *, architecture="llama", change=lambda w: None, **how):
    made, tensors = model
    how = {"added": ADDED, "unused": 7, "merges": MERGES} | how

    def add(writer):
        ggufs.add_tokenizer(writer, **how)
        change(writer)

    path = folder / "model.gguf"
    ggufs.write(path, architecture, tensors, made.config, facts=[add])
    return path


def theirs(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("pre", ["qwen2", "qwen35", "llama-bpe", "gpt-2", "smollm"])
def test_ids_are_those_of_transformers(pre, model, tmp_path):
    path = write(model, tmp_path, pre=pre)
    ours, reference = gguf.tokenizer(path), theirs(path)
    if pre == "smollm":
        backend = reference.backend_tokenizer
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        cuts = [digits, backend.pre_tokenizer]
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(cuts)
    split = set()
    for text in SPECIMENS:
        text = unicodedata.normalize("NFC", text)
        want = reference.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == want, text
        assert ours.decode(want) == text
        split.add(tuple(want))
    assert len(split) == len(SPECIMENS)


QWEN2 = ["a", "Ġ", "1", "2", "3", "4", "Ġb", "1"]


@pytest.mark.parametrize(
    "pre, architecture, want",
    [
        ("qwen2", "llama", QWEN2),
        ("smollm", "llama", QWEN2),
        ("llama-bpe", "llama", ["a", "Ġ", "123", "4", "Ġb", "1"]),
        ("gpt-2", "llama", ["a", "Ġ1234", "Ġb", "1"]),
        ("default", "llama", ["a", "Ġ1234", "Ġb", "1"]),
        ("default", "qwen2", QWEN2),
    ],
)
def test_digits_are_cut_as_the_published_tokenizers_do(
    pre, architecture, want, tmp_path
):
    """What transformers does not take from the file, and all trained merges hide."""
    made = ggufs.model(architecture, **SIZES)
    pair = made, ggufs.tensors(made, architecture)
    path = write(pair, tmp_path, architecture=architecture, pre=pre)
    document = gguf.tokenizer(path).document
    pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document)).pre_tokenizer
    pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str("a 1234 b1")]
    assert pieces == want


def test_a_qwen_file_gives_the_tokenizer_that_it_came_from(model, tmp_path):
    made = gguf.tokenizer(write(model, tmp_path))
    for text in SPECIMENS:
        text = text.replace("<", "")
        ours = [made.decode([i]) for i in made.encode(text)]
        assert ours == [TRAINED.decode([i]) for i in TRAINED.encode(text)]
    assert made.encode("e\u0301") == made.encode("é")
    assert made.fast
    assert made.encode("<think>") != made.encode("<think>", allow_special=True)
    # Padding of the table is no token.
    assert made.vocab_size == VOCAB - 7
    ids = made.encode("<think>a</think><|im_end|>", allow_special=True)
    assert made.decode(ids, skip_special=True) == "<think>a</think>"
    assert made.specials["<|im_end|>"] in made.stop_ids
    assert gguf.template(write(model, tmp_path)) == made.chat_template
    assert made.chat_template.startswith("{% for m in messages %}")


@pytest.mark.parametrize(
    "how, told",
    [
        ({"pre": "tekken"}, "pre is 'tekken': rules that are not known; known: qwen2"),
        ({"unused": 0, "added": [*ADDED, ("<think>", 4)]}, "a token is twice in"),
        ({"unused": 9}, f"has {VOCAB + 2} texts; its embedding has place for {VOCAB}"),
        ({"merges": [("a", "bcd")]}, "the merge 'a bcd' is no pair of tokens"),
        ({"merges": [("a", "b c")]}, "the merge 'a b c' is no pair of tokens"),
        ({"kind": "llama"}, "ggml.model is 'llama'; wanted 'gpt2', a byte-level BPE"),
        ({"kinds": [1]}, f"token_type has 1 entries for {VOCAB} tokens"),
    ],
)
def test_what_is_no_vocabulary(how, told, model, tmp_path):
    with pytest.raises(config.InputError) as error:
        gguf.tokenizer(write(model, tmp_path, **how))
    assert told in str(error.value)


# --- commands ---


@pytest.fixture
def call(capsys, monkeypatch):
    """Standard output of a command that must succeed."""
    cache = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)

    def call(*words):
        capsys.readouterr()
        code = cli.main([*map(str, words)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


def test_convert_gives_a_folder_that_transformers_loads(call, model, tmp_path):
    made, _ = model
    path, folder = write(model, tmp_path), tmp_path / "folder"
    call("convert", path, folder)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.arange(2 * 20).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, made(ids).logits)
    assert back.generation_config.eos_token_id == END
    assert back.generation_config.bos_token_id == START
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = gguf.tokenizer(path)
    for text in SPECIMENS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(
            text, allow_special=True
        )
    assert theirs.chat_template == ours.chat_template
    assert theirs.pad_token == "<|endoftext|>"
    spec, params = models.load(folder)
    assert spec == models.load(path)[0]
    jax.tree.map(np.testing.assert_array_equal, params, models.load(path)[1])


@pytest.mark.parametrize("begins", [False, True])
def test_generate_continues_as_transformers_does(begins, call, model, tmp_path):
    made, _ = model
    path = write(model, tmp_path, begins=begins)
    vocabulary = gguf.tokenizer(path)
    text = "sea shells"
    words = ["--prompt", text, "--max_tokens", 6, "--json"]
    told = json.loads(call("generate", "--model", path, *words))
    ids = [made.config.bos_token_id] * begins + vocabulary.encode(text)
    with torch.no_grad():
        out = made.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    new = [i for i in out[0, len(ids) :].tolist() if i != END]
    assert told["text"] == vocabulary.decode(new) and told["tokens"] == len(new)
