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
    **how: Any,
) -> None:
    """Weights, configuration and tokenizer as transformers loads them.

    Args:
      spec: the model; its end id becomes the tokenizer's.
      weights: stacked parameters on any mesh.
      vocabulary: the tokenizer.
      folder: made if missing.
      dtype: of the tensors; None keeps the parameters' own.
      **how: more of models.save.
    """
    models.save(ended(spec, vocabulary), weights, folder, dtype=dtype, **how)
    if jax.process_index() == 0:
        vocabulary.save(folder)
        generation = {
            "bos_token_id": vocabulary.eos_id,
            "eos_token_id": vocabulary.eos_id,
            "pad_token_id": vocabulary.pad_id,
        }
        text = json.dumps(generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text)
