#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Submits a qwen-jax job to TPU slices on Google Kubernetes Engine, by kubectl.

Usage: launch/tpu_gke.py --image IMAGE --topology v6e:4x4 [options] -- ARGUMENTS
       (ARGUMENTS: those of qwen-jax)
Example: launch/tpu_gke.py --image REGISTRY/qwen_jax --topology v6e:16x16 -- run \
             --config experiments/pretrain/qwen3_32b.py --workdir /runs/a

It fills in a template of launch/gke/: `job.yaml` for a slice of one host, `jobset.yaml`
for more hosts or slices. `--dry_run` prints the file and submits nothing.

The image is built from launch/gke/Dockerfile. The claim is a volume that all pods mount
at /runs (a bucket or a file store), so `--workdir` must be below /runs. With several
hosts the run gets `--distributed`: the pods find each other from what GKE tells them.

A pod that is drained or preempted saves and ends with exit code 75: Kubernetes would
take 0 for a finished run. It is started again and goes on; that is not counted towards
--max_restarts, which is for runs that fail. `kubectl delete` ends a run for good.

Several slices train as one run and lie along mesh.data, which is then a multiple of
--slices; `qwen-jax run --dry_run --topology v6e:16x16 --slices 2` tells what it takes.

Units: a topology is chips, as in `qwen-jax run --topology`; a host holds 4 of them, or
all of a slice of up to 8 where such machines exist (v5e and v6e; --chips_per_host 4 for
a 2x4 slice of two hosts). Source: Google's tables of TPU machine types.
Raises: exit code 2 and a line with the fix for a wrong flag, before anything is sent.
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import sys

TEMPLATES = pathlib.Path(__file__).resolve().parent / "gke"
# generation -> (the node label's value, dims of a topology, most chips on one host)
GENERATIONS = {
    "v4": ("tpu-v4-podslice", 3, 4),
    "v5e": ("tpu-v5-lite-podslice", 2, 8),
    "v5p": ("tpu-v5p-slice", 3, 4),
    "v6e": ("tpu-v6e-slice", 2, 8),
}
STOPPED_CODE = 75  # EX_TEMPFAIL of sysexits.h: to be tried again later


class UsageError(ValueError):
    """A wrong flag: says the value, what was wanted, and the fix."""


def slice_shape(topology: str, chips_per_host: int | None) -> dict[str, str | int]:
    """ "v6e:4x4" -> node labels, hosts per slice and chips per host."""
    generation, _, dims = topology.partition(":")
    if generation not in GENERATIONS:
        known = ", ".join(GENERATIONS)
        raise UsageError(f"--topology {topology}: generation must be one of {known}")
    accelerator, num_dims, most_chips = GENERATIONS[generation]
    example = "4x4" if num_dims == 2 else "2x2x4"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims) or (
        dims.count("x") + 1 != num_dims
    ):
        raise UsageError(
            f"--topology {topology}: wanted {num_dims} dims such as "
            f"{generation}:{example}"
        )
    chips = math.prod(int(n) for n in dims.split("x"))
    per_host = chips_per_host or (chips if chips <= most_chips else 4)
    if chips % per_host:
        raise UsageError(
            f"--chips_per_host {per_host} does not divide the {chips} chips of "
            f"{topology}; leave it out or name a divisor"
        )
    return {
        "accelerator": accelerator,
        "topology": dims,
        "hosts": chips // per_host,
        "chips_per_host": per_host,
    }


def render(options: argparse.Namespace) -> str:
    """The Kubernetes file as text; every value is JSON, which YAML reads as it is."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise UsageError(
            f"--name {options.name}: wanted at most 40 lower-case letters, digits and "
            "dashes, beginning with a letter"
        )
    if not options.arguments:
        raise UsageError("nothing to run: give the arguments of qwen-jax after --")
    shape = slice_shape(options.topology, options.chips_per_host)
    workdir = _flag(options.arguments, "--workdir")
    if workdir is not None and not workdir.startswith("/runs/"):
        raise UsageError(
            f"--workdir {workdir}: wanted a folder below /runs, where the claim "
            f"{options.claim!r} is mounted; anything else is lost with the pod"
        )
    command = ["qwen-jax", *options.arguments]
    if options.arguments[0] == "run":
        command += ["--exit_code_when_stopped", str(STOPPED_CODE)]
    several = shape["hosts"] * options.slices > 1
    template = TEMPLATES / ("jobset.yaml" if several else "job.yaml")
    values = {
        "name": options.name,
        "namespace": options.namespace,
        "image": options.image,
        "claim": options.claim,
        "slices": options.slices,
        "max_restarts": options.max_restarts,
        "stopped_code": STOPPED_CODE,
        "command": command + ["--distributed"] * several,
        **shape,
    }
    text = template.read_text()
    return string.Template(text).substitute(
        {key: json.dumps(value) for key, value in values.items()}
    )


def _flag(arguments: list[str], name: str) -> str | None:
    """The value of `name` among `arguments`, as --name VALUE or --name=VALUE."""
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(name + "="):
            return argument[len(name) + 1 :]
    return None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", required=True, help="container image with the code")
    parser.add_argument("--topology", required=True, help="for example v6e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology")
    parser.add_argument("--chips_per_host", type=int, choices=(1, 4, 8))
    parser.add_argument("--name", default="qwen-jax", help="name of the job")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--claim", default="runs", help="volume claim mounted at /runs")
    parser.add_argument(
        "--max_restarts", type=int, default=10, help="after failures; see above"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the file only")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        manifest = render(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    submit = ["kubectl", "apply", "--filename", "-"]
    if options.dry_run:
        print(manifest)
        print(f"# submitted with: {shlex.join(submit)} < the file above")
        return 0
    if shutil.which("kubectl") is None:
        print(
            "error: kubectl is not here: install it and point it at the cluster, or "
            "look at the file with --dry_run",
            file=sys.stderr,
        )
        return 2
    code = subprocess.run(submit, input=manifest, text=True, check=False).returncode
    if code == 0:
        kind = "jobset" if "kind: JobSet" in manifest else "job"
        where = f"--namespace {options.namespace}"
        print(f"  watch:  kubectl get pods {where} | grep {options.name}")
        print(f"  stop:   kubectl delete {kind} {options.name} {where}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
