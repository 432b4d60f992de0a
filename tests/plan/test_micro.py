# SPDX-License-Identifier: Apache-2.0
"""The micro-batch: whole, as large as fits, refused with what would help."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax import config
from qwen_jax.plan import micro

GIVEN = {
    "batch_tokens": 64 * 128,
    "seq_tokens": 128,
    "batch_ways": 4,
    "fixed_bytes": 1000,
    "sum_bytes": 100,
    "activation_bytes_per_token": 1,
    "memory_bytes": 10**9,
    "platform": "gpu",
}


def derive(**changes):
    return micro.derive(**GIVEN | changes)


def test_all_rows_at_once_where_they_fit():
    batch = derive()
    assert (batch.rows, batch.micro_rows, batch.micro_steps) == (64, 64, 1)
    assert "16 a device, 1 a step" in batch.line


@given(
    each=st.integers(1, 48),
    ways=st.integers(1, 8),
    row_bytes=st.integers(1, 50),
    fixed=st.integers(0, 500),
    extra=st.integers(0, 200),
    memory=st.integers(1, 2000),
)
def test_the_largest_divisor_that_fits(each, ways, row_bytes, fixed, extra, memory):
    def needs(local):
        return fixed + local * row_bytes + (extra if local < each else 0)

    room = int(micro.HEADROOM * memory)
    good = [n for n in range(1, each + 1) if each % n == 0 and needs(n) <= room]
    arguments = {
        "batch_tokens": each * ways,
        "seq_tokens": 1,
        "batch_ways": ways,
        "fixed_bytes": fixed,
        "sum_bytes": extra,
        "activation_bytes_per_token": row_bytes,
        "memory_bytes": memory,
    }
    if not good:
        with pytest.raises(config.InputError, match="remat=full"):
            derive(**arguments)
        return
    batch = derive(**arguments)
    assert batch.rows == each * ways == batch.micro_rows * batch.micro_steps
    assert batch.micro_rows == max(good) * ways


def test_summing_micro_batches_has_a_price():
    # 15 rows fit beside the fixed part, but what they are summed in does not.
    tight = {"memory_bytes": 3500, "fixed_bytes": 1000}
    assert derive(**tight, sum_bytes=0).micro_rows == 8 * 4
    assert derive(**tight, sum_bytes=1500).micro_rows == 2 * 4


def test_a_cpu_takes_small_micro_batches():
    batch = derive(batch_tokens=1 << 20, batch_ways=1, platform="cpu")
    assert batch.micro_rows * 128 == micro.CPU_TOKENS
    longer = derive(
        batch_tokens=1 << 20, seq_tokens=1 << 14, batch_ways=1, platform="cpu"
    )
    assert longer.micro_rows == 1


def test_given_rows_are_kept():
    batch = derive(micro_rows=8)
    assert (batch.micro_rows, batch.micro_steps) == (8, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"batch_tokens": 1000},
            "not a multiple of seq_tokens=128; the nearest is 896",
        ),
        ({"batch_ways": 5}, r"batch_tokens=7680"),
        ({"micro_rows": 6}, "micro_rows=6 must divide the 64 rows"),
        ({"micro_rows": 2}, "multiple of the 4 devices"),
        ({"memory_bytes": 1200}, "one row of 128 tokens needs about"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(changes, words):
    with pytest.raises(config.InputError, match=words):
        derive(**changes)
