# SPDX-License-Identifier: Apache-2.0
"""How long documents are: a long-tailed distribution as fine-tuning sets have it.

Source: the evaluation set of ChunkFlow (arXiv 2503.02356): about 90 % of documents
below 1,024 tokens, 8 % of 1,024 to 4,096, 2 % of 4,096 to 32,768 and below 0.1 % above.
Deviation: within a class lengths are log-uniform, from `SHORTEST` tokens on.

Units: tokens. Raises: config.InputError for counts and scales below 1.
"""

import numpy as np

from qwen_jax import config

SHORTEST = 32
# (share of documents, shortest, longest) of each class
CLASSES = (
    (0.9, SHORTEST, 1024),
    (0.08, 1024, 4096),
    (0.0195, 4096, 32_768),
    (0.0005, 32_768, 262_144),
)


def draw(count: int, seed: int, scale: int = 1, longest: int = 0) -> np.ndarray:
    """Lengths of `count` documents, all divided by `scale`, in the order they come:
    int64; with `longest` none above it, and one of them just that: a step's memory is
    set by what may come, and a step without it would flatter all that plan for it.
    """
    for name, given in (("count", count), ("scale", scale)):
        if given < 1:
            raise config.InputError(f"{name}={given}: wanted at least 1")
    if longest and longest < 2:
        raise config.InputError(f"longest={longest}: wanted at least 2, or 0 for any")
    rng = np.random.default_rng(seed)
    shares = np.array([share for share, _, _ in CLASSES])
    which = rng.choice(len(CLASSES), count, p=shares / shares.sum())
    low, high = (np.array([one[i] for one in CLASSES])[which] for i in (1, 2))
    lengths = np.exp(rng.uniform(np.log(low), np.log(high)))
    lengths = np.maximum(lengths / scale, 2).astype(np.int64)
    if longest:
        lengths = np.minimum(lengths, longest)
        lengths[rng.integers(count)] = longest
    return lengths
