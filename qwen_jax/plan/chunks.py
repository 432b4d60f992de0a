# SPDX-License-Identifier: Apache-2.0
"""What a step in chunks holds and how long it takes, derived from shapes alone.

Chunks are those of `train.chunkflow`: C tokens each, K of a document wait for their
backward pass. Bytes of one device:

    state      weights, optimizer moments
    sums       gradients of the step so far, float32
    gradient   of one batch of chunks, before it is added, and as much again for weights
               that the compiler lays out anew (seen on a CPU)
    keys       keys and values of all chunks of the longest document, and states of
               linear layers before each chunk
    key_grads  cotangents of those keys and values, float32
    waiting    inputs of layers and results of attention, of K chunks
    handed     residuals and cotangents between stages of a pipeline
    gathered, head, working   as in `memory`, of one chunk

Standalone chunks hold activations of all layers instead of keys and what waits.

Work is what one device does: each chunk goes forward once, and once more when it did
not stay; in its backward pass all but attention is computed again, and attention's
scores are. Beside products there is traffic: each pass reads all weights, and each
batch of chunks adds a gradient to the sums. Time is the sum of both, by a rate that is
assumed or was measured.

Units: bytes and FLOPs of one device. Raises: nothing of its own.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import flops
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import blockwise, carried
from qwen_jax.plan import memory

SCORES = 4  # of a pair of blocks: they, their exponentials, and cotangents of both


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of one device; see the module docstring."""

    weights: int
    optimizer: int
    sums: int
    gradient: int
    gathered: int
    head: int
    keys: int
    key_grads: int
    waiting: int
    handed: int
    working: int
    packed: int  # activations of a standalone chunk

    @property
    def fixed(self) -> int:
        """What every program of the step finds there or makes."""
        sums = self.sums + self.gradient + self.handed
        return self.weights + self.optimizer + sums + self.gathered

    @property
    def group(self) -> int:
        """While a group of the longest is differentiated."""
        held = self.keys + self.key_grads + self.waiting
        return self.fixed + held + max(self.working, self.head)

    @property
    def total(self) -> int:
        """When most is held: in such a group, or in a standalone chunk."""
        return max(self.group, self.fixed + max(self.packed, self.head))


def estimate(
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    sizes: Mapping[str, int],
    *,
    optimizer: str,
    remat: str,
    chunk_tokens: int,
    live_chunks: int,
    chunks: int,
    kv_grad_bytes: int = 4,
    slots: Mapping[str, int] | None = None,
) -> Estimate:
    """Bytes of one device in a step in chunks, a row of each device at a time.

    Args:
      spec, rules, sizes, optimizer: as of `memory.estimate`.
      remat: of standalone chunks.
      chunk_tokens: C.
      live_chunks: K.
      chunks: that a program is compiled for; 1 where no document is longer than C.
      kv_grad_bytes: of one number of the cotangents of keys and values.
      slots: of a pipeline's program, as of `train.pipeline.ticks.Table`; the model is
        then the stretch of a stage.
    """
    how = {"optimizer": optimizer, "remat": remat, "micro_steps": 1}
    flat = memory.estimate(spec, rules, sizes, tokens=chunk_tokens, **how)
    size = jnp.dtype(spec.compute_dtype).itemsize
    wide = max(size, kv_grad_bytes)
    heads, kv_heads = (memory.ways(x, sizes) for x in (rules.heads, rules.kv_heads))
    attending = sum(kind.mixer == "attention" for kind in spec.kinds)
    keys = 2 * attending * spec.num_kv_heads * spec.head_width // kv_heads
    places = chunks * chunk_tokens
    width = memory.residual_bytes(spec)
    out = spec.num_heads * (spec.head_width * size + max(size, 4)) // heads
    waits = (len(spec.kinds) + 1) * width + attending * out
    states = 0
    if spec.delta is not None:
        plain = dataclasses.replace(spec, window=None) if spec.window else spec
        states = flops.state_bytes(plain, size) // heads
    kept, _ = memory.activation_bytes_per_token(spec, rules, sizes, "none")
    item = jnp.dtype(spec.param_dtype).itemsize
    held, vocab = (
        flat.weights // item,
        spec.vocab_size // memory.ways(rules.vocab, sizes),
    )
    logits = min(memory.CHUNK_BYTES, 3 * 4 * chunk_tokens * vocab)
    block = blockwise.block_for(chunk_tokens)
    seen = block if chunk_tokens > block * blockwise.UNROLL else chunk_tokens
    pair = SCORES * max(size, 4) * spec.num_heads // heads
    own = carried.block_for(chunk_tokens)
    deep = chunks > 1
    # A pipeline has one more, but of groups, for what nobody reads.
    many = {"x": -1, "d": -1, "g": 1} if slots is None else slots
    held_groups = deep * many["g"]
    waiting = min(live_chunks, chunks) if slots is None else slots["s"] + 1
    return Estimate(
        weights=flat.weights,
        optimizer=flat.optimizer,
        sums=held * max(item, 4),
        gradient=2 * flat.gradient,
        gathered=flat.gathered,
        head=flat.head - memory.CHUNK_BYTES + logits,
        keys=held_groups * (keys * places * size + (chunks + 1) * states),
        key_grads=held_groups * keys * places * wide,
        waiting=deep * waiting * waits * chunk_tokens,
        handed=(many["x"] + many["d"] + 2) * width * chunk_tokens,
        working=deep
        * (flat.working + kept // len(spec.kinds) * chunk_tokens + pair * own * own),
        packed=flat.kept + flat.working + pair * block * seen,
    )


@functools.lru_cache(1 << 14)
def _attention(spec: spec_lib.Spec, tokens: float) -> float:
    """FLOPs a token of scores and what is made of them, in documents of so many."""
    causal = flops.forward_per_token(spec, tokens, causal=True)
    return causal - flops.forward_per_token(spec, 0)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does in one step: FLOPs of products, bytes of weights read and
    gradients added, batches of chunks."""

    flops: float
    bytes: float
    batches: float


def work(
    spec: spec_lib.Spec,
    *,
    remat: str,
    chunk_tokens: int,
    live_chunks: int,
    packed: int,
    groups: Sequence[int],
    length: float,
    weight_bytes: int,
) -> Work:
    """What one device does in a step, a row of it at a time.

    Args:
      spec, remat, chunk_tokens, live_chunks: as of `estimate`.
      packed: batches of standalone chunks.
      groups: chunks of each batch of groups.
      length: tokens of a document in a standalone chunk, the mean over tokens.
      weight_bytes: of one device.
    """
    head = 2 * spec.vocab_size * spec.width
    plain = flops.forward_per_token(spec, 0) - head
    attention = functools.partial(_attention, spec)
    again = {"full": 1.0, "none": 0.0}.get(remat, 0.0)
    flat = (3 + again) * plain + (3.5 + again) * attention(length) + 3 * head
    total, passes = packed * flat, packed * (3 + again)
    for count in groups:
        for i in range(count):
            twice = i < count - live_chunks
            seen = attention((2 * i + 1) * chunk_tokens)
            total += (4 + twice) * plain + (3.5 + twice) * seen + 3 * head
            passes += 4 + twice
    batches = packed + sum(groups)
    moved = weight_bytes * (passes + 3 * batches)
    return Work(total * chunk_tokens, moved, batches)
