#!/usr/bin/env bash
# Staged length extension, end to end on a CPU: a small model learns look-ups in rows of
# 512 tokens, is asked at up to 4,096, where it fails, then trains on in chunks at 4,096
# with a larger RoPE base, and is asked again. About a quarter of an hour on two cores.
#
# Usage: launch/needle.sh [FOLDER]      (runs/needle)
#   QWEN_JAX=...  the command, if it is not .venv's or on the PATH
#
# Writes FOLDER/before.json, yarn.json, after.json and needles.html, the heat maps of all
# three. Interrupt it anywhere and run it again: what is there is not made again.
set -euo pipefail

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi
out="${1:-}"
[[ -z "$out" || "$out" == /* ]] || out="$PWD/$out"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${out:-runs/needle}"
command="${QWEN_JAX:-}"
if [[ -z "$command" ]]; then
    command="$(command -v .venv/bin/qwen-jax || command -v qwen-jax)" || {
        echo "error: qwen-jax is not installed; run launch/install.sh first" >&2
        exit 2
    }
fi
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

lessons() { # NAME and flags
    if [[ ! -d "$out/lessons/$1" ]]; then
        rm -rf "$out/lessons/$1.part"
        $command eval lessons --out "$out/lessons/$1.part" "${@:2}"
        mv "$out/lessons/$1.part" "$out/lessons/$1"
    fi
}
train() { # STAGE and flags
    $command run --config "experiments/long/needle.py:$1" --workdir "$out/$1" \
        --config.data.sources="$2" "${@:3}"
}
source_of() {
    printf '{"path": "%s/lessons/%s/lessons.jsonl", "name": "%s", ' "$out" "$1" "$1"
    printf '"tokens_field": "tokens"}'
}
lengths=256,512,1024,2048,4096
ask() { # NAME, title, stage and flags
    if [[ ! -f "$out/$1.json" ]]; then
        echo "$2"
        $command eval needle --model "$out/$3/export" --lengths $lengths --depths 9 \
            --count 20 --title "$2" --json "$out/$1.part" "${@:4}"
        cp "$out/$1.part" "$out/$3/needle-$1.json" # a section of its report
        $command report "$out/$3"
        mv "$out/$1.part" "$out/$1.json" # last: what is there is whole
    fi
}

mkdir -p "$out/lessons"
lessons first --lengths 48 --documents 20000 --facts 6
lessons short --lengths 64,128,256,512 --documents 6000 --seed 1
lessons long --lengths 512,1024,2048,4096,4096 --documents 1200 --seed 2

train short "[$(source_of first), $(source_of short)]" \
    --config.data.tokenizer="$out/lessons/first/tokenizer"
ask before "Trained at 512 tokens" short
ask yarn "Trained at 512 tokens, YaRN without training" short --yarn 8
train long "[$(source_of long)]" --config.train.init_from="$out/short/export"
ask after "Trained on at 4,096 tokens in chunks" long \
    --beside "$out/before.json" --beside "$out/yarn.json" --html "$out/needles.html"
echo "heat maps: $out/needles.html"
