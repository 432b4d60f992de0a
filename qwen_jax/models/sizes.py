# SPDX-License-Identifier: Apache-2.0
"""The published sizes by name, as Specs.

Source: config.json of the published checkpoints; sizes of Qwen2 from arXiv 2407.10671
table 1, Qwen2.5 from arXiv 2412.15115 table 1, Qwen3 from arXiv 2505.09388. Vocabulary
sizes are the padded table sizes.
Invariant: what a size counts to is what was published (tests/models/test_spec.py).
Raises: config.InputError from `get`.
"""

import dataclasses
from typing import Any

from qwen_jax import config
from qwen_jax.models import spec as spec_lib


def _qwen2(
    width, heads, kv_heads, ffn, layers, *, tie, vocab=151_936, **kw
) -> spec_lib.Spec:
    """Qwen2 and Qwen2.5: biases on q, k, v; head width = width / heads."""
    return spec_lib.Spec(
        family="qwen2",
        vocab_size=vocab,
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=width // heads,
        ffn_width=ffn,
        num_layers=layers,
        qkv_bias=True,
        qk_norm=False,
        tie_embedding=tie,
        max_positions=kw.pop("positions", 131_072),
        eos_ids=(151_643,),
        **kw,
    )


def _qwen3(width, heads, kv_heads, ffn, layers, *, tie) -> spec_lib.Spec:
    """Qwen3 dense: norms on q and k heads of width 128, no biases."""
    return spec_lib.Spec(
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_width=ffn,
        num_layers=layers,
        tie_embedding=tie,
        eos_ids=(151_645, 151_643),
    )


def _qwen3_moe(
    width, heads, kv_heads, ffn, expert, layers, *, theta=1e6
) -> spec_lib.Spec:
    """Qwen3 with 128 experts, of which a token meets 8."""
    return dataclasses.replace(
        _qwen3(width, heads, kv_heads, ffn, layers, tie=False),
        family="qwen3_moe",
        rope_theta=theta,
        moe=spec_lib.MoE(num_experts=128, experts_per_token=8, ffn_width=expert),
    )


def _qwen2_vl(
    width, heads, kv_heads, ffn, layers, *, tie, vocab=152_064
) -> spec_lib.Spec:
    """Qwen2-VL: Qwen2 behind a tower of 32 layers, patches of 14 pixels."""
    tower = spec_lib.Vision(
        num_layers=32,
        width=1280,
        ffn_width=5120,
        patch=14,
        mlp="quick_gelu",
        patch_bias=False,
        places=0,
        frame_blocks=False,
    )
    text = _qwen2(
        width, heads, kv_heads, ffn, layers, tie=tie, vocab=vocab, positions=32_768
    )
    return dataclasses.replace(
        text,
        family="qwen2_vl",
        vision=tower,
        mrope_sections=(16, 24, 24),
        eos_ids=(151_645,),
    )


def _qwen2_5_vl(*sizes, tower_ffn=3420, **kw) -> spec_lib.Spec:
    """Qwen2.5-VL: windows in all layers of the tower but four, RMSNorm, SwiGLU."""
    text = _qwen2_vl(*sizes, **kw)
    tower = dataclasses.replace(
        text.vision,
        ffn_width=tower_ffn,
        norm="rms",
        mlp="swiglu",
        window=112,
        full_layers=(7, 15, 23, 31),
        tokens_per_second=2,
    )
    return dataclasses.replace(
        text, family="qwen2_5_vl", vision=tower, max_positions=128_000
    )


def _qwen3_vl(text: spec_lib.Spec, *, small: bool = False) -> spec_lib.Spec:
    """Qwen3-VL: a text model behind a tower with learned positions and DeepStack."""
    tower = spec_lib.Vision(deepstack=(8, 16, 24))
    if small:
        tower = spec_lib.Vision(
            num_layers=24, width=1024, ffn_width=4096, deepstack=(5, 11, 17)
        )
    return dataclasses.replace(
        text,
        family="qwen3_vl" if text.moe is None else "qwen3_vl_moe",
        vision=tower,
        mrope_sections=(24, 20, 20),
        mrope_interleaved=True,
        rope_theta=5e6,
        max_positions=262_144,
        eos_ids=(151_645,),
    )


_HYBRID = {
    "mixers": ("delta", "delta", "delta", "attention"),
    "head_width": 256,
    "output_gate": True,
    "rotary_share": 0.25,
    "norm_offset": True,
    "rope_theta": 1e7,
    "max_positions": 262_144,
    "eos_ids": (151_645, 151_643),
}


def _qwen3_5(width, heads, kv_heads, layers, *, values, ffn=0, moe=None, tie=False):
    """Qwen3.5 (text): three linear layers, then one gated attention; 16 key heads."""
    return spec_lib.Spec(
        family="qwen3_5" if moe is None else "qwen3_5_moe",
        vocab_size=248_320,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_width=ffn or 1,
        tie_embedding=tie,
        delta=spec_lib.Delta(value_heads=values),
        moe=moe,
        **_HYBRID | {"eos_ids": (248_044,)},
    )


NAMED: dict[str, spec_lib.Spec] = {
    # Qwen2, arXiv 2407.10671 table 1.
    "qwen2-0.5b": _qwen2(896, 14, 2, 4864, 24, tie=True),
    "qwen2-1.5b": _qwen2(1536, 12, 2, 8960, 28, tie=True),
    "qwen2-7b": _qwen2(3584, 28, 4, 18944, 28, tie=False, vocab=152_064),
    "qwen2-72b": _qwen2(8192, 64, 8, 29568, 80, tie=False, vocab=152_064),
    # Qwen2.5, arXiv 2412.15115 table 1.
    "qwen2.5-0.5b": _qwen2(896, 14, 2, 4864, 24, tie=True, positions=32_768),
    "qwen2.5-1.5b": _qwen2(1536, 12, 2, 8960, 28, tie=True),
    "qwen2.5-3b": _qwen2(2048, 16, 2, 11008, 36, tie=True, positions=32_768),
    "qwen2.5-7b": _qwen2(3584, 28, 4, 18944, 28, tie=False, vocab=152_064),
    "qwen2.5-14b": _qwen2(5120, 40, 8, 13824, 48, tie=False, vocab=152_064),
    "qwen2.5-32b": _qwen2(5120, 40, 8, 27648, 64, tie=False, vocab=152_064),
    "qwen2.5-72b": _qwen2(8192, 64, 8, 29568, 80, tie=False, vocab=152_064),
    # Qwen3 dense, arXiv 2505.09388 table 1.
    "qwen3-0.6b": _qwen3(1024, 16, 8, 3072, 28, tie=True),
    "qwen3-1.7b": _qwen3(2048, 16, 8, 6144, 28, tie=True),
    "qwen3-4b": _qwen3(2560, 32, 8, 9728, 36, tie=True),
    "qwen3-8b": _qwen3(4096, 32, 8, 12288, 36, tie=False),
    "qwen3-14b": _qwen3(5120, 40, 8, 17408, 40, tie=False),
    "qwen3-32b": _qwen3(5120, 64, 8, 25600, 64, tie=False),
    # Qwen3 with experts, arXiv 2505.09388 table 2.
    "qwen3-30b-a3b": _qwen3_moe(2048, 32, 4, 6144, 768, 48),
    "qwen3-235b-a22b": _qwen3_moe(4096, 64, 4, 12288, 1536, 94),
    "qwen3-coder-480b-a35b": dataclasses.replace(
        _qwen3_moe(6144, 96, 8, 8192, 2560, 62, theta=1e7),
        moe=spec_lib.MoE(num_experts=160, experts_per_token=8, ffn_width=2560),
        max_positions=262_144,
    ),
    # Qwen2-VL and Qwen2.5-VL, arXiv 2409.12191 and 2502.13923, and their config.json.
    "qwen2-vl-2b": _qwen2_vl(1536, 12, 2, 8960, 28, tie=True, vocab=151_936),
    "qwen2-vl-7b": _qwen2_vl(3584, 28, 4, 18944, 28, tie=False),
    "qwen2-vl-72b": _qwen2_vl(8192, 64, 8, 29568, 80, tie=False),
    "qwen2.5-vl-3b": _qwen2_5_vl(2048, 16, 2, 11008, 36, tie=True, vocab=151_936),
    "qwen2.5-vl-7b": _qwen2_5_vl(3584, 28, 4, 18944, 28, tie=False),
    "qwen2.5-vl-32b": _qwen2_5_vl(5120, 40, 8, 27648, 64, tie=False, tower_ffn=3456),
    "qwen2.5-vl-72b": _qwen2_5_vl(8192, 64, 8, 29568, 80, tie=False, tower_ffn=3456),
    # Qwen3-VL, arXiv 2511.21631 and the config.json of the published checkpoints.
    "qwen3-vl-2b": _qwen3_vl(_qwen3(2048, 16, 8, 6144, 28, tie=True), small=True),
    "qwen3-vl-4b": _qwen3_vl(_qwen3(2560, 32, 8, 9728, 36, tie=True), small=True),
    "qwen3-vl-8b": _qwen3_vl(_qwen3(4096, 32, 8, 12288, 36, tie=False)),
    "qwen3-vl-32b": _qwen3_vl(_qwen3(5120, 64, 8, 25600, 64, tie=False)),
    "qwen3-vl-30b-a3b": _qwen3_vl(_qwen3_moe(2048, 32, 4, 6144, 768, 48)),
    "qwen3-vl-235b-a22b": _qwen3_vl(_qwen3_moe(4096, 64, 4, 12288, 1536, 94)),
    # Qwen1.5 and Qwen2 with experts, arXiv 2407.10671 table 1.
    "qwen1.5-moe-a2.7b": dataclasses.replace(
        _qwen2(2048, 16, 16, 5632, 24, tie=False, positions=8192),
        family="qwen2_moe",
        moe=spec_lib.MoE(60, 4, 1408, shared_width=5632, norm_topk=False),
    ),
    "qwen2-57b-a14b": dataclasses.replace(
        _qwen2(3584, 28, 4, 18944, 28, tie=False, vocab=151_936),
        family="qwen2_moe",
        moe=spec_lib.MoE(64, 8, 2560, shared_width=20_480, norm_topk=False),
    ),
    # Qwen3-Next, config.json of the published checkpoint.
    "qwen3-next-80b-a3b": spec_lib.Spec(
        family="qwen3_next",
        width=2048,
        num_layers=48,
        num_heads=16,
        num_kv_heads=2,
        ffn_width=5120,
        tie_embedding=False,
        delta=spec_lib.Delta(),
        moe=spec_lib.MoE(512, 10, 512, shared_width=512),
        **_HYBRID,
    ),
    # Qwen3.5 (text), config.json of the published checkpoints.
    "qwen3.5-0.8b": _qwen3_5(1024, 8, 2, 24, values=16, ffn=3584, tie=True),
    "qwen3.5-2b": _qwen3_5(2048, 8, 2, 24, values=16, ffn=6144, tie=True),
    "qwen3.5-4b": _qwen3_5(2560, 16, 4, 32, values=32, ffn=9216, tie=True),
    "qwen3.5-9b": _qwen3_5(4096, 16, 4, 32, values=32, ffn=12_288),
    "qwen3.5-27b": _qwen3_5(5120, 24, 4, 64, values=48, ffn=17_408),
    "qwen3.5-35b-a3b": _qwen3_5(
        2048, 16, 2, 40, values=32, moe=spec_lib.MoE(256, 8, 512, shared_width=512)
    ),
    "qwen3.5-122b-a10b": _qwen3_5(
        3072, 32, 2, 48, values=64, moe=spec_lib.MoE(256, 8, 1024, shared_width=1024)
    ),
    "qwen3.5-397b-a17b": _qwen3_5(
        4096, 32, 2, 60, values=64, moe=spec_lib.MoE(512, 10, 1024, shared_width=1024)
    ),
    # Qwen3.8-Flash-Next, the preview of Qwen4: sizes of its published config.json as
    # public ports of it state them.
    "qwen4-exp-flash": spec_lib.Spec(
        family="qwen4_exp",
        vocab_size=248_320,
        width=2560,
        num_layers=48,
        num_heads=24,
        num_kv_heads=2,
        ffn_width=1,
        tie_embedding=False,
        delta=spec_lib.Delta(16, 48, gate="sigmoid"),
        moe=spec_lib.MoE(512, 10, 640, shared_width=640),
        streams=spec_lib.Streams(),
        indexed=spec_lib.Indexed(),
        ngram=spec_lib.Ngram(layers=(1,), eos_id=248_044),
        **_HYBRID | {"eos_ids": (248_044,)},
    ),
}


def get(name: str, **changes: Any) -> spec_lib.Spec:
    """A published size by name, with fields replaced.

    Raises:
      config.InputError: unknown name (with the nearest) or field.
    """
    if name not in NAMED:
        raise config.InputError(f"model {name!r}{config.nearest(name, NAMED)}")
    values = config.merge(config.thaw(NAMED[name]), changes)
    return config.freeze(spec_lib.Spec, values, at="model")
