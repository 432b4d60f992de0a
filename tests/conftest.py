# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices, no silent rank promotion, warnings are errors."""

import gc
import os
import pathlib
from importlib import metadata

# Each worker of pytest has one core's work: threads of torch would only wait for each
# other, on two busy cores for half of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Programs of the tests run for milliseconds and compile for seconds: without LLVM's
# optimizations and the fusion emitters they compile ten times faster. The second flag
# is known to the XLA of jax 0.10; a flag that is not known ends the process.
_fast = "--xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):
    _fast += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _fast)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# An example's first run may import or compile: its time says nothing.
hypothesis.settings.register_profile("qwen_jax", deadline=None)
hypothesis.settings.load_profile("qwen_jax")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled programs of earlier runs of the suite; a private folder, as it is code.
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "QWEN_JAX_TEST_CACHE", os.path.expanduser("~/.cache/qwen_jax/test-compile")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

_STATM = pathlib.Path("/proc/self/statm")


@pytest.fixture(scope="module", autouse=True)
def _programs_given_back():
    """Compiled programs are let go at the end of a file once they are many: a worker
    that ran half of the suite held 9 GB."""
    yield
    if _STATM.exists():
        held = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if held > 3 << 30:
            jax.clear_caches()
            gc.collect()
