# SPDX-License-Identifier: Apache-2.0
"""Images through /v1/chat/completions: the official SDK, a real engine, a tiny model.

The oracle is transformers: the model's own processor makes the ids and patches of the
same conversation, `generate` the answer.
"""

import base64
import io
import json
import pathlib
import threading
from concurrent import futures

import numpy as np
import openai
import pytest

from qwen_jax import talk
from qwen_jax.data import image, tokenizer
from qwen_jax.serve import device, engine, errors, http, listening, pictures
from qwen_jax.serve import served as served_lib
from tests.data import chat_templates
from tests.models import tiny_vl
from tests.serve import servers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
PIL = pytest.importorskip("PIL.Image")
hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
PATCHES = 64  # most of an image: 1,024 pixels, as a patch has 4 x 4
NEW = 12
DRAWN = np.random.default_rng(0)


def drawn(width, height):
    return PIL.fromarray(DRAWN.integers(0, 256, (height, width, 3), np.uint8))


ONE, TWO, LARGE = drawn(24, 16), drawn(24, 16), drawn(300, 200)


class Running(servers.Running):
    """A server with a model that sees, and the same model in transformers."""

    def wanted(self, parts):
        """(ids of the prompt, bytes of the answer) to one message of a user."""
        said = [{"type": "image"} if not isinstance(p, str) else p for p in parts]
        said = [{"type": "text", "text": p} if isinstance(p, str) else p for p in said]
        text = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": said}],
            chat_template=chat_templates.TAGS,
            add_generation_prompt=True,
            tokenize=False,
        )
        shown = [p for p in parts if not isinstance(p, str)]
        given = self.processor(text=[text], images=shown or None, return_tensors="pt")
        out = self.reference.generate(
            **given, max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        ids = given["input_ids"][0].tolist()
        answer = out[0, len(ids) :].tolist()
        return ids, self.engine.tokenizer.decode_bytes(answer)

    def ask(self, parts, **how):
        client = self.client(timeout=60)
        how = {"max_tokens": NEW, "temperature": 0} | how
        how["extra_body"] = {"ignore_eos": True} | how.get("extra_body", {})
        said = [{"role": "user", "content": content(parts)}]
        return client.chat.completions.create(model=servers.NAME, messages=said, **how)


def uri(picture, kind="png"):
    if not isinstance(picture, bytes):
        file = io.BytesIO()
        picture.save(file, kind)
        picture = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def content(parts):
    """Parts of a message: texts, pictures, or URLs of them."""
    made = []
    for part in parts:
        if isinstance(part, str):
            made.append({"type": "text", "text": part})
            continue
        url = part if isinstance(part, dict) else {"url": uri(part), "detail": "auto"}
        made.append({"type": "image_url", "image_url": url})
    return made


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sees")
    text = pathlib.Path(json.__file__).read_text()
    words = tokenizer.train([text, "what is it? <think> </think> " * 9], 400)
    words.settings["chat_template"] = chat_templates.TAGS
    reference = tiny_vl.reference(
        "qwen3_vl",
        folder,
        [words.specials[mark] for mark in MARKS],
        vocab_size=words.vocab_size,
        max_position_embeddings=512,
        eos_token_id=words.eos_id,
        bos_token_id=None,
    )
    words.save(folder)
    size = {"shortest_edge": 64, "longest_edge": 16 * PATCHES}
    images = hf.Qwen2VLImageProcessorPil(
        size=size, patch_size=4, image_mean=image.HALF, image_std=image.HALF
    )
    images.save_pretrained(folder)
    # What the folder says is more than the engine takes: it makes them smaller.
    path = folder / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    raw["size"]["longest_edge"] = 10**6
    path.write_text(json.dumps(raw))
    model = talk.load_model(str(folder), lay_out=False)
    settings = device.Settings(
        rows=1,
        page_tokens=16,
        piece=16,
        max_tokens=256,
        images=3,
        image_patches=PATCHES,
    )
    made = engine.Engine(
        model.spec, model.params, model.tokenizer, settings=settings, stop_ids=()
    )
    made.start()
    registry = served_lib.Models()
    registry.put(served_lib.Served(servers.NAME, model, made, 1))
    app = http.App(registry)
    server, sock = listening.server(app), listening.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    one = Running(app, made, server, thread, sock.getsockname()[1])
    one.reference = reference
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json")
    )
    # Where torchvision is missing, the check of classes meets a stand-in.
    unchecked = {"check_argument_for_proper_class": lambda *_: None}
    kind = type("Processor", (transformers.Qwen3VLProcessor,), unchecked)
    videos = pytest.importorskip("tests.oracles.hf_video").processor("qwen3")
    one.processor = kind(image_processor=images, tokenizer=fast, video_processor=videos)
    yield one
    for client in one.clients:
        client.close()
    server.drain()
    thread.join(10)
    made.close(1.0)
    sock.close()


def told_of(made):
    """The bytes of an answer, thinking and all."""
    return b"".join(bytes(one.bytes) for one in made.choices[0].logprobs.content)


PROMPTS = {
    "one": [ONE, "what is it?"],
    "two": ["these: ", ONE, " and ", TWO, "?"],
    "large": ["a large one ", LARGE],
    "text": ["text alone"],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_are_those_of_transformers(running, name):
    """Row 19."""
    compiled, parts = running.engine.load().compiled, PROMPTS[name]
    ids, wanted = running.wanted(parts)
    made = running.ask(parts, logprobs=True)
    assert told_of(made) == wanted
    assert made.usage.prompt_tokens == len(ids)
    assert made.usage.completion_tokens == NEW
    whole = made.choices[0].message
    whole = (whole.model_extra.get("reasoning_content") or "") + (whole.content or "")
    chunks, told = running.ask(parts, stream=True), ""
    for chunk in chunks:
        delta = chunk.choices[0].delta
        told += delta.model_extra.get("reasoning_content") or delta.content or ""
    assert told == whole and whole
    assert running.engine.load().compiled == compiled


def test_cached_tokens_are_those_of_the_same_image(running):
    """Row 21 with images: the key of pages is what the image is."""

    def cached(*parts):
        usage = running.ask(["a text of more than a page of tokens: ", *parts]).usage
        return usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens

    assert cached(drawn(32, 32), "?")[0] == 0
    before, prompt = cached(LARGE, "?")
    assert 16 <= before < prompt - 32  # up to the image alone
    assert cached(LARGE, "?") == ((prompt - 1) // 16 * 16, prompt)
    assert cached(uri_of(LARGE, "gif"), "?") == (before, prompt)  # fewer colours


def uri_of(picture, kind):
    return {"url": uri(picture, kind)}


def test_kinds_and_details(running):
    """What the SDK may send: types, detail or none, an image in an earlier turn."""
    for kind in ("png", "jpeg", "webp", "gif"):
        assert running.ask([uri_of(ONE, kind), "?"]).usage.prompt_tokens > 6
    wrong = {"url": uri(ONE, "jpeg").replace("image/jpeg", "image/jpg")}
    made = running.ask([wrong | {"detail": "high"}])
    ids, _ = running.wanted([ONE])
    assert made.usage.prompt_tokens == len(ids)
    client = running.client(timeout=60)
    assert client.models.retrieve(servers.NAME).model_extra["max_images"] == 3
    said = [
        {"role": "user", "content": content([ONE, "what?"])},
        {"role": "assistant", "content": "a square"},
        {"role": "user", "content": content(["and ", TWO])},
    ]
    how = {"model": servers.NAME, "max_tokens": 2}
    made = client.chat.completions.create(messages=said, **how)
    pads = made.usage.prompt_tokens
    said[2]["content"] = "and"
    assert (
        pads > client.chat.completions.create(messages=said, **how).usage.prompt_tokens
    )


def test_a_strangers_placeholders_are_text(running):
    """Literal marks take no feature; those of the image still have their own."""
    plain, _ = running.wanted([ONE, "x"])
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    made = running.ask([ONE, mark])
    words = running.engine.tokenizer
    more = len(words.encode(mark)) - len(words.encode("x"))
    assert made.usage.prompt_tokens == len(plain) + more > len(plain) + 9
    # As ids of a completion they would want images.
    pad = words.specials["<|image_pad|>"]
    with pytest.raises(openai.BadRequestError) as caught:
        running.client().completions.create(model=servers.NAME, prompt=[5, pad, 6])
    assert "1 placeholders of images" in caught.value.message


def refused(running, parts):
    with pytest.raises(openai.BadRequestError) as caught:
        running.ask(parts)
    error = caught.value
    assert set(error.body) == {"message", "type", "param", "code"}
    for word in ("0x", "/", "Traceback", "PIL"):
        assert word not in error.message.replace("image/", ""), error.message
    return error.param, error.code


def test_what_is_no_picture_of_ours(running):
    """Row 24, with a model that sees; others are answered beside it and after it."""
    at = "messages[0].content[1]"
    bad = at + ".image_url.url", "invalid_image_url"
    png = base64.b64decode(uri(LARGE).partition(",")[2])
    urls = [
        "http://169.254.169.254/latest",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "data:image/png;base64,####",
        "data:image/png;base64,",
        "data:image/svg+xml;base64,PHN2Zy8+",
        uri(png[: len(png) // 2]),  # its header is right
        uri(png, "jpeg"),
        uri(drawn(900, 2)),
        uri(np.zeros(7 * 2**20, np.uint8).tobytes()),
    ]
    with futures.ThreadPoolExecutor(2) as pool:
        good = pool.submit(running.ask, PROMPTS["one"], logprobs=True)
        for url in urls:
            assert refused(running, ["what is it? ", {"url": url}]) == bad, url[:60]
    assert told_of(good.result()) == running.wanted(PROMPTS["one"])[1]
    many = refused(running, ["x", *[ONE] * 4])
    assert many == ("messages[0].content[4]", "invalid_value")
    assert refused(running, ["x", {"url": uri(ONE), "detail": "most"}]) == (
        at + ".image_url.detail",
        "invalid_value",
    )
    long = refused(running, ["y " * 200, ONE])
    assert long == ("messages", "context_length_exceeded")


def test_videos_are_refused(running):
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError) as caught:
        running.client().chat.completions.create(
            model=servers.NAME, messages=[{"role": "user", "content": [part]}]
        )
    assert caught.value.param == "messages[0].content[0].type"
    assert "image_url" in caught.value.message


def test_pixels_are_counted_before_they_are_decoded():
    """A page of zeros is a small file and much memory: bounds of one and of all."""
    file = io.BytesIO()
    PIL.new("1", (7000, 7000)).save(file, "PNG")
    assert len(file.getvalue()) < 2**14
    with pytest.raises(errors.ApiError, match="7,000 x 7,000 pixels"):
        pictures.of_url(uri(file.getvalue()), "auto", "x")
    file = io.BytesIO()
    PIL.new("1", (5000, 5000)).save(file, "PNG")
    one = pictures.of_url(uri(file.getvalue()), "auto", "x")
    pictures.check([one, one])
    with pytest.raises(errors.ApiError, match="more than 67,108,864 pixels"):
        pictures.check([one, one, one])
    with pytest.raises(errors.ApiError, match="65 images; wanted at most 64"):
        pictures.check([pictures.of_url(uri(ONE), "auto", "x")] * 65)


@pytest.mark.parametrize(("detail", "most"), [("low", 512 * 512), ("high", 4096 * 256)])
def test_details_are_sizes(detail, most):
    """As the model's processor with that bound."""
    settings, shown = image.FAMILIES["qwen3_vl"], drawn(1500, 1100)
    one = pictures.of_url(uri(shown), detail, "x")
    (made,) = pictures.read([one], settings, 4096)
    size = {"shortest_edge": settings.min_pixels, "longest_edge": most}
    reference = hf.Qwen2VLImageProcessorPil(
        size=size, patch_size=16, image_mean=image.HALF, image_std=image.HALF
    )
    wanted = reference(images=[shown], return_tensors="np")
    assert list(made.grid) == wanted["image_grid_thw"][0].tolist()
    np.testing.assert_array_equal(made.pixels_py, wanted["pixel_values"])
