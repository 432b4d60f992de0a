#!/usr/bin/env bash
# From a clean clone to a trained model: makes .venv, installs, trains a small Qwen3 on
# real text on the CPU, writes report.html and exports the model. About five minutes.
#
# Usage: launch/quickstart.sh [--data PATH] [any flag of `qwen-jax run`]
#   --data PATH    train on your own folder or file instead of the text that comes along
#   --workdir DIR  where the run lives (runs/quickstart)
#   PYTHON=...     another Python, see launch/install.sh
#
# Interrupt it anywhere and run it again: it goes on exactly where it was.
set -euo pipefail

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

# A relative path is meant from where the user stands; the run starts in the repository.
absolute() {
    case "$1" in
    /* | *://*) printf '%s' "$1" ;;
    *) printf '%s' "$PWD/$1" ;;
    esac
}
arguments=()
while (($#)); do
    case "$1" in
    --data | --workdir)
        if (($# < 2)); then
            echo "error: $1 needs a path, for example $1 my_texts" >&2
            exit 2
        fi
        arguments+=("$1" "$(absolute "$2")")
        shift
        ;;
    --data=* | --workdir=*) arguments+=("${1%%=*}" "$(absolute "${1#*=}")") ;;
    *) arguments+=("$1") ;;
    esac
    shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="$(launch/install.sh)"
if [[ ":$PATH:" != *":$PWD/$venv/bin:"* ]]; then
    echo "for the command qwen-jax in this shell: source $PWD/$venv/bin/activate" >&2
fi

# Huge pages for malloc save 12 % of a training step on a CPU: fresh buffers of some MB
# otherwise fault in 4 KB at a time. It is read when a process starts, hence here.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

# Where the extra `tpu` is installed JAX looks for a TPU, and complains at length of none.
if [[ -z "$(compgen -G '/dev/nvidiactl'; compgen -G '/dev/accel*'; compgen -G '/dev/vfio/[0-9]*')" ]]; then
    export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
fi

exec "$venv/bin/qwen-jax" run --config experiments/quickstart.py \
    --workdir runs/quickstart ${arguments[@]+"${arguments[@]}"}
