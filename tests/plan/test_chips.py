# SPDX-License-Identifier: Apache-2.0
"""Facts of devices: which chip a device is, its memory, its peak."""

import dataclasses
import math
import os

import jax
import pytest

from qwen_jax.plan import chips


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a JAX device as the facts are read from."""

    device_kind: str
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("kind", "platform", "tflops", "gib"),
    [
        ("TPU v4", "tpu", 275, 30.75),
        ("TPU v5 lite", "tpu", 197, 15.75),
        ("TPU v5", "tpu", 459, 95.74),
        ("TPU v5p", "tpu", 459, 95.74),
        ("TPU v6 lite", "tpu", 918, 31.25),
        ("TPU7x", "tpu", 1153.5, 94.75),
        ("NVIDIA H100 80GB HBM3", "gpu", 989, 80),
        ("NVIDIA H200", "gpu", 989, 141e9 / 2**30),
    ],
)
def test_a_chip_is_known_by_its_kind(kind, platform, tflops, gib):
    device = Device(kind, platform)
    peak, source = chips.peak_flops_per_s(device)
    assert peak == tflops * 1e12 and "data sheet" in source
    assert chips.memory_bytes(device) == pytest.approx(gib * 2**30, abs=1)


def test_an_unknown_chip_has_no_peak():
    peak, source = chips.peak_flops_per_s(Device("Abacus 9000", "abacus"))
    assert math.isnan(peak) and "Abacus 9000" in source


def test_virtual_devices_share_the_machine():
    device = jax.devices()[-1]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert chips.memory_bytes(device) == whole // jax.local_device_count()
    peak, source = chips.peak_flops_per_s(device)
    measured = chips.measured_flops_per_s()
    assert peak == pytest.approx(measured / jax.local_device_count())
    assert measured > 1e8 and "measured" in source


def test_the_allocators_limit_goes_before_the_table(monkeypatch):
    class Here(Device):
        def memory_stats(self):
            return {"bytes_limit": 123}

    mine, other = Here("NVIDIA H200", "gpu"), Device("NVIDIA H200", "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [mine])
    assert chips.memory_bytes(mine) == 123
    # Devices of other processes do not answer; they are like ours.
    assert chips.memory_bytes(other) == 123
    # A device to compile for is none of this machine's.
    assert chips.memory_bytes(Device("TPU v6 lite")) == int(31.25 * 2**30)
