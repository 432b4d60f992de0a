# SPDX-License-Identifier: Apache-2.0
"""The micro-batch, derived: a user sets the global batch in tokens and nothing else.

rows = batch_tokens / seq_tokens must be a multiple of the devices along `batch`; the
micro-batch is the largest divisor of a device's rows whose activations fit what
weights, gradient and optimizer leave of the device's memory. A CPU takes at most
`CPU_TOKENS` a micro-batch, beyond which caches only lose.

Units: rows, tokens, bytes per device.
Raises: config.InputError when the batch does not divide, or one row does not fit.
"""

import dataclasses

from qwen_jax import config

CPU_TOKENS = 8192
HEADROOM = 0.85  # of device memory; the rest is fragmentation and the runtime's own


@dataclasses.dataclass(frozen=True)
class Batch:
    """rows = micro_steps * micro_rows, all global."""

    rows: int
    micro_rows: int
    micro_steps: int
    line: str


def derive(
    *,
    batch_tokens: int,
    seq_tokens: int,
    batch_ways: int,
    state_bytes: int,
    activation_bytes_per_token: int,
    memory_bytes: int,
    platform: str,
    micro_rows: int = 0,
) -> Batch:
    """The batch of a step and how it is cut.

    Args:
      batch_tokens: the one number a user sets.
      seq_tokens: tokens of a row.
      batch_ways: devices the rows are dealt to.
      state_bytes: weights, gradient and optimizer on one device.
      activation_bytes_per_token: kept for the backward pass, on one device.
      memory_bytes: of one device.
      platform: of the devices.
      micro_rows: global rows of a micro-batch; 0 derives them.
    """
    if batch_tokens % seq_tokens:
        raise config.InputError(
            f"batch_tokens={batch_tokens} is not a multiple of seq_tokens="
            f"{seq_tokens}; the nearest is {max(batch_tokens // seq_tokens, 1) * seq_tokens}"
        )
    rows = batch_tokens // seq_tokens
    if rows % batch_ways:
        good = max(rows // batch_ways, 1) * batch_ways * seq_tokens
        raise config.InputError(
            f"batch_tokens={batch_tokens} is {rows} rows of {seq_tokens} tokens, which "
            f"{batch_ways} devices (mesh data x fsdp) do not divide; the nearest "
            f"that fits is --config.train.batch_tokens={good}"
        )
    each = rows // batch_ways
    if micro_rows:
        if rows % micro_rows or micro_rows % batch_ways:
            raise config.InputError(
                f"micro_rows={micro_rows} must divide the {rows} rows of a batch and "
                f"be a multiple of the {batch_ways} devices; 0 derives it"
            )
        steps = rows // micro_rows
        return Batch(rows, micro_rows, steps, f"micro-batch = {micro_rows} rows: given")
    room = HEADROOM * memory_bytes - state_bytes
    fit = int(room // (activation_bytes_per_token * seq_tokens))
    if platform == "cpu":
        fit = min(fit, max(CPU_TOKENS // seq_tokens, 1))
    if fit < 1:
        gib = 1 << 30
        raise config.InputError(
            f"one row of {seq_tokens} tokens needs about "
            f"{activation_bytes_per_token * seq_tokens / gib:.2f} GiB of activations, "
            f"weights and optimizer {state_bytes / gib:.2f} GiB, and a device has "
            f"{memory_bytes / gib:.2f} GiB: use --config.train.remat=full, a larger "
            "--config.mesh.fsdp or --config.mesh.tensor, or shorter rows"
        )
    local = max(n for n in range(1, each + 1) if each % n == 0 and n <= fit)
    steps = each // local
    line = (
        f"micro-batch = {local * batch_ways} rows ({local} a device, {steps} a step): "
        f"about {local * seq_tokens * activation_bytes_per_token / (1 << 30):.2f} GiB "
        "of activations a device"
    )
    return Batch(rows, local * batch_ways, steps, line)
