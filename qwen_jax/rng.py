# SPDX-License-Identifier: Apache-2.0
"""Random keys are derived from (seed, name, step), never carried.

Restoring step n therefore needs no key in the checkpoint, and two parts of the program
can never share a stream by accident: the name is hashed (blake2b, 32 bits) and folded.
Keys are JAX typed keys (threefry), the same on every backend.
"""

import hashlib

import jax


def key_for(seed: int, name: str, step: int | jax.Array = 0) -> jax.Array:
    """fold(fold(key(seed), hash(name)), step); `step` may be traced."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    key = jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest, "little"))
    return jax.random.fold_in(key, step)


def seed_for(seed: int, name: str) -> int:
    """A 31-bit integer seed for host libraries, derived in the same manner."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF
