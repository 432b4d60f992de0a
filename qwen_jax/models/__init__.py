# SPDX-License-Identifier: Apache-2.0
"""Every Qwen as pure functions: `load`, `forward`, `save`, `init`.

    spec, params = models.load("DIR or FILE.gguf", dtype="float32")
    logits_btv = models.forward(spec, params, tokens_bt)
    models.save(spec, params, "DIR")

`embed` and `score` are for models with another head than that of tokens.
`init(spec, seed)` gives random weights of a Spec or of a published size by name.
"""

import os
from typing import Any

import jax

from qwen_jax import mesh as mesh_lib
from qwen_jax import params as params_lib
from qwen_jax import rng
from qwen_jax.models import decoder, gguf, hf, sizes
from qwen_jax.models.decoder import forward
from qwen_jax.models.heads import embed, score
from qwen_jax.models.hf import save
from qwen_jax.models.spec import Spec

__all__ = ["Spec", "embed", "forward", "init", "load", "save", "score"]


def load(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    device_mesh: jax.sharding.Mesh | None = None,
    rules: mesh_lib.Rules | None = None,
    **changes: Any,
) -> tuple[Spec, Any]:
    """Spec and parameters of a Hugging Face folder or a GGUF file.

    Args:
      path: the folder or the file.
      dtype: of parameters and compute; None takes the one that is there.
      device_mesh: lay the parameters out on it, by `rules`.
      rules: dims -> mesh axes.
      **changes: fields of the Spec to replace.
    Raises:
      config.InputError: see `hf` and `gguf`.
    """
    form = gguf if gguf.is_gguf(path) else hf
    return form.load(path, dtype=dtype, device_mesh=device_mesh, rules=rules, **changes)


def init(
    spec: Spec | str,
    seed: int = 0,
    *,
    device_mesh: jax.sharding.Mesh | None = None,
    rules: mesh_lib.Rules | None = None,
) -> Any:
    """Random weights of a Spec (or a name of sizes.NAMED), in its param_dtype.

    Args:
      spec: the model, or a published size such as "qwen3-0.6b".
      seed: of the run; the same seed gives the same bits on every mesh.
      device_mesh: lay the weights out on it, by `rules`.
      rules: dims -> mesh axes.
    """
    if isinstance(spec, str):
        spec = sizes.get(spec)
    tree = decoder.decoder_params(spec)
    layout = None
    if device_mesh is not None:
        layout = params_lib.shardings(tree, device_mesh, rules or mesh_lib.Rules())
    key = rng.key_for(seed, "params")
    return params_lib.init(tree, key, spec.param_dtype, layout)
