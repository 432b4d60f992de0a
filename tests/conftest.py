# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices, no silent rank promotion, warnings are errors."""

import os

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled programs of earlier runs of the suite; a private folder, as it is code.
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "QWEN_JAX_TEST_CACHE", os.path.expanduser("~/.cache/qwen_jax/test-compile")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
