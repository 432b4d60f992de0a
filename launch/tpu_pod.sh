#!/usr/bin/env bash
# Runs qwen-jax on every host of a Cloud TPU pod slice, by gcloud.
#
# Usage: launch/tpu_pod.sh --name NAME --zone ZONE [options] -- ARGUMENTS OF qwen-jax
#   --project P       Google Cloud project (gcloud's own)
#   --create TYPE     make the slice first, for example v6e-64 (see --version)
#   --version V       runtime version for --create (v2-alpha-tpuv6e)
#   --spot            with --create: a preemptible slice
#   --python P        Python of the hosts, 3.11 or later (the first that is found there)
#   --no_install      the hosts hold this very code and .venv already
#   --dry_run         print the commands, run nothing
#
# Example: launch/tpu_pod.sh --name my-v6e --zone us-east5-b -- run \
#              --config experiments/pretrain/qwen3_8b.py --workdir /mnt/runs/a
#
# Steps: make the slice; copy the tracked files of this repository to each host; install
# there with the extras tpu, parquet and gcs; start the same command on all hosts, which
# find each other from the TPU's own metadata (--distributed). The run folder must be one
# that all hosts see (a mounted bucket or NFS). Ctrl-C here, or the end of this script or
# of the network between, ends the connection; on every host the run then gets SIGTERM,
# saves and ends (launch/tpu_host.sh). Run it again to go on.
#
# Runtimes on Ubuntu 22.04, such as v2-alpha-tpuv6e, have Python 3.10 only: the script
# stops there with the command that adds a later one on all hosts.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "error: $*; see $0 --help" >&2
    exit 2
}
name="" zone="" project="" create="" version=v2-alpha-tpuv6e python=""
spot="" install=yes dry_run=""
while (($#)); do
    case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry_run) dry_run=yes ;;
    --spot) spot=yes ;;
    --no_install) install="" ;;
    --name | --zone | --project | --create | --version | --python)
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

no_install() {
    local add="sudo add-apt-repository --yes ppa:deadsnakes/ppa"
    add+=" && sudo apt-get install --yes python3.12-venv"
    cat >&2 <<WHY
error: installing on the hosts failed (see above). Where they have no Python of 3.11 or
later, name one that is there with --python, or give them one and run this again:
  gcloud compute tpus tpu-vm ssh $name ${place[*]} --worker=all --command='$add'
WHY
    exit 2
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
    # VENV: where the command below looks, whichever Python is named.
    with="${python:+VENV=.venv PYTHON=$(printf %q "$python") }"
    install="${with}qwen_jax/launch/install.sh tpu,parquet,gcs"
    on_all_hosts "tar -xzf qwen_jax.tar.gz && $install" || no_install
fi

# A run lasts as long as the connection's input, so that must be one that has no end of
# its own: this script's may be closed, or a terminal, which 64 ssh would read together.
# Only this script holds the end that is written, so the input ends with it, too.
pipe="$(mktemp -d)"
mkfifo "$pipe/in"
exec 8<>"$pipe/in" 9<"$pipe/in"
rm -r "$pipe"
id="$(date +%Y%m%d-%H%M%S)-$$"
printf -v command '%q ' launch/tpu_host.sh "$id" .venv/bin/qwen-jax "$@" --distributed
on_all_hosts "cd qwen_jax && exec ${command% }" <&9 8>&- 9<&-

cat <<TIPS
next:
  the log of a host:       ~/qwen_jax/runs/tpu/$id.log
  again, without copying:  $0 --no_install --name $name --zone $zone ${project:+--project $project }-- ${*@Q}
  look at one host:        gcloud compute tpus tpu-vm ssh $name ${place[*]} --worker=0
  delete the slice:        gcloud compute tpus tpu-vm delete $name ${place[*]}
TIPS
