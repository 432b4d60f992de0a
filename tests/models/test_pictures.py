# SPDX-License-Identifier: Apache-2.0
"""From a picture and a prompt to logits: as transformers does it from end to end."""

import dataclasses

import numpy as np
import pytest

from qwen_jax import models
from qwen_jax.data import image, multimodal, video
from qwen_jax.data import tokenizer as tokenizer_lib
from qwen_jax.models import decode
from qwen_jax.models import spec as spec_lib

pytest.importorskip("PIL")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
TEXT = "look: <|vision_start|><|image_pad|><|vision_end|> and describe it"


@pytest.fixture(scope="module")
def processor():
    vocabulary = tokenizer_lib.train(["look and describe it, a picture"] * 5, 400)
    small = {"min_pixels": 32 * 32, "max_pixels": 96 * 96}
    images = dataclasses.replace(image.FAMILIES["qwen3_vl"], **small)
    return multimodal.Processor(vocabulary, images, video.FAMILIES["qwen3_vl"])


def spec_for(vocabulary):
    marks = vocabulary.specials
    tower = spec_lib.Vision(
        num_layers=2,
        width=32,
        num_heads=2,
        ffn_width=48,
        places=16,
        deepstack=(0,),
        image_id=marks["<|image_pad|>"],
        video_id=marks["<|video_pad|>"],
        start_id=marks["<|vision_start|>"],
        end_id=marks["<|vision_end|>"],
    )
    return spec_lib.Spec(
        family="qwen3_vl",
        vocab_size=448,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_width=16,
        ffn_width=48,
        max_positions=512,
        init_std=0.2,
        vision=tower,
        mrope_sections=(4, 2, 2),
        mrope_interleaved=True,
    )


def test_a_picture_becomes_the_logits_of_the_models_own_library(processor, tmp_path):
    spec = spec_for(processor.tokenizer)
    params = models.init(spec, seed=1)
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (h, w, 3), np.uint8) for h, w in [(50, 70)] * 2]
    got = {}
    for i, picture in enumerate(pictures):
        prompt = processor(TEXT, images=[picture])
        pads = int((prompt.ids == spec.vision.image_id).sum())
        assert pads == np.prod(prompt.images["grid_thw"]) // 4 > 1
        logits = models.forward(spec, params, prompt.ids[None], images=prompt.images)
        got[i] = np.asarray(logits)
    assert np.abs(got[0] - got[1]).max() > 0.1  # it looks

    models.save(spec, params, tmp_path)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    own = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    seen = own(images=[pictures[1]], return_tensors="pt")
    with torch.no_grad():
        ids = torch.tensor(prompt.ids[None], dtype=torch.long)
        kinds = (ids == spec.vision.image_id).int()  # 1 where a picture's tokens are
        want = reference(ids, mm_token_type_ids=kinds, **seen).logits.numpy()
    np.testing.assert_allclose(got[1], want, atol=1e-4)

    new = decode.generate(
        spec, params, [prompt.ids.tolist()], max_tokens=3, images=prompt.images
    )
    assert new[0][0] == want[0, -1].argmax()
