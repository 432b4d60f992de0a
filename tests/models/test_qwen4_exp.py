# SPDX-License-Identifier: Apache-2.0
"""The preview of Qwen4 against transformers: streams, chosen blocks, n-grams, caches.

The oracle is transformers with torch on the CPU, on tiny random models that it wrote:
weights at fan-in scale, norms off one, convolutions off zero. It chooses blocks in a
double loop over rows and queries. It leaks recurrent state across documents of packed
rows, so there each document run alone is the truth.
"""

import copy
import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import (
    decode,
    decoder,
    flops,
    hf,
    hf_config,
    indexed,
    ngram,
    qwen4,
    sizes,
)
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import losses

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EOS, VOCAB, T = 5, 96, 40
LINEAR, INDEXED = "linear_attention", "indexed_attention"
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": [LINEAR, LINEAR, INDEXED],
    "max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
    },
    "eos_token_id": EOS,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "hc_lowrank": 12,
    # So many that no two blocks score 0: the oracle leaves open which comes first.
    "indexer_n_heads": 12,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 12,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 3,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
CASES = {
    # What the streams alone do: the index sees all, no n-grams.
    "streams": {"indexer_budget": 64, "hc_count": 3},
    "indexed": {
        "indexer_budget": 6,
        "indexer_compress_ratio": 3,
        "indexer_head_dim": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "layer_types": [INDEXED, LINEAR] * 2,
    },
    "ngram": {
        "ple_layer_ids": [2],
        "ple_embed_dim": 32,
        "heads_per_ngram": 4,
        "output_gate_type": "sigmoid",
    },
    "ngram-twice": {
        "ple_layer_ids": [1, 2],
        "ple_embed_dim": 24,
        "heads_per_ngram": 2,
        "ngram_size": 4,
        "ple_conv_kernel_size": 3,
        "eos_token_id": [EOS, 7],
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
    },
}


def make_reference(name, folder):
    """A random model in transformers, saved to a folder; returns the torch model."""
    settings = COMMON | CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.Qwen4ExpForCausalLM(
        transformers.Qwen4ExpTextConfig(**settings)
    )
    model = model.eval().float()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            random = torch.randn_like(weight)
            if weight.ndim == 1 and "norm" in key:
                middle = 1 if "linear_attn" in key else 0
                weight.copy_(middle + 0.2 * random)
            elif weight.ndim == 1:
                weight.copy_(0.3 * random)
            elif "embed" in key and not settings.get("tie_word_embeddings"):
                weight.copy_(random)
            else:
                weight.copy_(random * weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return model


def tokens(rows, seed=0, t=T):
    """Random ids, an end of text here and there."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (rows, t)).astype(np.int32)
    return np.where(rng.random((rows, t)) < 0.12, EOS, ids).astype(np.int32)


def reference_logits(model, ids, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask, dtype=torch.long)
        ids = torch.tensor(ids, dtype=torch.long)
        return model(ids, attention_mask=mask).logits.numpy()


def exact_logits(model, ids):
    """The same in float64, where the library itself would round to float32."""
    wide = mock.patch.object(torch, "float32", torch.float64)
    with wide, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return reference_logits(copy.deepcopy(model).double(), ids)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = make_reference(request.param, folder)
    spec, params = models.load(folder, dtype="float32")
    forward = jax.jit(lambda p, ids, seg: models.forward(spec, p, ids, segments=seg))
    return reference, spec, params, forward


def test_logits(pair):
    reference, _spec, params, forward = pair
    ids = tokens(4)
    got = np.asarray(forward(params, ids, np.ones_like(ids)))
    want, exact = reference_logits(reference, ids), exact_logits(reference, ids)
    assert exact.dtype == np.float64 and want.std() > 0.3
    noise = np.abs(want - exact).max()
    assert 0 < noise < 2.5e-5
    assert np.abs(got - exact).max() < 4 * noise
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_padded_rows(pair):
    """Left and right padding: the real tokens' logits are the row's own, alone."""
    reference, _spec, params, forward = pair
    ids = tokens(4, seed=1)
    real = np.ones_like(ids)
    real[0, :7], real[1, -9:], real[2, :1] = 0, 0, 0
    got = np.asarray(forward(params, ids, real))
    for row in range(4):
        want = reference_logits(reference, ids[row : row + 1, real[row] > 0])[0]
        np.testing.assert_allclose(got[row, real[row] > 0], want, atol=1e-4, rtol=0)


def test_packed_rows_equal_separate_rows(pair):
    reference, _spec, params, forward = pair
    ids = tokens(4, seed=2)
    segments = np.zeros_like(ids)
    borders = [(0, 13, 1), (13, 14, 2), (14, 37, 3)]
    for start, stop, number in borders:
        segments[:, start:stop] = number
    got = np.asarray(forward(params, ids, segments))
    for start, stop, _ in borders:
        want = reference_logits(reference, ids[:, start:stop])
        np.testing.assert_allclose(got[:, start:stop], want, atol=1e-4, rtol=0)


OFTEN = [  # these two have all the parts; the others mix them otherwise
    name if name in ("indexed", "ngram") else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
]


@pytest.mark.parametrize("pair", OFTEN, indirect=True)
def test_loss_and_gradient_norms(pair):
    reference, spec, params, _ = pair
    ids = tokens(4, seed=3)
    reference.zero_grad()
    out = reference(torch.tensor(ids, dtype=torch.long)).logits[:, :-1]
    targets = torch.tensor(ids[:, 1:], dtype=torch.long).ravel()
    want = torch.nn.functional.cross_entropy(out.reshape(-1, VOCAB), targets)
    want.backward()

    def loss(params):
        hidden, _ = decoder.hidden(spec, params, ids, loop="unroll", remat="dots")
        total, _parts = losses.cross_entropy(
            hidden[:, :-1],
            decoder.head_vd(spec, params),
            jnp.asarray(ids[:, 1:]),
            jnp.ones(ids[:, 1:].shape),
            z_coef=0.0,
            rules=mesh.Rules(),
            chunk=16,
        )
        return total / ids[:, 1:].size

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    theirs = dict(reference.named_parameters())
    ours = {k: np.linalg.norm(g) for k, g in of_whole_tables(spec, grads).items()}
    assert ours.keys() == theirs.keys()
    for key, size in ours.items():
        if ".indexer." in key:  # no gradient reaches the index, there as here
            assert theirs[key].grad is None and size == 0
            continue
        wanted = theirs[key].grad.norm().item()
        np.testing.assert_allclose(size, wanted, rtol=1e-4, atol=2e-6, err_msg=key)


def of_whole_tables(spec, tree):
    """{name there: array} without constants, the parts of a table as one."""
    out, parts = {}, {}
    for key, array in hf.named_tensors(spec, tree, fused=True):
        head, cut, _ = key.partition("shard_")
        if cut:
            parts.setdefault(head + "weight", []).append(array)
        elif key not in qwen4.constants(spec):
            out[key] = array
    return out | {key: np.concatenate(arrays) for key, arrays in parts.items()}


@pytest.mark.parametrize("pair", OFTEN, indirect=True)
def test_cached_decoding_is_the_full_forward(pair):
    """Rows padded on either side and between, in parts, then one token at a time."""
    _reference, spec, params, forward = pair
    ids = tokens(4, seed=4)
    real = np.ones_like(ids)
    real[0, :7], real[1, 8:16], real[2, 12:16] = 0, 0, 0
    run = jax.jit(lambda x, c, s: models.forward(spec, params, x, cache=c, segments=s))
    cache, start, found = cache_lib.init(spec, 4, T), 0, []
    for stop in (16, 24, *range(25, T + 1)):
        logits, cache = run(ids[:, start:stop], cache, real[:, start:stop])
        found.append(logits)
        start = stop
    found = np.concatenate(found, axis=1)
    for row in range(4):
        kept = real[row] > 0
        alone = np.zeros((4, T), np.int32)
        alone[:, : kept.sum()] = ids[row, kept]
        ones = np.where(np.arange(T) < kept.sum(), np.ones_like(alone), 0)
        want = forward(params, alone, ones)[0, : kept.sum()]
        np.testing.assert_allclose(found[row, kept], want, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "pair",
    ["indexed", "ngram-twice"],
    indirect=True,
)
@pytest.mark.slow
def test_greedy_tokens(pair):
    reference, spec, params, _ = pair
    ids = tokens(1, seed=5, t=17)
    reference.generation_config.eos_token_id = None
    want = reference.generate(
        torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
    )
    endless = dataclasses.replace(spec, eos_ids=())
    (got,) = decode.generate(endless, params, ids.tolist(), max_tokens=20)
    assert got == want[0, 17:].tolist()
    # The same as they come; then a prompt that shares a beginning with what is kept.
    kept, prompt = decode.Kept(), ids[0].tolist()
    for wanted in (got, got[4:]):
        new = decode.stream(endless, params, prompt, max_tokens=len(wanted), kept=kept)
        assert list(new) == wanted
        prompt = prompt + got[:4]


def test_round_trip_through_transformers(pair, tmp_path):
    reference, spec, params, _ = pair
    models.save(spec, params, tmp_path, shard_bytes=60_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    ).eval()
    ours, theirs = back.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    ids = tokens(2, seed=6)
    want = reference_logits(reference, ids)
    np.testing.assert_array_equal(reference_logits(back, ids), want)
    again, params_again = models.load(tmp_path, dtype="float32")
    assert again == spec
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


class Rows(torch.nn.Module):
    """Stands for a table: what is looked up is the number of the row."""

    def __init__(self, rows, width):
        super().__init__()
        self.rows, self.weight = rows, torch.zeros(1)

    def forward(self, ids):
        assert int(ids.max()) < self.rows
        return ids[..., None]


@pytest.mark.parametrize(
    "sizes", [(VOCAB, 50, 3, 4), (248_320, 20_000_000, 3, 8), (1000, 1 << 20, 5, 2)]
)
def test_hashes_are_those_of_the_reference(sizes, monkeypatch):
    """On the host and in 32 bits; documents and padding as each document alone."""
    from transformers.models.qwen4_exp import modeling_qwen4_exp as theirs

    vocab, base, size, heads = sizes
    grams = {"ngram_size": size, "heads_per_ngram": heads, "seed": 77}
    grams |= {"ngram_vocab_size_base": base, "ple_embed_dim": (size - 1) * heads}
    raw = COMMON | grams | {"vocab_size": vocab, "ple_layer_ids": [1, 2]}
    made = transformers.Qwen4ExpTextConfig(**raw)
    raw = json.loads(made.to_json_string())
    spec = hf_config.spec_from_config(raw)
    monkeypatch.setattr(torch.nn, "Embedding", Rows)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (6, 64)).astype(np.int32)
    ids = np.where(rng.random(ids.shape) < 0.2, EOS, ids)
    ids[0, :8] = vocab - 1  # the largest products
    segments = np.ones_like(ids)
    segments[1, :9], segments[2, 50:], segments[3, 20:], segments[3, 21:] = 0, 0, 2, 3
    segments[4, 10:14] = 0
    none = {k: np.zeros((6, size - 1), np.int32) for k in ("tokens_bj", "segments_bj")}
    found = ngram.ids(spec, ids, segments)
    short = jax.jit(lambda i, s: ngram.device_ids(spec, i, s, none))(ids, segments)
    assert short.dtype == np.int32
    np.testing.assert_array_equal(short, found)
    for layer in range(2):
        module = theirs.Qwen4ExpTextNGramEmbedding(
            made, made.ple_embed_dim, layer, ple_layer_index=layer
        )
        for row in range(6):
            for number in set(segments[row]) - {0}:
                mine = segments[row] == number
                alone = torch.tensor(ids[row : row + 1, mine], dtype=torch.long)
                wanted = module(alone, None).reshape(1, -1, spec.ngram.tables)
                np.testing.assert_array_equal(found[layer, row, mine], wanted[0])


def chosen_by_hand(scores_bts, segments, budget, ratio):
    """Which slots each query sees, one query at a time; `scores` of a block is that of
    its first slot."""
    seen = np.zeros(scores_bts.shape, bool)
    for b, t in np.ndindex(segments.shape):
        if segments[b, t] == 0:
            continue
        slots = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        whole = len(slots) // ratio * ratio
        groups = [slots[i : i + ratio] for i in range(0, whole, ratio)]
        groups.sort(key=lambda group: -scores_bts[b, t, group[0]])
        for group in [*groups[: budget // ratio], slots[whole:]]:
            seen[b, t, group] = True
    return seen


def test_chosen_slots_are_those_chosen_by_hand():
    budget, ratio, t = 8, 4, 50
    spec = spec_lib.Spec(
        indexed=spec_lib.Indexed(3, 8, budget, ratio), head_width=8, norm_offset=True
    )
    rng = np.random.default_rng(1)
    segments = np.ones((3, t), np.int32)
    segments[0, :5], segments[1, 11:], segments[1, 30:], segments[1, 48:] = 0, 2, 3, 0
    segments[2, 17:20] = 0
    q, k = (rng.normal(size=(3, t, *w)).astype(np.float32) for w in ((3, 8), (8,)))
    weight = rng.normal(size=8).astype(np.float32)
    cos, sin = np.ones((3, t, 4), np.float32), np.zeros((3, t, 4), np.float32)
    scores = np.zeros((3, t, t))
    for b, s in np.ndindex(3, t):
        group = [x for x in range(s, t) if segments[b, x] == segments[b, s]][:ratio]
        mean = k[b, group].mean(0)
        key = mean / np.sqrt(np.mean(mean**2) + 1e-6) * (1 + weight)
        scores[b, :, s] = np.maximum(q[b] @ key, 0).sum(-1)
    wanted = chosen_by_hand(scores, segments, budget, ratio)
    found = indexed.blocks(k, cos, sin, segments, weight, spec)
    seen = indexed.mask(q, jnp.arange(t), segments, segments, found, spec)
    np.testing.assert_array_equal(seen, wanted)
    assert wanted.sum(-1).max() == budget + ratio - 1

    listed, there = indexed.chosen_slots(q, jnp.arange(t), segments, found, spec)
    assert listed.shape == (3, t, budget + ratio - 1)
    again = np.zeros(wanted.shape, int)
    np.add.at(again, (*np.ogrid[:3, :t, :1][:2], np.asarray(listed)), np.asarray(there))
    np.testing.assert_array_equal(again, wanted)

    # The softmax over what is seen, of queries in parts and of the last one alone.
    heads = rng.normal(size=(3, 3, t, 4, 8)).astype(np.float32)
    query, keys, values = heads[0], heads[1, :, :, :2], heads[2, :, :, :2]
    run = jax.jit(indexed.attend, static_argnames=("spec", "queries"))
    slots, how = (cos, sin), {"spec": spec, "queries": 8}
    held = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
    out = run(*(query, *held, q, k, *slots, segments, segments, 0, weight), **how)
    one = [x[:, -3:-2] for x in (query, q, segments)]
    alone = run(
        *(one[0], *held, one[1], k, *slots, one[2], segments, t - 3, weight),
        **how,
    )
    logits = np.einsum("btnk,bsnk->bnts", query, keys.repeat(2, 2)) / np.sqrt(8)
    weights = np.where(wanted[:, None], np.exp(logits), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    expected = np.einsum("bnts,bsnk->btnk", weights, values.repeat(2, 2))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(alone, expected[:, -3:-2], atol=1e-5)


def test_memory_is_linear_in_the_length():
    """Forward and backward, by what the compiler reserves."""
    spec = spec_lib.Spec(indexed=spec_lib.Indexed(2, 8, 64, 4), head_width=8)

    def reserved(t):
        shapes = [(1, t, 4, 8), (1, 2, 8, t), (1, 2, t, 8), (1, t, 2, 8), (1, t, 8)]
        shapes += [(1, t, 4)] * 2
        floats = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
        rows = [jax.ShapeDtypeStruct((1, t), jnp.int32)] * 2

        def loss(*args):
            norm = jnp.ones(8)
            return jnp.sum(indexed.attend(*args, 0, norm, spec=spec, queries=64) ** 2)

        made = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*floats, *rows).compile()
        return made.memory_analysis().temp_size_in_bytes

    assert reserved(8192) < 2.2 * reserved(4096)


def test_the_released_size_has_the_published_totals():
    """125B, 51B of n-grams beside them, 6B active without the tables of words."""
    spec = sizes.get("qwen4-exp-flash")
    grams = flops.num_ngram(spec)
    assert grams / 1e9 == pytest.approx(51.2, abs=0.05)
    assert (flops.num_params(spec) - grams) / 1e9 == pytest.approx(125.7, abs=0.1)
    words = 2 * spec.vocab_size * spec.width
    assert (flops.num_active(spec) - words) / 1e9 == pytest.approx(6.0, abs=0.1)
    # 12 layers: two heads of 256 for keys and values, 128 for the index, two bytes.
    assert flops.kv_bytes_per_token(spec) == 12 * (2 * 2 * 256 + 128) * 2
    # A query of a long row meets 2,048 keys and on average half a block more, and the
    # index a quarter of all; an ordinary row half of what stands in it.
    long = flops.forward_per_token(spec, 100_000, causal=True)
    scores = 12 * (4 * 24 * 256 * (2048 + 1.5) + 2 * 4 * 128 * (100_001 / 2) / 4)
    short = flops.forward_per_token(spec, 1, causal=True) - 12 * 4 * 24 * 256
    assert long - short == pytest.approx(scores, rel=1e-6)
    raw = hf_config.config_of(spec)
    with torch.device("meta"):
        made = transformers.Qwen4ExpTextConfig(**raw)
        model = transformers.Qwen4ExpForCausalLM(made)
    theirs = sum(weight.numel() for weight in model.parameters())
    assert flops.num_params(spec) == theirs


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"indexer_kv_heads": 2}, "indexer_kv_heads=2 in config.json: wanted 1"),
        ({"indexer_budget": 10}, "budget=10 must be a multiple of indexed.ratio=4"),
        ({"indexer_head_dim": 6}, "indexed.width=6 must be at least the 8 dims"),
        ({"indexer_n_heads": None}, "lacks indexer_n_heads"),
        ({"hc_count": 1}, "streams.count=1 must be at least 2"),
        ({"ple_layer_ids": [4]}, r"ple_layer_ids=\[4\] in config.json: wanted layers"),
        ({"ple_layer_ids": [3]}, r"ngram.layers=\(2,\): wanted some of the layers"),
        ({"eos_token_id": None}, "eos_token_id=None in config.json: wanted an id"),
        ({"ple_embed_dim": 30}, "ngram.width=30 must be a multiple of the 8 hashes"),
        ({"ngram_vocab_size_base": 1 << 40}, "ngram.base=1099511627776 from 2 to"),
        ({"output_gate_type": "tanh"}, "output_gate_type 'tanh': wanted 'silu' or"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types .*: wanted 3 of"),
    ],
)
def test_what_the_decoder_does_not_do_is_named(changes, told):
    raw = COMMON | CASES["ngram"] | {"layer_types": COMMON["layer_types"]}
    raw |= {"model_type": "qwen4_exp_text", "num_hidden_layers": 3} | changes
    with pytest.raises(config.InputError, match=told):
        hf_config.spec_from_config(raw)


def test_the_text_part_of_a_larger_model_and_other_hashes(tmp_path, capsys):
    """As published: a prefix, a prediction head beside it; then another seed."""
    from safetensors.torch import load_file, save_file

    reference = make_reference("ngram", tmp_path)
    file = tmp_path / "model.safetensors"
    held = {
        k.replace("model.", "model.language_model.", 1): v
        for k, v in load_file(file).items()
    }
    save_file(held | {"mtp.fc.weight": torch.ones(2, 2)}, file)
    raw = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "qwen4_exp", "text_config": raw, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    spec, params = models.load(tmp_path, dtype="float32")
    assert "1 tensors of other parts than the text model" in capsys.readouterr().err
    ids = tokens(1)
    got = models.forward(spec, params, ids)
    np.testing.assert_allclose(got, reference_logits(reference, ids), atol=1e-4)
    outer["text_config"]["seed"] += 1
    (tmp_path / "config.json").write_text(json.dumps(outer))
    with pytest.raises(
        config.InputError, match="layer_multipliers' of .* other hashes"
    ):
        models.load(tmp_path)
