#!/usr/bin/env bash
# Submits a qwen-jax job to Slurm on GPU nodes: writes the job file and gives it to sbatch.
#
# Usage: launch/gpu_slurm.sh [options] -- ARGUMENTS OF qwen-jax
#   --nodes N          nodes (1)
#   --gpus_per_node G  GPUs of each node (8)
#   --per gpu|node     one process per GPU, or one per node that drives all its GPUs (gpu)
#   --cpus_per_task C  cores of each process (8 for each GPU it drives; 0: as the cluster
#                      gives them, which may be a single one)
#   --time T           wall-clock limit of one stretch (24:00:00)
#   --grace_s S        seconds between the warning and the limit (120)
#   --name NAME        job name (qwen_jax)
#   --log_dir DIR      where the log goes (runs/slurm)
#   --partition P, --account A
#   --sbatch "FLAG"    any other flag of sbatch; may be repeated
#   --dry_run          print the job file and the command, submit nothing
#
# Example: launch/gpu_slurm.sh --nodes 4 --partition h100 -- run \
#              --config experiments/pretrain/qwen3_1b7.py --workdir /shared/runs/a
#
# The repository, .venv (launch/install.sh cuda) and the run folder must be on a disk that
# all nodes see. With --distributed the processes find each other from Slurm's
# variables. At the time limit the processes get SIGTERM, save and end,
# and the job puts itself back in the queue and goes on; so does a preempted job.
# `scancel JOB` ends it for good.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "error: $*; see $0 --help" >&2
    exit 2
}
nodes=1 gpus_per_node=8 per=gpu cpus_per_task="" time=24:00:00 grace_s=120 name=qwen_jax
log_dir=runs/slurm partition="" account="" dry_run="" more=()
while (($#)); do
    case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry_run) dry_run=yes ;;
    --nodes | --gpus_per_node | --per | --cpus_per_task | --time | --grace_s | --name | \
        --log_dir | --partition | --account | --sbatch)
        (($# >= 2)) || fail "$1 needs a value"
        if [[ "$1" == --sbatch ]]; then more+=("$2"); else printf -v "${1#--}" '%s' "$2"; fi
        shift
        ;;
    --) shift && break ;;
    *) fail "unknown option $1 (arguments of qwen-jax come after --)" ;;
    esac
    shift
done
(($#)) || fail "nothing to run: give the arguments of qwen-jax after --"
for count in nodes gpus_per_node grace_s; do
    [[ "${!count}" =~ ^[1-9][0-9]*$ ]] || fail "--$count ${!count}: wanted a number from 1"
done
[[ "$cpus_per_task" =~ ^(0|[1-9][0-9]*)?$ ]] ||
    fail "--cpus_per_task $cpus_per_task: wanted a number from 1, or 0 for the cluster's"
[[ "$per" == gpu || "$per" == node ]] || fail "--per $per: wanted gpu or node"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# With one process per node JAX would take only the GPU of the process's own rank.
tasks="$gpus_per_node" devices=""
if [[ "$per" == node ]]; then
    tasks=1
    devices="export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus_per_node - 1)))"
fi
cores="${cpus_per_task:-$((8 * gpus_per_node / tasks))}"
if ((cores)); then cores="--cpus-per-task=$cores"; else cores=""; fi
printf -v command '%q ' "${VENV:-.venv}/bin/qwen-jax" "$@" --distributed

job_file() {
    echo '#!/usr/bin/env bash'
    echo "#SBATCH --job-name=$name"
    echo "#SBATCH --nodes=$nodes"
    echo "#SBATCH --ntasks-per-node=$tasks"
    [[ -z "$cores" ]] || echo "#SBATCH $cores"
    echo "#SBATCH --gpus-per-node=$gpus_per_node"
    echo "#SBATCH --time=$time"
    echo "#SBATCH --signal=B:USR1@$grace_s"
    echo "#SBATCH --requeue"
    echo "#SBATCH --open-mode=append"
    echo "#SBATCH --output=$log_dir/%j.log"
    [[ -z "$partition" ]] || echo "#SBATCH --partition=$partition"
    [[ -z "$account" ]] || echo "#SBATCH --account=$account"
    local flag
    for flag in ${more[@]+"${more[@]}"}; do echo "#SBATCH $flag"; done
    cat <<JOB
set -uo pipefail
cd $(printf %q "$PWD")
${devices:+$devices
}
# Slurm's warning comes to this shell alone. The processes are told through scancel: srun
# answers a SIGTERM of its own by killing them.
limit_near=""
trap 'limit_near=yes; scancel --signal=TERM "\$SLURM_JOB_ID"' USR1
trap : TERM # Slurm told the processes, too; a second SIGTERM would end them unsaved

# --cpus-per-task again: since Slurm 22.05 srun does not take it over from the job.
srun --kill-on-bad-exit=1 ${cores:+$cores }${command% } &
step=\$!
code=0
wait "\$step" || code=\$?
while kill -0 "\$step" 2>/dev/null; do # a signal ends a wait early
    code=0
    wait "\$step" || code=\$?
done
if [[ -n "\$limit_near" ]]; then
    echo "time limit: saved, going back to the queue"
    scontrol requeue "\$SLURM_JOB_ID"
    exit 0
fi
exit "\$code"
JOB
}

if [[ -n "$dry_run" ]]; then
    job_file
    echo
    echo "# submitted with: sbatch --parsable < the file above"
    exit 0
fi
command -v sbatch >/dev/null || fail "sbatch is not here: run this on a login node," \
    "or look at the job file with --dry_run"
mkdir -p "$log_dir"
id="$(job_file | sbatch --parsable)"
id="${id%%;*}"
echo "submitted job $id"
echo "  watch:  tail -F $log_dir/$id.log"
echo "  queue:  squeue --job $id"
echo "  stop:   scancel $id"
