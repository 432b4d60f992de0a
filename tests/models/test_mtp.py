# SPDX-License-Identifier: Apache-2.0
"""The head for further tokens: loaded, saved and trained as its formula says.

The oracle (oracles/mtp.py) puts transformers' own layers together in torch.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax.models import decoder, flops, hf, mtp, sizes
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import step as step_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.oracles import mtp as oracle  # noqa: E402

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
    "attn_implementation": "eager",
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
    "router_aux_loss_coef": 0.0,
}
# family: (class, layers of the head, changes)
FAMILIES = {
    "qwen3_next": ("Qwen3Next", 1, {}),
    "qwen3_5": ("Qwen3_5", 2, {"tie_word_embeddings": True}),
    "qwen3_5_moe": ("Qwen3_5Moe", 1, {}),
}
NAMES = {"qwen3_next": "num_nextn_predict_layers"}
COEF = 0.3
T = 20
# Documents of the packed row: [start, stop); the second is too short for a target.
BORDERS = [(0, 9), (9, 11), (11, 18)]


def drawn(module):
    with torch.no_grad():
        for key, weight in module.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 1 and "norm" in key:
                weight.add_(0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return module.eval().float()


def fused(weights, apart):
    """Tensors with each layer's experts in one, or each by itself."""
    out = {}
    for key, value in weights.items():
        if not apart or ".experts." not in key:
            out[key] = value.contiguous().clone()
            continue
        stem = key.rpartition(".")[0]
        for e, one in enumerate(value):
            if key.endswith("gate_up_proj"):
                gate, up = one.chunk(2)
                out[f"{stem}.{e}.gate_proj.weight"] = gate.contiguous().clone()
                out[f"{stem}.{e}.up_proj.weight"] = up.contiguous().clone()
            else:
                out[f"{stem}.{e}.down_proj.weight"] = one.contiguous().clone()
    return out


@dataclasses.dataclass
class Made:
    """A model of transformers with a head of the oracle, and the folder of both."""

    family: str
    layers: int
    model: torch.nn.Module
    head: torch.nn.Module
    folder: object

    @property
    def weights(self):
        head = {f"mtp.{k}": v for k, v in self.head.state_dict().items()}
        weights = self.model.state_dict() | head
        if self.model.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        return weights


# Experts of the head are met in qwen3_next, too.
EVERY = [
    pytest.param(name, marks=pytest.mark.slow if name == "qwen3_5_moe" else ())
    for name in FAMILIES
]


@pytest.fixture(scope="module", params=EVERY)
def made(request, tmp_path_factory):
    kind, layers, changes = FAMILIES[request.param]
    text = "" if kind == "Qwen3Next" else "Text"
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}{text}Config")(**SIZES | changes)
    model = drawn(getattr(transformers, f"{kind}ForCausalLM")(settings))
    head = drawn(oracle.Head(model, kind, layers))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    out = Made(request.param, layers, model, head, folder)
    # The experts of Qwen3-Next are published apart; those of the head may be otherwise
    # than those of the layers.
    weights = fused(out.weights, apart=request.param == "qwen3_next")
    if request.param == "qwen3_5_moe":
        weights |= fused({k: v for k, v in weights.items() if "mtp" in k}, apart=True)
        weights = {
            k: v
            for k, v in weights.items()
            if "mtp" not in k or "experts.gate" not in k
        }
        weights.pop("mtp.layers.0.mlp.experts.down_proj")
    save_file(weights, folder / "model.safetensors")
    return out


def row(seed=0):
    """A packed row with padding at its end."""
    ids = np.random.default_rng(seed).integers(0, 96, (2, T)).astype(np.int32)
    segments = np.zeros_like(ids)
    positions = np.zeros_like(ids)
    for number, (start, stop) in enumerate(BORDERS, 1):
        segments[0, start:stop] = number
        positions[0, start:stop] = np.arange(stop - start)
    segments[1], positions[1] = 1, np.arange(T)
    return ids, segments, positions


def documents():
    """(row, [start, stop)) of every document."""
    return [(0, *border) for border in BORDERS] + [(1, 0, T)]


def test_loaded_weights_predict_as_the_formula(made):
    spec, params = models.load(made.folder, dtype="float32")
    assert spec.mtp_layers == made.layers
    ids, segments, positions = row()

    @jax.jit
    def predict(params):
        hidden, _ = decoder.hidden(spec, params, ids, segments=segments)
        further, _ = mtp.hidden(spec, params, hidden, ids, segments=segments)
        return [decoder.logits(spec, params, x) for x in further]

    got = predict(params)
    for line, start, stop in documents():
        with torch.no_grad():
            one = torch.tensor(ids[None, line, start:stop], dtype=torch.long)
            want = made.head.logits(made.model, one)
        for depth, logits in enumerate(want):
            mine = np.asarray(got[depth])[line, start : stop - 1 - depth]
            np.testing.assert_allclose(mine, logits[0].numpy(), atol=1e-4, rtol=0)
    assert np.asarray(got[0]).std() > 0.3


def test_saved_weights_are_those_that_were_loaded(made, tmp_path):
    spec, params = models.load(made.folder, dtype="float32")
    models.save(spec, params, tmp_path)
    back = load_file(tmp_path / "model.safetensors")
    want = fused(made.weights, apart=made.family == "qwen3_next")
    assert back.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(back[key], value), key
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw[NAMES.get(made.family, "mtp_num_hidden_layers")] == made.layers
    spec_again, params_again = models.load(tmp_path, dtype="float32")
    assert spec_again == spec
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    one = torch.tensor(row()[0][1:], dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(plain.eval()(one).logits, made.model(one).logits)


def test_without_it_the_tensors_are_counted(made, tmp_path, capsys):
    spec, params = models.load(made.folder, dtype="float32", mtp_layers=0)
    assert spec.mtp_layers == 0 and "mtp" not in params
    assert "are left out: mtp." in capsys.readouterr().err
    weights = load_file(made.folder / "model.safetensors")
    broken = {k: v for k, v in weights.items() if k != "mtp.norm.weight"}
    raw = json.loads((made.folder / "config.json").read_text())
    raw[NAMES.get(made.family, "mtp_num_hidden_layers")] = made.layers
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(config.InputError, match="no tensor 'mtp.norm.weight'"):
        models.load(tmp_path)
    broken = {k: v for k, v in weights.items() if not k.startswith("mtp.")}
    save_file(broken, tmp_path / "model.safetensors")
    assert models.load(tmp_path, dtype="float32")[0].mtp_layers == 0
    assert f"tells of {made.layers} layers of an MTP head" in capsys.readouterr().err
    save_file(weights | {"mtp.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(config.InputError, match="1 tensors belong to no weight.*mtp.x"):
        models.load(tmp_path)


def batch(seed=0):
    """As the loader packs: the target of a document's last token is one more id."""
    ids, segments, positions = row(seed)
    targets = np.roll(ids, -1, axis=1)
    ends = [stop - 1 for _, stop in BORDERS]
    targets[0, ends], targets[1, -1] = [7, 8, 9], 10
    weight = np.where(segments > 0, 0.5 + (ids % 3) / 2, 0).astype(np.float32)
    arrays = {
        "tokens_bt": ids,
        "targets_bt": targets,
        "positions_bt": positions,
        "segments_bt": segments,
        "mask_bt": weight,
    }
    return {k: jnp.asarray(v)[None] for k, v in arrays.items()}


def their_loss(made, arrays):
    """The loss and its gradients by torch, each document by itself."""
    a = {k: np.asarray(v[0]) for k, v in arrays.items()}

    def sums(logits, targets, weight):
        each = torch.nn.functional.cross_entropy(
            logits[0], torch.tensor(targets, dtype=torch.long), reduction="none"
        )
        return (each * torch.tensor(weight)).sum()

    made.model.zero_grad()
    made.head.zero_grad()
    main, further = 0.0, [0.0] * made.layers
    counts = [0.0] * made.layers
    for line, start, stop in documents():
        ids, targets, weight = (
            a[k][line, start:stop] for k in ("tokens_bt", "targets_bt", "mask_bt")
        )
        one = torch.tensor(ids[None], dtype=torch.long)
        main = main + sums(made.model(one).logits, targets, weight)
        for depth, logits in enumerate(made.head.logits(made.model, one)):
            by = depth + 1
            if len(ids) > by:
                further[depth] = further[depth] + sums(
                    logits, targets[by:], weight[by:]
                )
                counts[depth] += weight[by:].sum()
    main = main / a["mask_bt"].sum()
    mean = sum(x / n for x, n in zip(further, counts, strict=True)) / made.layers
    (main + COEF * mean).backward()
    grads = {k: p.grad for k, p in made.model.named_parameters()}
    grads |= {f"mtp.{k}": p.grad for k, p in made.head.named_parameters()}
    return main.item(), mean.item(), grads


def test_loss_and_gradients(made):
    spec, params = models.load(made.folder, dtype="float32")
    arrays = batch()
    how = step_lib.StepConfig(mtp_coef=COEF)
    run = jax.jit(
        lambda p, b: step_lib.gradients(p, b, spec=spec, rules=mesh.Rules(), config=how)
    )
    grads, parts = run(params, arrays)
    main, further, want = their_loss(made, arrays)
    np.testing.assert_allclose(parts["nll"] / parts["targets"], main, rtol=1e-5)
    np.testing.assert_allclose(parts["mtp"], further, rtol=1e-5)
    ours = dict(hf.named_tensors(spec, grads, fused=True))
    assert ours.keys() == want.keys() - {"lm_head.weight"} | (
        set() if spec.tie_embedding else {"lm_head.weight"}
    )
    for key, grad in ours.items():
        theirs = want[key].numpy()
        np.testing.assert_allclose(
            np.linalg.norm(grad), np.linalg.norm(theirs), rtol=1e-4, err_msg=key
        )
        size = np.abs(theirs).max()
        np.testing.assert_allclose(grad, theirs, atol=2e-4 * size, err_msg=key)
    if made.family != "qwen3_5_moe":  # the rest once is enough
        return
    # In parts it is the same sum: each row by itself is a micro-batch.
    halves = {k: v.reshape(2, 1, T) for k, v in arrays.items()}
    again, parts_again = run(params, halves)
    np.testing.assert_allclose(parts_again["mtp"], parts["mtp"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-7)


@pytest.mark.slow
def test_a_mesh_trains_it_alike():
    with jax.enable_x64(True):
        spec = spec_lib.Spec(
            vocab_size=96,
            width=32,
            num_layers=1,
            num_heads=4,
            num_kv_heads=4,
            head_width=8,
            ffn_width=48,
            init_std=0.2,
            param_dtype="float64",
            compute_dtype="float64",
            moe=spec_lib.MoE(8, 2, 24, shared_width=16),
            mtp_layers=1,
        )
        arrays = {k: np.repeat(np.asarray(v), 4, axis=1) for k, v in batch().items()}
        rules = mesh.Rules()

        def gradients(sizes):
            on = mesh.make(mesh.MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
            place = mesh.sharding(on, jax.P(None, *rules.pspec("batch", None)))
            with jax.set_mesh(on):
                params = models.init(spec, 0, device_mesh=on, rules=rules)
                run = lambda p, b: step_lib.gradients(  # noqa: E731
                    p,
                    b,
                    spec=spec,
                    rules=rules,
                    config=step_lib.StepConfig(mtp_coef=COEF, remat="dots"),
                )
                return jax.device_get(
                    jax.jit(run)(params, jax.device_put(arrays, place))
                )

        want, got = gradients((1, 1, 1, 1)), gradients((1, 2, 2, 2))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
        ):
            size = np.abs(a).max()
            np.testing.assert_allclose(
                b, a, atol=1e-6 * size + 1e-12, err_msg=str(path)
            )


def test_a_weight_of_nothing_trains_nothing():
    spec = spec_lib.Spec(
        vocab_size=96, width=32, num_layers=1, num_heads=2, head_width=8, ffn_width=16,
        num_kv_heads=2, init_std=0.2, mtp_layers=1,
    )  # fmt: skip
    params = models.init(spec, 0)
    how = {"spec": spec, "rules": mesh.Rules()}
    off, on = (step_lib.StepConfig(mtp_coef=c) for c in (0.0, COEF))
    run = jax.jit(step_lib.gradients, static_argnames=("spec", "rules", "config"))
    grads, parts = run(params, batch(), **how, config=off)
    assert "mtp" not in parts
    assert not any(np.any(x) for x in jax.tree.leaves(grads["mtp"]))
    grads, _ = run(params, batch(), **how, config=on)
    assert all(np.any(x) for x in jax.tree.leaves(grads["mtp"]))


def test_what_it_costs():
    plain = sizes.get("qwen3-next-80b-a3b")
    spec = dataclasses.replace(plain, mtp_layers=1)
    layer = flops.num_active(dataclasses.replace(plain, num_layers=48)) - (
        flops.num_active(dataclasses.replace(plain, num_layers=47))
    )  # the last layer has attention, as that of the head
    more = flops.num_active(spec) - flops.num_active(plain)
    assert more == layer + 2 * 2048**2 + 3 * 2048
    assert flops.forward_per_token(spec, 1) == flops.forward_per_token(plain, 1)
    trained = flops.train_per_token(spec, 1) - flops.train_per_token(plain, 1)
    assert trained == 6 * (more + 151_936 * 2048) + 3 * 4 * 16 * 256


def test_heads_that_cannot_be():
    with pytest.raises(ValueError, match="mtp_layers=-1"):
        spec_lib.Spec(mtp_layers=-1)
    with pytest.raises(ValueError, match="mtp_layers=1 with head='none'"):
        spec_lib.Spec(mtp_layers=1, head="none")
