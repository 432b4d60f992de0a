# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models written by transformers, and inputs for them."""

import numpy as np

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
TOWER = {"depth": 3, "num_heads": 2, "patch_size": 4, "in_channels": 3}
NEW_TOWER = TOWER | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "out_hidden_size": 32,
    "num_position_embeddings": 25,
    "initializer_range": 0.02,
}


def chunked(*sections):
    """M-RoPE as Qwen2-VL has it."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}


def interleaved(*sections, **more):
    """M-RoPE as Qwen3-VL has it."""
    return chunked(*sections) | {"mrope_interleaved": True} | more


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
PARTIAL = interleaved(2, 1, 1, partial_rotary_factor=0.5)
# name -> (classes begin with, text part, tower, outer fields)
CASES = {
    "qwen2_vl": (
        "Qwen2VL",
        TEXT | {"rope_parameters": chunked(1, 1, 2)},
        TOWER | {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2},
        {},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        TEXT | {"rope_parameters": chunked(2, 1, 1)},
        TOWER
        | {
            "hidden_size": 24,
            "intermediate_size": 40,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        {"tie_word_embeddings": True},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        TEXT | {"head_dim": 16, "rope_parameters": interleaved(4, 2, 2)},
        NEW_TOWER | {"deepstack_visual_indexes": [0, 1]},
        {},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        TEXT
        | EXPERTS
        | {"head_dim": 16, "rope_parameters": interleaved(3, 3, 2)}
        | {"mlp_only_layers": [1]},
        NEW_TOWER | {"deepstack_visual_indexes": [0, 2]},
        {},
    ),
    "qwen3_5": (
        "Qwen3_5",
        TEXT | LINEAR | {"rope_parameters": PARTIAL},
        NEW_TOWER,
        {"tie_word_embeddings": True},
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        TEXT
        | LINEAR
        | EXPERTS
        | {"shared_expert_intermediate_size": 24, "rope_parameters": PARTIAL},
        NEW_TOWER,
        {},
    ),
}


def reference(name, folder, marks=(IMAGE, VIDEO, START, END), **changes):
    """A random model in transformers, saved to a folder; returns the torch model.
    marks: ids; changes: of the text part."""
    import torch
    import transformers

    kind, text, tower, outer = CASES[name]
    made = getattr(transformers, f"{kind}Config")(
        text_config=text | changes,
        vision_config=tower,
        image_token_id=marks[0],
        video_token_id=marks[1],
        vision_start_token_id=marks[2],
        vision_end_token_id=marks[3],
        **outer,
    )
    made._attn_implementation = "eager"
    torch.manual_seed(sum(map(ord, name)))
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = cls(made).eval().float()
    offset = kind.startswith("Qwen3_5")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 1 and ("norm" in key or "ln_q" in key):
                bias = key.endswith("bias")
                plain = "linear" in key or "visual" in key or not offset
                weight.copy_((1 if plain and not bias else 0) + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            elif "embed" in key and not (outer and "tokens" in key):
                fan = weight[0].numel() if "patch" in key else 1
                weight.copy_(noise * fan**-0.5)
            else:
                fan = weight[0].numel() if weight.ndim > 3 else weight.shape[-1]
                weight.copy_(noise * fan**-0.5)
    model.save_pretrained(folder)
    return model


def pixels(spec_or_size, grids, seed=0):
    """Random patches of images with these grids: {"pixels", "grid_thw"}."""
    grid = np.array(grids, np.int32)
    count = int(np.prod(grid, axis=1).sum())
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(count, spec_or_size)).astype(np.float32)
    return {"pixels": values, "grid_thw": grid}


def row(draw, *parts):
    """Token ids: a number is that many text tokens, ("image", grid) a block of
    placeholders between its marks, ("video", grid, apart) one, or one a frame."""
    out = []
    for part in parts:
        if isinstance(part, int):
            out += draw.integers(0, 88, part).tolist()
            continue
        kind, (frames, rows, columns), *apart = part
        one = rows * columns // 4
        if kind == "image":
            out += [START] + [IMAGE] * (frames * one) + [END]
        elif apart and apart[0]:
            for _ in range(frames):
                out += draw.integers(0, 88, 2).tolist()
                out += [START] + [VIDEO] * one + [END]
        else:
            out += [START] + [VIDEO] * (frames * one) + [END]
    return out


T = 60
IMAGES, VIDEOS = 8, 2  # grids, with zeros to fill up
IMAGE_PATCHES, VIDEO_PATCHES = 320, 96


def documents(apart):
    """Rows of parts: text alone, an image, several of different sizes, a video, both,
    images that touch. `apart`: frames of a video are blocks of their own."""
    small, wide, odd = (1, 4, 4), (1, 4, 8), (1, 6, 10)
    return [
        [21],
        [3, ("image", wide), 5],
        [2, ("image", small), 1, ("image", odd), 4, ("image", wide), 3],
        [4, ("video", (3, 4, 4), apart), 6],
        [1, ("image", odd), 2, ("video", (2, 6, 4), apart), 2],
        [2, ("image", small), ("image", small), 9],
    ]


def grids(parts, kind):
    """The grids of a document's images or videos."""
    return [p[1] for p in parts if not isinstance(p, int) and p[0] == kind]


def patches(spec, docs, kind, seed=0):
    """Their patches, document by document: [(pixels, grid), ...] for each."""
    draw, out = np.random.default_rng(seed), []
    for parts in docs:
        mine = grids(parts, kind)
        count = int(sum(np.prod(g) for g in mine))
        shape = (count, spec.vision.patch_numbers)
        values = draw.normal(size=shape).astype(np.float32)
        out.append((values, np.array(mine, np.int32).reshape(-1, 3)))
    return out


def filled(parts, size, count):
    """All documents' patches as one pack, filled up to `size` patches, `count` grids
    of zeros among them."""
    pixels = np.concatenate([p for p, _ in parts])
    grid = np.concatenate([g for _, g in parts])
    assert len(pixels) <= size and len(grid) <= count
    fill = np.full((size - len(pixels), pixels.shape[1]), 7.0, np.float32)
    return {
        "pixels": np.concatenate([pixels, fill]),
        "grid_thw": np.pad(grid, [(0, count - len(grid)), (0, 0)]),
    }


def seconds(grid):
    """Seconds per grid of videos: any numbers, the same for the same grid."""
    return 0.5 + 0.25 * grid[:, 0].astype(np.float32)


def of_reference(spec, ids, image, video):
    """Arguments of the torch model for one row."""
    import torch

    ids = np.asarray(ids)[None]
    out = {"input_ids": torch.tensor(ids, dtype=torch.long)}
    kinds = (ids == IMAGE) * 1 + (ids == VIDEO) * 2
    if kinds.any():
        out["mm_token_type_ids"] = torch.tensor(kinds, dtype=torch.int)
    if len(image[1]):
        out["pixel_values"] = torch.tensor(image[0])
        out["image_grid_thw"] = torch.tensor(image[1], dtype=torch.long)
    if len(video[1]):
        out["pixel_values_videos"] = torch.tensor(video[0])
        out["video_grid_thw"] = torch.tensor(video[1], dtype=torch.long)
        if spec.family == "qwen2_5_vl":
            out["second_per_grid_ts"] = torch.tensor(seconds(video[1]))
    return out
