# SPDX-License-Identifier: Apache-2.0
"""Facts of devices: peak matrix FLOP/s and the memory a program may use.

Source: peaks are the vendors' dense bf16: TPU v4 275, v5e 197, v5p 459, v6e 918, v7x
2,307 TFLOP/s a chip; A100 312, H100 and H200 (SXM) 989, B200 2,250. Memory of TPUs is
what their compiler grants a program (libtpu 0.0.42: v4 30.75 of 32 GiB, v5e 15.75 of
16, v5p 95.74, v6e 31.25 of 32, v7x 94.75 a device), of GPUs as sold. A CPU has no data
sheet worth quoting: its peak is measured, as one large float32 matrix product.

Units: FLOP/s, bytes, of one JAX device: a v7x chip is two devices. Unknown devices give
nan, never a guess.
"""

import dataclasses
import functools
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a kind, which is how `device_kind` begins."""

    kind: str
    peak_flops_per_s: float
    memory_bytes: int
    memory_bytes_per_s: float


CHIPS = (
    Chip("TPU v4", 275e12, int(30.75 * GIB), 1.23e12),
    Chip("TPU v5 lite", 197e12, int(15.75 * GIB), 0.82e12),
    Chip("TPU v5p", 459e12, int(95.74 * GIB), 2.77e12),
    Chip("TPU v5", 459e12, int(95.74 * GIB), 2.77e12),
    Chip("TPU v6 lite", 918e12, int(31.25 * GIB), 1.64e12),
    Chip("TPU7x", 2307e12 / 2, int(94.75 * GIB), 7.38e12 / 2),
    Chip("NVIDIA A100", 312e12, 80 * GIB, 2.04e12),
    Chip("NVIDIA H100", 989e12, 80 * GIB, 3.35e12),
    Chip("NVIDIA H200", 989e12, 141 * 10**9, 4.8e12),
    Chip("NVIDIA B200", 2250e12, 180 * GIB, 8e12),
)


def chip_of(device: Any) -> Chip | None:
    """The chip a JAX device is, or None when it is not in the table."""
    kind = device.device_kind.lower()
    for chip in CHIPS:
        if kind.startswith(chip.kind.lower()):
            return chip
    return None


def memory_bytes(device: Any) -> int:
    """Memory one device may use: its allocator's limit, the table, or for a CPU an
    equal share of the machine's memory."""
    local = jax.local_devices()[0]
    if device.platform == local.platform:
        # Only our own devices answer.
        stats = (device if device in jax.local_devices() else local).memory_stats()
        if stats and "bytes_limit" in stats:
            return int(stats["bytes_limit"])
    chip = chip_of(device)
    if chip is not None:
        return chip.memory_bytes
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // max(jax.local_device_count(), 1)


@functools.cache
def measured_flops_per_s(dtype: str = "float32", size: int = 1024) -> float:
    """FLOP/s of one large matrix product on the default device, best of five."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best_s = math.inf
    for _ in range(5):
        start_s = time.perf_counter()
        product(x).block_until_ready()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s


def peak_flops_per_s(device: Any) -> tuple[float, str]:
    """(peak of one device, where the number comes from) for MFU."""
    chip = chip_of(device)
    if chip is not None:
        return chip.peak_flops_per_s, f"{chip.kind} bf16 data sheet"
    if device.platform == "cpu":
        # All virtual devices of a process share its cores.
        rate = measured_flops_per_s() / jax.local_device_count()
        return rate, "measured float32 1024 x 1024 product"
    return math.nan, f"unknown device {device.device_kind!r}"


def bandwidth_bytes_per_s(device: Any) -> float:
    """Of one device's memory, by its data sheet; of a CPU as a large copy goes here."""
    chip = chip_of(device)
    if chip is not None:
        return chip.memory_bytes_per_s
    return measured_copy_bytes_per_s() / jax.local_device_count()


@functools.cache
def measured_copy_bytes_per_s(size: int = 1 << 26) -> float:
    """Bytes read and written a second by a large copy on the default device, best of
    five."""
    x = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    best_s = math.inf
    for _ in range(5):
        start_s = time.perf_counter()
        copy(x).block_until_ready()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size / best_s
