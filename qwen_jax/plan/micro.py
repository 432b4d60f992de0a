# SPDX-License-Identifier: Apache-2.0
"""The micro-batch, derived: a user sets the global batch in tokens and nothing else.

rows = batch_tokens / seq_tokens must be a multiple of the devices along `batch`; the
micro-batch is the largest divisor of a device's rows whose activations fit what is left
of the device's memory (`memory.estimate` tells both). A CPU takes at most `CPU_TOKENS`
a micro-batch, beyond which caches only lose.

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
    fixed_bytes: int,
    sum_bytes: int,
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
      fixed_bytes: of one device whatever the micro-batch: weights, optimizer, gradient.
      sum_bytes: of one device once there are several micro-batches to sum.
      activation_bytes_per_token: of one device, kept and at work.
      memory_bytes: of one device.
      platform: of the devices.
      micro_rows: global rows of a micro-batch; 0 derives them.
    """
    if batch_tokens % seq_tokens:
        raise config.InputError(
            f"batch_tokens={batch_tokens} is not a multiple of seq_tokens="
            f"{seq_tokens}; the nearest is "
            f"{max(batch_tokens // seq_tokens, 1) * seq_tokens}"
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
    room = int(HEADROOM * memory_bytes) - fixed_bytes
    row_bytes = activation_bytes_per_token * seq_tokens

    def fits(n: int) -> bool:
        most = max(CPU_TOKENS // seq_tokens, 1) if platform == "cpu" else n
        return n <= most and n * row_bytes + (n < each) * sum_bytes <= room

    fitting = [n for n in range(1, each + 1) if each % n == 0 and fits(n)]
    if not fitting:
        gib = 1 << 30
        raise config.InputError(
            f"one row of {seq_tokens} tokens needs about {row_bytes / gib:.2f} GiB of "
            "activations, weights, gradient and optimizer "
            f"{(fixed_bytes + (each > 1) * sum_bytes) / gib:.2f} GiB, and of the "
            f"{memory_bytes / gib:.2f} GiB of a device {HEADROOM:.0%} are used: take "
            "--config.train.remat=full, a larger --config.mesh.fsdp or "
            "--config.mesh.tensor, or shorter rows"
        )
    local = max(fitting)
    steps = each // local
    line = (
        f"micro-batch = {local * batch_ways} rows ({local} a device, {steps} a step): "
        f"about {local * row_bytes / (1 << 30):.2f} GiB of activations a device"
    )
    return Batch(rows, local * batch_ways, steps, line)
