# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out rows, in nats a token and in bits a byte, and what gzip makes of it.

    bits per byte = sum of -log2 p(target) / UTF-8 bytes of the targets

End-of-document targets cost bits and stand for no bytes, and the first token of a
document is predicted too, so the number is that of a compressor of the whole text and
can stand beside gzip's, which depends on no tokenizer either.

Shapes: batches as in training, [1, rows, t], or what another `sums` takes (`heldout`);
sums are float32 a batch, added on the host in float64.
"""

import dataclasses
import functools
import gzip
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from qwen_jax import mesh
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import step as step_lib


def make(spec: spec_lib.Spec, rules: mesh.Rules, settings: Any) -> Callable:
    """`sums(params, batch, bytes_v) -> {"nll", "targets", "bytes"}`, jitted."""

    @functools.partial(jax.jit)
    def sums(params, batch, bytes_v):
        rows = jax.tree.map(lambda x: x[0], batch)
        _, parts = step_lib.loss_fn(
            params,
            rows,
            {"targets": 1.0, "tokens": 1.0},
            step_lib.no_sums(spec),
            spec=spec,
            rules=rules,
            config=dataclasses.replace(settings, mtp_coef=0.0),
        )
        return {
            "nll": parts["nll"],
            "targets": rows["mask_bt"].sum(),
            "bytes": step_lib.count_bytes(rows, bytes_v),
        }

    return sums


def evaluate(
    sums: Callable, params: Any, batches: Iterable[Any], bytes_v: jax.Array
) -> dict[str, float]:
    """{"eval_loss", "eval_bits_per_byte", "eval_targets"} over all batches."""
    total = {"nll": 0.0, "targets": 0.0, "bytes": 0.0}
    for batch in batches:
        part = jax.device_get(sums(params, batch, bytes_v))
        for key in total:
            total[key] += float(part[key])
    return {
        "eval_loss": total["nll"] / max(total["targets"], 1.0),
        "eval_bits_per_byte": total["nll"] / math.log(2) / max(total["bytes"], 1.0),
        "eval_targets": total["targets"],
    }


def gzip_bits_per_byte(text: bytes, level: int = 9) -> float:
    """What `gzip -9` needs for the same text, all of it as one stream."""
    return 8 * len(gzip.compress(text, level)) / max(len(text), 1)
