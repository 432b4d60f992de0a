#!/usr/bin/env bash
# Runs a command on a TPU host for as long as the connection that started it lasts.
#
# Usage: launch/tpu_host.sh ID COMMAND [ARGUMENTS]        (tpu_pod.sh gives this to ssh)
#
# The connection is standard input: when it ends, the command gets SIGTERM, once, since a
# second one ends a run unsaved; this script ends when the command does, with its exit
# code. Without a terminal no hang-up comes here: sshd only closes its ends of the pipes.
# The command writes to runs/tpu/ID.log, so that it can still speak when nobody listens,
# and the connection is shown that file as it grows.
#
# gcloud gives a connection that was lost up to ten more tries, five seconds apart. ID,
# another one for every call of tpu_pod.sh, tells such a try from a new run: it is
# refused, while the first run saves.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "error: $*; see $0 --help" >&2
    exit 2
}
case "${1:-}" in
-h | --help) usage && exit 0 ;;
-*) fail "unknown option $1 (the ID comes first)" ;;
esac
(($# >= 2)) || fail "nothing to run: give an ID and a command"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log="runs/tpu/$1.log"
shift
mkdir -p runs/tpu
if ! (set -o noclobber && : >"$log") 2>/dev/null; then
    echo "error: $HOSTNAME lost the connection that started this run; it was told to" \
        "save and end ($PWD/$log): give the command again when it has" >&2
    exit 1
fi

trap '' HUP # with a terminal: the end of the input says the same
told=""
trap 'told=yes' INT TERM
exec 3<&0 </dev/null
PYTHONUNBUFFERED=1 "$@" >"$log" 2>&1 3<&- &
run=$!
tail -n +1 -s 0.2 -f --pid="$run" "$log" 3<&- &
view=$!

# No `wait` yet: bash may crash when two signals come while it waits.
while [[ -z "$told" ]] && kill -0 "$run" 2>/dev/null; do
    ended=0
    read -r -t 0.3 -u 3 || ended=$? # above 128: nothing came
    ((ended != 1)) || told=yes
done
trap '' INT TERM
[[ -z "$told" ]] || kill -TERM "$run" 2>/dev/null || true
code=0
wait "$run" || code=$?
wait "$view" || true # the last lines
exit "$code"
