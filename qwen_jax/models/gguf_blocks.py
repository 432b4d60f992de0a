# SPDX-License-Identifier: Apache-2.0
"""Blocks of quantized weights -> float32: the block formats of ggml, in NumPy.

Source: the structs `block_q4_0` to `block_q6_K` of ggml (ggml-common.h). A block holds
`gguf_file.TYPES[...].block` weights that follow each other in a row: small integers q
and what they are multiplied by, float16 scales d and, in types that end in _1 or _K,
minima m: w = d q, d q + m, or in super-blocks of 256 weights d s q - m t, where s and t
are 6-bit numbers of each 32 weights (8-bit s of each 16 in Q6_K).

Shapes: bytes uint8 [blocks, block_bytes] -> float32 [blocks, block].
Invariants: every product and sum is rounded to float32 in the order of the formula, so
the result is that of the `gguf` package, bit for bit. Temporaries are of `CHUNK`
weights at most, whatever the tensor.
"""

import numpy as np

from qwen_jax.models import gguf_file

CHUNK = 1 << 20


def dequantize(raw: np.ndarray, stored: gguf_file.Type) -> np.ndarray:
    """float32 weights of whole blocks, flat.

    Args:
      raw: uint8, of a whole number of blocks.
      stored: the type.
    """
    blocks = raw.reshape(-1, stored.block_bytes)
    out = np.empty((len(blocks), stored.block), np.float32)
    each = max(1, CHUNK // stored.block)
    for start in range(0, len(blocks), each):
        part = slice(start, start + each)
        with np.errstate(all="ignore"):  # infinite scales: weights as the file has them
            out[part] = _OF_TYPE[stored.name](blocks[part])
    return out.reshape(-1)


def _half(bytes_b2: np.ndarray) -> np.ndarray:
    """float16 in two bytes -> float32 [b, 1]."""
    return np.ascontiguousarray(bytes_b2).view("<f2").astype(np.float32)


def _nibbles(bytes_bn: np.ndarray, run: int) -> np.ndarray:
    """4-bit numbers: of each `run` bytes first the low halves, then the high ones."""
    run_bnr = bytes_bn.reshape(len(bytes_bn), -1, 1, run)
    halves = np.concatenate([run_bnr & 0xF, run_bnr >> 4], axis=2)
    return halves.reshape(len(bytes_bn), -1)


def _bits(bytes_bn: np.ndarray) -> np.ndarray:
    """Single bits, the lowest of a byte first."""
    return np.unpackbits(bytes_bn, axis=1, bitorder="little")


def _q4_0(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * (_nibbles(x[:, 2:], 16).astype(np.int8) - 8)


def _q4_1(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * _nibbles(x[:, 4:], 16) + _half(x[:, 2:4])


def _q5_0(x: np.ndarray) -> np.ndarray:
    q = _nibbles(x[:, 6:], 16) | _bits(x[:, 2:6]) << 4
    return _half(x[:, :2]) * (q.astype(np.int8) - 16)


def _q5_1(x: np.ndarray) -> np.ndarray:
    q = _nibbles(x[:, 8:], 16) | _bits(x[:, 4:8]) << 4
    return _half(x[:, :2]) * q + _half(x[:, 2:4])


def _q8_0(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * x[:, 2:].view(np.int8)


def _six_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and the 8 minima of 32 weights each, in 12 bytes.

    The first four of each are the low 6 bits of a byte; the others have their low 4
    bits in the last four bytes and their high 2 bits above those of the first four.
    """
    first, second, third = x[:, :4], x[:, 4:8], x[:, 8:]
    scales = [first & 63, third & 0xF | first >> 6 << 4]
    minima = [second & 63, third >> 4 | second >> 6 << 4]
    return np.concatenate(scales, axis=1), np.concatenate(minima, axis=1)


def _super(x: np.ndarray, q: np.ndarray) -> np.ndarray:
    """d s q - m t of super-blocks that begin with d, m and the 6-bit numbers."""
    scales, minima = _six_bits(x[:, 4:16])
    d_b81 = (_half(x[:, :2]) * scales)[:, :, None]
    m_b81 = (_half(x[:, 2:4]) * minima)[:, :, None]
    return (d_b81 * q.reshape(len(x), 8, 32) - m_b81).reshape(len(x), 256)


def _q4_k(x: np.ndarray) -> np.ndarray:
    return _super(x, _nibbles(x[:, 16:], 32))


def _q5_k(x: np.ndarray) -> np.ndarray:
    # Bit i of byte j is the fifth bit of weight 32 i + j.
    high = _bits(x[:, 16:48]).reshape(len(x), 32, 8).swapaxes(1, 2).reshape(-1, 256)
    return _super(x, _nibbles(x[:, 48:], 32) | high << 4)


def _q6_k(x: np.ndarray) -> np.ndarray:
    low = _nibbles(x[:, :128], 64)
    pairs = x[:, 128:192].reshape(len(x), 2, 1, 32)
    high = np.concatenate([pairs >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    q = (low | high.reshape(len(x), 256) << 4).astype(np.int8) - 32
    d_b = _half(x[:, 208:]) * x[:, 192:208].view(np.int8)
    return (d_b[:, :, None] * q.reshape(len(x), 16, 16)).reshape(len(x), 256)


_OF_TYPE = {
    "F32": lambda x: x.view("<f4"),
    "F16": lambda x: x.view("<f2"),
    "BF16": lambda x: (x.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
