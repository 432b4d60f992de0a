#!/usr/bin/env bash
# Runs qwen-jax on this machine, in one process or in several that train together.
#
# Usage: launch/local.sh [options] -- ARGUMENTS OF qwen-jax
#   --processes N   N processes joined by jax.distributed (1). On a GPU machine each
#                   process takes one GPU; on a CPU they share the cores.
#   --log_dir DIR   where process 1 to N-1 write (runs/local); process 0 writes here
#   --port P        port of process 0 (a free one)
#   --dry_run       print the commands, start nothing
#
# Example: launch/local.sh --processes 2 -- run --config experiments/quickstart.py \
#              --workdir runs/two
# Ctrl-C and SIGTERM go to every process: each saves, then all end. When one process
# fails, the others get 30 s and are then ended; the exit code is the failed one's.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "error: $*; see $0 --help" >&2
    exit 2
}
processes=1 log_dir="runs/local" port="" dry_run=""
while (($#)); do
    case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry_run) dry_run=yes ;;
    --processes | --log_dir | --port)
        (($# >= 2)) || fail "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift
        ;;
    --) shift && break ;;
    *) fail "unknown option $1 (arguments of qwen-jax come after --)" ;;
    esac
    shift
done
(($#)) || fail "nothing to run: give the arguments of qwen-jax after --"
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--processes $processes: wanted a number from 1"
[[ "$port" =~ ^[0-9]*$ ]] || fail "--port $port: wanted a number"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
command=("${VENV:-.venv}/bin/qwen-jax" "$@")
if [[ -z "$dry_run" && ! -x "${command[0]}" ]]; then
    fail "${command[0]} does not exist: run launch/install.sh first, or set VENV"
fi

if ((processes == 1)); then
    if [[ -n "$dry_run" ]]; then
        printf '%q ' "${command[@]}" && echo
        exit 0
    fi
    exec "${command[@]}"
fi

# Prints the flags that make a process number $1 of the group.
membership() {
    echo "--coordinator=127.0.0.1:${port:-PORT} --num_processes=$processes --process_id=$1"
}
one_gpu_each=""
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    one_gpu_each=yes
fi

if [[ -n "$dry_run" ]]; then
    for ((i = 0; i < processes; i++)); do
        [[ -z "$one_gpu_each" ]] || printf 'JAX_LOCAL_DEVICE_IDS=%s ' "$i"
        printf '%q ' "${command[@]}"
        printf '%s ' "$(membership "$i")"
        ((i == 0)) || printf '>>%q 2>&1 ' "$log_dir/process-$i.log"
        echo '&'
    done
    exit 0
fi

if [[ -z "$port" ]]; then
    port="$("${VENV:-.venv}/bin/python" -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')"
fi
mkdir -p "$log_dir"
pids=()
for ((i = 0; i < processes; i++)); do
    read -r -a flags < <(membership "$i")
    [[ -z "$one_gpu_each" ]] || export JAX_LOCAL_DEVICE_IDS="$i"
    if ((i == 0)); then
        "${command[@]}" "${flags[@]}" &
    else
        "${command[@]}" "${flags[@]}" >>"$log_dir/process-$i.log" 2>&1 &
    fi
    pids+=($!)
done

# What a script starts with & ignores Ctrl-C, so it is handed on as SIGTERM.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

code=0 deadline_s=""
while ((${#pids[@]})); do
    alive=() failed_now=""
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            alive+=("$pid")
            continue
        fi
        status=0
        wait "$pid" || status=$?
        if ((status != 0 && code == 0)); then
            code=$status failed_now=yes
            echo "a process failed with exit code $status; logs: $log_dir" >&2
        fi
    done
    pids=(${alive[@]+"${alive[@]}"})
    # The survivors wait in a collective that cannot end, and a normal exit of theirs can
    # hang for 100 s in the shutdown of the CPU's collectives: ask once (a second SIGTERM
    # ends a run unsaved), later insist.
    if [[ -n "$failed_now" && ${#pids[@]} -gt 0 ]]; then
        deadline_s=$((SECONDS + 30))
        kill -TERM "${pids[@]}" 2>/dev/null || true
    elif [[ -n "$deadline_s" && ${#pids[@]} -gt 0 ]] && ((SECONDS >= deadline_s)); then
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
    sleep 0.3 || true
done
exit "$code"
