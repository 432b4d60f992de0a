# SPDX-License-Identifier: Apache-2.0
"""Tiny vision-language models by transformers: the same function, images and all.

The oracle is transformers with torch on the CPU, run on each document alone, without
padding. Weights are drawn as in test_hf_parity. One compiled program takes every case:
images and patches are filled up to fixed shapes.
"""

import copy
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import mesh, models
from qwen_jax.models import decode, decoder, hf, names_vision
from qwen_jax.train import losses
from tests.models import tiny_vl

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class Pair:
    """A reference model, ours, and documents with images and videos for both."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.reference = tiny_vl.reference(name, folder)
        self.spec, self.params = models.load(folder, dtype="float32")
        self.docs = tiny_vl.documents(self.spec.vision.frame_blocks)
        draw = np.random.default_rng(0)
        self.ids = [tiny_vl.row(draw, *parts) for parts in self.docs]
        self.images = tiny_vl.patches(self.spec, self.docs, "image", seed=1)
        self.videos = tiny_vl.patches(self.spec, self.docs, "video", seed=2)
        spec = self.spec
        self.forward = jax.jit(
            lambda p, ids, segments, images, videos: models.forward(
                spec, p, ids, segments=segments, images=images, videos=videos
            )
        )

    def seen(self, which):
        """Images and videos of these documents, in order, filled up."""
        images = tiny_vl.filled(
            [self.images[i] for i in which], tiny_vl.IMAGE_PATCHES, tiny_vl.IMAGES
        )
        videos = tiny_vl.filled(
            [self.videos[i] for i in which], tiny_vl.VIDEO_PATCHES, tiny_vl.VIDEOS
        )
        videos["seconds_per_grid"] = tiny_vl.seconds(videos["grid_thw"])
        return {"images": images, "videos": videos}

    def arguments(self, i):
        return tiny_vl.of_reference(
            self.spec, self.ids[i], self.images[i], self.videos[i]
        )

    def wanted(self, i):
        """The reference's logits of document i alone."""
        with torch.no_grad():
            return self.reference(**self.arguments(i)).logits[0].numpy()

    def exact(self):
        """The same of all documents in float64, where the library itself would round
        to float32: in norms, softmax, RoPE and router it names that type."""
        model = copy.deepcopy(self.reference).double()
        model.set_experts_implementation("eager")  # its grouped product has no float64
        wide = mock.patch.object(torch, "float32", torch.float64)
        floats = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
        with wide, floats, torch.no_grad():
            given = [self.arguments(i) for i in range(len(self.docs))]
            return [model(**each).logits[0].numpy() for each in given]


# The others differ from these by parts that have tests of their own.
EVERY_DAY = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
FAMILIES = [
    pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow)
    for name in tiny_vl.CASES
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def want(pair):
    return [pair.wanted(i) for i in range(len(pair.docs))]


def batch(rows, left=()):
    """Ids and segments of rows, padded on the right, or on the left where named."""
    ids = np.zeros((len(rows), tiny_vl.T), np.int32)
    segments = np.zeros_like(ids)
    for i, row in enumerate(rows):
        start = tiny_vl.T - len(row) if i in left else 0
        ids[i, start : start + len(row)] = row
        segments[i, start : start + len(row)] = 1
    return ids, segments


@pytest.mark.parametrize("left", [(), range(6)], ids=["right", "left"])
def test_logits_of_padded_rows(pair, want, left):
    ids, segments = batch(pair.ids, left)
    got = pair.forward(pair.params, ids, segments, **pair.seen(range(6)))
    for i, row in enumerate(want):
        assert row.std() > 0.3
        mine = np.asarray(got)[i][segments[i] > 0]
        np.testing.assert_allclose(mine, row, atol=1e-4, rtol=0, err_msg=str(i))


def test_logits_are_as_exact_as_the_reference(pair, want):
    """Within 4 times its own distance from float64."""
    exact = pair.exact()
    noise = max(np.abs(a - b).max() for a, b in zip(want, exact, strict=True))
    assert exact[0].dtype == np.float64 and 0 < noise < 2.5e-4
    ids, segments = batch(pair.ids)
    got = pair.forward(pair.params, ids, segments, **pair.seen(range(6)))
    far = max(
        np.abs(np.asarray(got)[i][segments[i] > 0] - row).max()
        for i, row in enumerate(exact)
    )
    print(f"{pair.name}: {far:.1e} from float64, the reference {noise:.1e}")
    assert far < 4 * noise


def test_packed_rows_equal_separate_rows(pair, want):
    """Several documents in a row, images of one row after those of the row before."""
    rows, shape = [(1, 0), (3, 5), (2,), (4,), (), (0,)], (6, tiny_vl.T)
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    places = []
    for r, docs in enumerate(rows):
        at = 1
        for number, i in enumerate(docs, start=1):
            stop = at + len(pair.ids[i])
            ids[r, at:stop], segments[r, at:stop] = pair.ids[i], number
            places.append((i, r, slice(at, stop)))
            at = stop
    order = [i for docs in rows for i in docs]
    got = np.asarray(pair.forward(pair.params, ids, segments, **pair.seen(order)))
    for i, r, place in places:
        np.testing.assert_allclose(got[r, place], want[i], atol=1e-4, rtol=0)


def test_loss_and_gradient_norms(pair):
    which = (2, 4, 0)
    count = sum(len(pair.ids[i]) - 1 for i in which)
    pair.reference.zero_grad()
    total = 0.0
    for i in which:
        out = pair.reference(**pair.arguments(i)).logits[0, :-1]
        target = torch.tensor(pair.ids[i][1:])
        one = torch.nn.functional.cross_entropy(out, target, reduction="sum") / count
        one.backward()
        total += one.item()
    ids, segments = batch([pair.ids[i] for i in which])

    def loss(params):
        hidden, _ = decoder.hidden(
            pair.spec, params, ids, segments=segments, remat="dots", **pair.seen(which)
        )
        nll, _parts = losses.cross_entropy(
            hidden[:, :-1],
            decoder.head_vd(pair.spec, params),
            jnp.asarray(ids[:, 1:]),
            jnp.asarray(segments[:, 1:], jnp.float32),
            z_coef=0.0,
            rules=mesh.Rules(),
            chunk=59,
        )
        return nll / count

    value, grads = jax.jit(jax.value_and_grad(loss))(pair.params)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    theirs = {
        names_vision.known(k): p.grad
        for k, p in pair.reference.named_parameters()
        if p.grad is not None
    }
    ours = {
        names_vision.known(k): x
        for k, x in hf.named_tensors(pair.spec, grads, fused=True)
    }
    assert ours.keys() == theirs.keys()
    for key, grad in ours.items():
        # A key's bias shifts all scores of a query alike: its gradient is zero but for
        # rounding, so only the scale of the noise can be compared.
        np.testing.assert_allclose(
            np.linalg.norm(grad),
            theirs[key].norm().item(),
            rtol=1e-4,
            atol=2e-6,
            err_msg=key,
        )


def test_greedy_tokens_through_the_cache(pair):
    """20 tokens after prompts of different lengths, padded on the left."""
    which, spec = (4, 1, 3), pair.spec
    wanted = []
    for i in which:
        out = pair.reference.generate(
            **pair.arguments(i), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        wanted.append(out[0, len(pair.ids[i]) :].tolist())
    prompts = [pair.ids[i] for i in which]
    got = decode.generate(spec, pair.params, prompts, max_tokens=20, **pair.seen(which))
    assert got == wanted
    assert len({tuple(row) for row in wanted}) == 3


def test_round_trip_through_transformers(pair, tmp_path):
    models.save(pair.spec, pair.params, tmp_path, shard_bytes=60_000)
    back = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ours, theirs = back.state_dict(), pair.reference.state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    with torch.no_grad():
        again = back(**pair.arguments(4)).logits[0].numpy()
    np.testing.assert_array_equal(again, pair.wanted(4))
    spec, params = models.load(tmp_path, dtype="float32")
    assert spec == pair.spec
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)


def test_the_text_part_alone(pair, tmp_path, capsys, want):
    """A model of the text family, which transformers loads as such."""
    spec, params = models.load(pair.folder, dtype="float32", parts="text")
    assert spec.vision is None and "vision" not in params
    assert "tensors of other parts than the text model are left out: model.visual." in (
        capsys.readouterr().err
    )
    models.save(spec, params, tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        got = back(input_ids=torch.tensor([pair.ids[0]])).logits[0].numpy()
    np.testing.assert_allclose(got, want[0], atol=2e-5)
