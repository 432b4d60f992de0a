#!/usr/bin/env bash
# Runs qwen-jax on every host of a Cloud TPU pod slice, by gcloud.
#
# Usage: launch/tpu_pod.sh --name NAME --zone ZONE [options] -- ARGUMENTS OF qwen-jax
#   --project P       Google Cloud project (gcloud's own)
#   --create TYPE     make the slice first, for example v6e-64 (see --version)
#   --version V       runtime version for --create (v2-alpha-tpuv6e)
#   --spot            with --create: a preemptible slice
#   --no_install      the hosts hold this very code and .venv already
#   --dry_run         print the commands, run nothing
#
# Example: launch/tpu_pod.sh --name my-v6e --zone us-east5-b -- run \
#              --config experiments/pretrain/qwen3_8b.py --workdir /mnt/runs/a
#
# Steps: make the slice; copy the tracked files of this repository to each host; install
# there with the extra `tpu`; start the same command on all hosts, which find each other
# from the TPU's own metadata (--distributed). The run folder must be one that all hosts
# see (a mounted bucket or NFS). Ctrl-C here ends the connection; on every host the run
# then gets SIGTERM, saves and ends. Run it again to go on.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "error: $*; see $0 --help" >&2
    exit 2
}
name="" zone="" project="" create="" version=v2-alpha-tpuv6e spot="" install=yes dry_run=""
while (($#)); do
    case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry_run) dry_run=yes ;;
    --spot) spot=yes ;;
    --no_install) install="" ;;
    --name | --zone | --project | --create | --version)
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
[[ -n "$name" && -n "$zone" ]] || fail "--name and --zone are needed: which slice, and where"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "$dry_run" ]] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not here: install the Google Cloud CLI, or look with --dry_run"
fi

place=(--zone="$zone")
[[ -z "$project" ]] || place+=(--project="$project")

# Prints a command; runs it unless this is a dry run.
step() {
    printf '%q ' "$@" && echo
    [[ -n "$dry_run" ]] || "$@"
}
on_all_hosts() {
    step gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

if [[ -n "$create" ]]; then
    step gcloud compute tpus tpu-vm create "$name" "${place[@]}" \
        --accelerator-type="$create" --version="$version" ${spot:+--spot}
fi
if [[ -n "$install" ]]; then
    archive="${TMPDIR:-/tmp}/qwen_jax-$name.tar.gz"
    step git archive --format=tar.gz --prefix=qwen_jax/ --output="$archive" HEAD
    step gcloud compute tpus tpu-vm scp "$archive" "$name:qwen_jax.tar.gz" \
        "${place[@]}" --worker=all
    on_all_hosts "tar -xzf qwen_jax.tar.gz && qwen_jax/launch/install.sh tpu"
fi

# The wrapper turns the loss of the connection into the SIGTERM that saves.
printf -v command '%q ' .venv/bin/qwen-jax "$@" --distributed
on_all_hosts "cd qwen_jax && { trap 'kill -TERM \$run' HUP INT TERM; ${command% } & run=\$!; wait \$run || wait \$run; }"

cat <<TIPS
next:
  again, without copying:  $0 --no_install --name $name --zone $zone -- ${*@Q}
  look at one host:        gcloud compute tpus tpu-vm ssh $name ${place[*]} --worker=0
  delete the slice:        gcloud compute tpus tpu-vm delete $name ${place[*]}
TIPS
