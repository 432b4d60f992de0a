# SPDX-License-Identifier: Apache-2.0
"""A trained model as a Hugging Face folder: weights, configuration, tokenizer.

transformers loads what `write` leaves: config.json, model.safetensors (or shards),
generation_config.json, tokenizer.json and tokenizer_config.json with the chat template.
Every process calls; process 0 writes. Raises: OSError from the disk.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from qwen_jax import models
from qwen_jax.data import tokenizer
from qwen_jax.models import spec as spec_lib


def ended(spec: spec_lib.Spec, vocabulary: tokenizer.Tokenizer) -> spec_lib.Spec:
    """The Spec with the tokenizer's end id, with which every document begins too."""
    ids = {"bos_id": vocabulary.eos_id, "eos_ids": (vocabulary.eos_id,)}
    return dataclasses.replace(spec, **ids)


def write(
    spec: spec_lib.Spec,
    weights: Any,
    vocabulary: tokenizer.Tokenizer,
    folder: pathlib.Path,
    dtype: str | None = None,
    *,
    keep_ids: bool = False,
    **how: Any,
) -> None:
    """Weights, configuration and tokenizer as transformers loads them.

    Args:
      spec: the model.
      weights: stacked parameters on any mesh.
      vocabulary: the tokenizer.
      folder: made if missing.
      dtype: of the tensors; None keeps the parameters' own.
      keep_ids: the model's ids for begin and end are its own, where it has any; else
        they become the tokenizer's, with which it was trained.
      **how: more of models.save.
    """
    if not keep_ids or not spec.eos_ids:
        spec = ended(spec, vocabulary)
    models.save(spec, weights, folder, dtype=dtype, **how)
    if jax.process_index() == 0:
        vocabulary.save(folder)
        ends = list(spec.eos_ids)
        generation = {
            "bos_token_id": spec.bos_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": vocabulary.pad_id,
        }
        text = json.dumps(generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text)
