# SPDX-License-Identifier: Apache-2.0
"""The devices of TPU slices that are not there: libtpu compiles for them anywhere.

Source: `jax.experimental.topologies`, through the libtpu that the extra `tpu` installs.
Names are KIND:SHAPE, such as v5e:4x4, v6e:16x16, v5p:4x4x4, v4:2x2x4, tpu7x:2x2x2; the
shape counts chips. Several slices of one name are joined by the data center's network.
A program compiled for such devices has its real memory, collectives and cost; nothing
can be run on them.

Invariants: no TPU is looked for, no metadata server asked, no log file written: libtpu
reads its variables once, when it is loaded, so they are set before that.
Raises: config.InputError for a missing libtpu (with the command that installs it) and
for a name libtpu does not know (with names it does).
"""

import importlib.util
import os
import re
from typing import Any

import jax

from qwen_jax import config

EXAMPLES = "v5e:4x4, v6e:4x4, v6e:16x16, v5p:2x2x4, v4:2x2x4, tpu7x:2x2x2"
# What libtpu would otherwise ask the machine for; none of it changes what is compiled.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second dry run at a time is refused
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of `slices` slices `name`, for `mesh.make` and `jit(...).lower`.

    Raises:
      config.InputError: no libtpu, or no such slice.
    """
    if slices < 1:
        raise config.InputError(f"--slices {slices}: wanted a number from 1")
    if importlib.util.find_spec("libtpu") is None:
        raise config.InputError(
            f"--topology {name} needs libtpu, the TPU compiler, which is not "
            "installed: pip install 'qwen_jax[tpu]' (in a clone: launch/install.sh "
            "tpu); no TPU is needed"
        )
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    # A TPU of this machine is not to be taken for a program that is only compiled.
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):  # its two cores are one device, as on a real slice
        more["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except jax.errors.JaxRuntimeError as error:
        raise config.InputError(
            f"--topology {name}: {_reason(error)}; wanted KIND:SHAPE in chips, such as "
            f"{EXAMPLES}"
        ) from error
    return list(found.devices)


def _reason(error: Exception) -> str:
    """libtpu's words without its status code."""
    first = str(error).splitlines()[0]
    return re.sub(r"^[A-Z_]+: ", "", first)
