# SPDX-License-Identifier: Apache-2.0
"""Images in the engine: the tokens that transformers generates, whatever else runs.

The oracle is `generate` of transformers on tiny random models that it wrote, one prompt
at a time; for features its vision tower, without padding.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qwen_jax import config, mesh, models, params
from qwen_jax.models import decoder
from qwen_jax.serve import device, engine, images, scheduler
from qwen_jax.serve import request as request_lib
from tests.models import tiny_vl

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

Image, Request = images.Image, request_lib.Request
# A piece is a page: every image lies across borders of pieces. The room for features
# (8 + 2 * 16 rows) holds two of the larger images.
SETTINGS = device.Settings(
    rows=4, page_tokens=8, piece=8, max_tokens=128, images=3, image_patches=64
)
NEW = 16
# Two prompts of the same text with images of the same size, one of text alone.
DOCUMENTS = [
    [21],
    [11, ("image", (1, 4, 8)), 12],
    [11, ("image", (1, 4, 8)), 12],
    [2, ("image", (1, 4, 4)), 1, ("image", (1, 6, 10)), 4, ("image", (1, 4, 8)), 3],
    [1, ("image", (1, 6, 10)), 9],
    [2, ("image", (1, 4, 4)), ("image", (1, 4, 4)), 9],
]


class Case:
    """A model of transformers, an engine of the same weights, and prompts for both."""

    def __init__(self, name, folder, settings=SETTINGS):
        self.reference = tiny_vl.reference(name, folder)
        self.spec, self.params = models.load(folder, dtype="float32")
        self.engine = self.another(settings)
        self.patches = tiny_vl.patches(self.spec, DOCUMENTS, "image", seed=1)
        draw = np.random.default_rng(0)
        self.ids = [tiny_vl.row(draw, *parts) for parts in DOCUMENTS]
        self.ids[2] = self.ids[1]
        self._known = {}
        self.recurrent = any(kind.mixer == "delta" for kind in self.spec.kinds)

    def another(self, settings):
        return engine.Engine(self.spec, self.params, settings=settings, stop_ids=())

    def request(self, i, name="", most=NEW, **fields):
        pixels, grid = self.patches[i]
        shown = images.of({"pixels": pixels, "grid_thw": grid})
        name, prompt = name or f"r{i}", tuple(self.ids[i])
        return Request(name, prompt, most, images=shown, **fields)

    def wanted(self, i):
        """The reference's tokens after prompt i."""
        if i not in self._known:
            given = tiny_vl.of_reference(
                self.spec, self.ids[i], self.patches[i], (None, ())
            )
            out = self.reference.generate(
                **given, max_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
            self._known[i] = out[0, len(self.ids[i]) :].tolist()
        return self._known[i]

    def ask(self, *requests):
        """(ids of the first answer, usage) of each, run together."""
        told = self.engine.run(requests)
        return [found(told[request.id]) for request in requests]


def found(pieces, index=0):
    mine = [piece for piece in pieces if piece.index == index]
    return [token for piece in mine for token in piece.ids], mine[-1].usage


@pytest.fixture(
    scope="module",
    params=[
        "qwen2_5_vl",
        "qwen3_vl",
        pytest.param("qwen2_vl", marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", marks=pytest.mark.slow),
        pytest.param("qwen3_5", marks=pytest.mark.slow),  # with recurrent layers
    ],
)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_answers_are_those_of_transformers(case):
    """More than fit at once, with text, several images, images that touch."""
    told = case.ask(*(case.request(i) for i in range(6)))
    for i, (ids, usage) in enumerate(told):
        assert ids == case.wanted(i), i
        assert (usage.prompt, usage.answer) == (len(case.ids[i]), NEW)
    assert len({tuple(ids) for ids, _ in told}) == 6
    # Alone as well, and another answer of the same draws the same.
    (again,) = case.ask(case.request(3, salt="x"))
    assert again[0] == case.wanted(3) and again[1].cached == 0
    pieces = case.engine.run([case.request(4, "two", n=2)])["two"]
    assert found(pieces, 0)[0] == found(pieces, 1)[0] == case.wanted(4)


def test_pages_are_shared_by_what_the_images_are(case):
    """Prompts 1 and 2 are the same ids: 11 of text, the mark, 8 of the image, ..."""
    ids = case.ids[1]
    assert ids == case.ids[2] and ids[11] == tiny_vl.START and len(ids) == 33
    salt = {"salt": "of this test"}
    one, usage = case.ask(case.request(1, **salt))[0]
    assert usage.cached == 0
    looks = case.engine._device._sight.looks
    other, usage = case.ask(case.request(2, **salt))[0]
    # The page before the image alone; where layers are recurrent, no state was kept.
    before = 0 if case.recurrent else 8
    assert usage.cached == before
    same, usage = case.ask(case.request(2, "again", **salt))[0]
    assert usage.cached == 32
    assert one == case.wanted(1) and other == same == case.wanted(2) != one
    # The same patches in another shape are another image.
    pixels, _ = case.patches[2]
    turned = dataclasses.replace(
        case.request(2, "turned", **salt), images=(Image(pixels, (1, 8, 4)),)
    )
    assert case.ask(turned)[0][1].cached in (before, 8)
    assert case.engine._device._sight.looks == looks + 2


def test_answers_do_not_depend_on_the_schedule(case):
    """Random schedules with few pages and little room for features: preempted, found,
    cut and cancelled, each is the beginning of what the reference says."""
    made = case.another(dataclasses.replace(SETTINGS, pages=18))
    draw, cached = np.random.default_rng(3), 0
    for turn in range(12):
        told, gone = {}, set()
        for k in range(draw.integers(2, 8)):
            i, most = int(draw.integers(6)), int(draw.integers(1, NEW + 1))
            request = case.request(i, f"{turn}-{k}", most, salt="ab"[k % 2])
            told[request.id] = (i, most, [])
            made.submit(request, told[request.id][2].append)
            for _ in range(draw.integers(0, 5)):
                made.step()
            if draw.random() < 0.1:
                made.cancel(request.id)
                gone.add(request.id)
        while made.in_flight:
            made.step()
        for name, (i, most, pieces) in told.items():
            ids, usage = found(pieces)
            wanted = case.wanted(i)[: len(ids) if name in gone else most]
            assert ids == wanted, name
            cached += usage.cached
        assert made.load().pages_used == 0
    assert made.load().preempted > 2 and cached > (20 if case.recurrent else 100)
    sight = made._device._sight
    held = [row for rows_m in sight._held.values() for row in rows_m]
    assert sorted([*held, *sight._free]) == list(range(sight.rows))


def test_rows_that_give_way_go_on_behind_their_images(case, monkeypatch):
    """Nothing is kept for them: the answer so far is computed anew with the prompt."""
    settings = dataclasses.replace(SETTINGS, pages=12, sharing=False)
    made, behind = case.another(settings), []
    prefill = made._device.prefill

    def watched(now):
        behind.append(now.start + now.count - len(now.row.request.prompt))
        return prefill(now)

    monkeypatch.setattr(made._device, "prefill", watched)
    told = made.run([case.request(1 + i % 2, f"r{i}") for i in range(4)])
    for i in range(4):
        assert found(told[f"r{i}"])[0] == case.wanted(1 + i % 2)
    assert made.load().preempted > 0 and max(behind) > 4


def test_room_is_made_by_what_a_piece_does_not_want(case):
    """Room for 40 tokens: one image that was looked at first and is wanted again, two
    that fill the rest, and a new one."""
    sight, params = case.another(SETTINGS)._device._sight, case.engine._device._params
    draw, y = np.random.default_rng(5), case.spec.vision.patch_numbers

    def drawn(rows, columns):
        pixels = draw.normal(size=(rows * columns, y)).astype(np.float32)
        return Image(pixels, (1, rows, columns))

    first, new, others = drawn(4, 4), drawn(6, 10), (drawn(8, 8), drawn(8, 8))

    def shown(where, *some):
        counts = [one.tokens(case.spec.vision) for one in some]
        prompt = (tiny_vl.IMAGE,) * sum(counts)
        row = scheduler.Row(Request("x", prompt, 1, images=some), 0, 8)
        row.laid = images.lay(case.spec, prompt, some)
        made = where.show(params, row, 0, 8, 8)
        return made.index_bt[0], np.asarray(made.features_fd)[made.index_bt[0]]

    for one in (first, *others):
        shown(sight, one)
    index_t, features_td = shown(sight, first, new)
    assert sight.looks == 4 and len(set(index_t.tolist())) == 8
    twice_t, _ = shown(sight, first, first)
    assert twice_t[:4].tolist() == twice_t[4:].tolist() and sight.looks == 4
    fresh = case.another(SETTINGS)._device._sight
    np.testing.assert_array_equal(features_td, shown(fresh, first, new)[1])


def test_features_are_those_of_the_reference(case):
    """Images of all sizes, padded to either bucket."""
    sight = case.another(SETTINGS)._device._sight
    assert sight.buckets == (16, 64)
    for i, (pixels, grids) in enumerate(case.patches):
        if i == 0:
            continue
        with torch.no_grad():
            out = case.reference.model.get_image_features(
                torch.tensor(pixels), torch.tensor(grids, dtype=torch.long)
            )
        wanted = torch.cat(list(out.pooler_output)).numpy()
        start = 0
        for one in images.of({"pixels": pixels, "grid_thw": grids}):
            rows_m = sight._look(case.engine._device._params, one)
            got = np.asarray(sight._features.token_fd)[rows_m]
            stop = start + len(rows_m)
            assert wanted[start:stop].std() > 0.1
            np.testing.assert_allclose(got, wanted[start:stop], atol=1e-4, rtol=0)
            if sight._features.deep_lfd is not None:
                for ours, theirs in zip(
                    sight._features.deep_lfd, out.deepstack_features, strict=True
                ):
                    if isinstance(theirs, tuple):
                        theirs = torch.cat(theirs)
                    theirs = theirs[start:stop].numpy()
                    np.testing.assert_allclose(
                        np.asarray(ours)[rows_m], theirs, atol=1e-4, rtol=0
                    )
            start = stop
            sight._free += rows_m.tolist()


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    made = Case("qwen3_vl", tmp_path_factory.mktemp("warm"))
    made.engine.warm()
    return made


def test_nothing_is_compiled_under_traffic(warm):
    before = warm.engine.load().compiled
    # 2 of pieces, 2 of images, 5 of rows, 2 of first ids, 1 that begins
    assert before >= 12 and warm.engine.warm() == 0
    requests = [warm.request(i) for i in range(6)]
    requests.append(warm.request(3, "full", logprobs=2, prompt_logprobs=1))
    told = warm.engine.run(requests)
    assert warm.engine.load().compiled == before
    assert found(told["full"])[0] == warm.wanted(3)
    # Log-probabilities of a prompt with images are the reference's.
    given = tiny_vl.of_reference(warm.spec, warm.ids[3], warm.patches[3], (None, ()))
    with torch.no_grad():
        told_tv = torch.log_softmax(warm.reference(**given).logits[0], -1).numpy()
    pieces = [p for p in told["full"] if p.prompt_logprobs]
    got = [one.logprob for one in pieces[0].prompt_logprobs]
    ids = np.array(warm.ids[3])
    wanted = told_tv[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)


def test_an_image_is_looked_at_once_and_anew_with_other_weights(warm):
    """Many requests at once, one image; then the tower's first weight is negated."""
    sight = warm.engine._device._sight
    before = sight.looks
    alike = [warm.request(1, f"s{i}", n=2, salt="once") for i in range(5)]
    assert all(ids == warm.wanted(1) for ids, _ in warm.ask(*alike))
    assert sight.looks == before + 1
    warm.ask(warm.request(1, salt="another's"))  # learns nothing from the time it takes
    assert sight.looks == before + 2
    tower = warm.params["vision"]
    warm.engine.swap(warm.params | {"vision": tower | {"patch_yd": -tower["patch_yd"]}})
    proj = warm.reference.model.visual.patch_embed.proj
    old, warm._known = warm.wanted(1), {}
    try:
        with torch.no_grad():
            proj.weight.neg_()
        assert warm.ask(warm.request(1, salt="once"))[0][0] == warm.wanted(1) != old
    finally:
        with torch.no_grad():
            proj.weight.neg_()
        warm._known = {}
        warm.engine.swap(warm.params)


@pytest.mark.slow
def test_on_a_mesh(warm):
    rules = mesh.Rules(batch=None)
    device_mesh = mesh.make(mesh.MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    layout = params.shardings(decoder.decoder_params(warm.spec), device_mesh, rules)
    with jax.set_mesh(device_mesh):
        tree = jax.tree.map(jax.device_put, warm.params, layout)
        settings = dataclasses.replace(SETTINGS, rows=2)
        made = engine.Engine(
            warm.spec, tree, settings=settings, rules=rules, stop_ids=()
        )
    told = made.run([warm.request(i) for i in (1, 3, 0)])
    for i in (1, 3, 0):
        assert found(told[f"r{i}"])[0] == warm.wanted(i)


def test_pixels_in_flight_are_bounded(warm):
    """As are those of requests that wait; text is not kept out by images."""
    one = warm.request(1)
    limit = 2 * one.images[0].pixels_py.nbytes
    made = warm.another(dataclasses.replace(SETTINGS, image_bytes=limit))
    told = []
    for name in "ab":
        made.submit(dataclasses.replace(one, id=name), told.append)
        made.step()
    with pytest.raises(engine.Overloaded):
        made.submit(dataclasses.replace(one, id="c"), told.append)
    made.submit(warm.request(0), told.append)
    while made.in_flight:
        made.step()
    assert sum(piece.finish == "length" for piece in told) == 3
    made.submit(warm.request(3), told.append)  # more than the limit alone
    made.cancel("r3")
    while made.in_flight:
        made.step()


def test_what_does_not_fit_is_refused(warm):
    request = warm.request(1)
    (image,), y = request.images, warm.spec.vision.patch_numbers

    def refused(words, **changes):
        with pytest.raises(config.InputError, match=words):
            warm.engine.run([dataclasses.replace(request, **changes)])

    refused("8 placeholders of images .id 90., 0 images take 0", images=())
    refused("8 placeholders .*, 2 images take 16", images=(image, image))
    refused("images=4: wanted at most 3", images=(image,) * 4)
    large = Image(np.zeros((96, y), np.float32), (1, 8, 12))
    refused(r"images\[0\] has 96 patches: wanted at most 64", images=(large,))
    refused(
        "pixels of images have shape .32, 7.",
        images=(Image(np.zeros((32, 7)), image.grid),),
    )
    refused("multiples of 2", images=(Image(image.pixels_py, (1, 32, 1)),))
    # Likewise by the short way, which gives each prompt its images.
    generate = functools.partial(warm.engine.generate, max_tokens=1)
    two = [request.prompt, warm.ids[0]]
    for shown, words in (
        (None, "0 images take 0"),
        ([(), (image,)], "0 images take 0"),
        ([(large,), ()], r"images\[0\] has 96 patches"),
        ([(image,)], "images of 1 prompts for 2"),
    ):
        with pytest.raises(config.InputError, match=words):
            generate(two, images=shown)
    assert generate(two, images=[(image,), ()]) == ["", ""]  # without a tokenizer
    cut = list(request.prompt)
    cut[14], cut[25] = 5, tiny_vl.IMAGE
    refused(r"images\[0\] are not side by side", prompt=tuple(cut))
    refused("placeholders of a video .id 91.", prompt=(*request.prompt, tiny_vl.VIDEO))
    for pixels, grid, words in (
        (image.pixels_py, (2, 4, 4), "videos are not taken"),
        (image.pixels_py, (1, 4, 4), r"wanted \[16,"),
        (image.pixels_py * np.inf, image.grid, "finite"),
    ):
        with pytest.raises(config.InputError, match=words):
            Image(pixels, grid)
    with pytest.raises(config.InputError, match="images=-1: wanted 0 or more"):
        dataclasses.replace(SETTINGS, images=-1)
    part = {"pixels": image.pixels_py, "grid_thw": np.array([[1, 4, 4]])}
    with pytest.raises(config.InputError, match="counts 16 patches, pixels have 32"):
        images.of(part)
    blind = warm.another(dataclasses.replace(SETTINGS, images=0))
    with pytest.raises(config.InputError, match="images=1: this model runs without"):
        blind.check(request)
    text = dataclasses.replace(warm.spec, vision=None)
    with pytest.raises(config.InputError, match="images=1: this model has no vision"):
        images.check(text, request, SETTINGS)
