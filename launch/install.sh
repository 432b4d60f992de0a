#!/usr/bin/env bash
# Makes .venv and installs the project with pinned versions; does nothing when that is
# already done. Prints the folder. quickstart.sh and test.sh call it.
#
# Usage: launch/install.sh [EXTRAS]          EXTRAS: comma list, e.g. tpu or cuda,hf
#   PYTHON=python3.12  the interpreter to use; its folder is then .venv-3.12
#   VENV=DIR           the folder to use instead
# Extras that are already in the folder stay in it. `cuda` gives JAX on NVIDIA GPUs,
# `tpu` on TPUs; setup.cfg lists them all.
#
# Interrupt it anywhere: a folder that this script began and did not finish is made anew.
# A folder that it did not begin is never deleted; packages are then installed into it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints the version as 3.X when $1 is a Python of 3.11 or later that can make a venv.
usable() {
    "$1" -c 'import sys, venv, ensurepip
if sys.version_info < (3, 11): raise SystemExit(1)
print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

python=""
if [[ -n "${PYTHON:-}" ]]; then
    usable "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is no Python of 3.11 or later" \
        "with the venv module; give the path of one (on Debian: apt-get install python3-venv)"
    python="$PYTHON"
else
    for name in python3 python3.13 python3.12 python3.11 python; do
        if usable "$name" >/dev/null; then
            python="$name"
            break
        fi
    done
    [[ -n "$python" ]] || fail "found no Python of 3.11 or later with the venv module;" \
        "install one (from Debian 12 or Ubuntu 24.04 on: apt-get install python3" \
        "python3-venv) or name it:" \
        "PYTHON=/path/to/python3.12 $0"
fi
version="$(usable "$python")"
if [[ -z "${VENV:-}" ]]; then
    VENV=".venv"
    [[ -z "${PYTHON:-}" ]] || VENV=".venv-$version"
fi

# One installer at a time: the second waits here. This file itself is what is locked, so
# that no lock file is left behind; the lock ends with this shell and what it started.
if command -v flock >/dev/null; then
    exec 9<"launch/install.sh"
    flock 9
fi

done_mark="$VENV/.qwen_jax_installed" # line 1: hash of the pins; line 2: extras
begun_mark="$VENV/.qwen_jax_begun"    # there while an install is under way
pins="$(cat setup.cfg pyproject.toml constraints.txt | cksum | tr ' ' '-')-$version-$PWD"
had_extras=""
if [[ -f "$done_mark" && ! -f "$begun_mark" ]]; then
    had_extras="$(sed -n 2p "$done_mark")"
fi
extras="$(printf '%s,%s' "${1:-}" "$had_extras" | tr ',' '\n' | sed '/^$/d' |
    sort -u | paste -s -d , -)"

if [[ -f "$done_mark" && ! -f "$begun_mark" && "$(sed -n 1p "$done_mark")" == "$pins" &&
    "$extras" == "$had_extras" && -x "$VENV/bin/python" ]]; then
    echo "$VENV"
    exit 0
fi

# Moved aside before it is deleted: a half-deleted folder would have lost its marks.
remove() {
    mv "$VENV" "$VENV-old.$$"
    rm -rf "$VENV"-old.*
}

pip_flags=()
if [[ -f "$begun_mark" && "$(cat "$begun_mark")" != "into another's" ]]; then
    echo "$VENV was left half-made; making it anew" >&2
    remove
elif [[ -f "$begun_mark" ]]; then
    # A package cut off half-way can look installed, so all of them are laid anew.
    pip_flags+=(--force-reinstall)
elif [[ -f "$done_mark" && "$("$VENV/bin/python" -c 'import sys
print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]]; then
    echo "$VENV holds another Python than $version; making it anew" >&2
    remove
fi

start=$SECONDS
what="qwen_jax${extras:+[$extras]}"
echo "installing $what into $VENV with Python $version" \
    "(half a minute to two minutes, more on a slow network)" >&2
rmdir "$VENV" 2>/dev/null || true # empty: stopped between mkdir and the first mark
if [[ -d "$VENV" && ! -f "$begun_mark" && ! -f "$done_mark" ]]; then
    usable "$VENV/bin/python" >/dev/null || fail "$VENV exists, was not made by this" \
        "script and holds no Python of 3.11 or later; remove it or set VENV=another-folder"
    echo "into another's" >"$begun_mark"
elif [[ ! -d "$VENV" ]]; then
    mkdir -p "$VENV"
    echo "from the start" >"$begun_mark" # before anything else is in the folder
    "$python" -m venv "$VENV" || fail "$python could not make $VENV (see above);" \
        "on Debian: apt-get install python3-venv"
elif [[ ! -f "$begun_mark" ]]; then
    echo "newer pins or extras" >"$begun_mark"
fi

# pip's own words only when something is wrong: -qq keeps its errors. Byte-compiling now
# costs 10 s for files of which most are never imported.
"$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
    --no-compile ${pip_flags[@]+"${pip_flags[@]}"} -c constraints.txt -e ".${extras:+[$extras]}" ||
    fail "pip could not install $what (see above); run this again when mended"

printf '%s\n%s\n' "$pins" "$extras" >"$done_mark"
rm -f "$begun_mark"
echo "installed in $((SECONDS - start)) s" >&2
echo "$VENV"
