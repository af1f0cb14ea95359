#!/bin/sh
# Several processes of simulated CPU devices on this machine: to see a run with many processes where there is one computer.
#   launch/local.sh 2 train toy --mesh.fsdp 4 --mesh.tensor 1    2 processes of 4 devices each; further arguments go to pgjax
# They meet at a free port of this machine and are stopped together: Ctrl-C or SIGTERM saves and ends them all.
# A process that dies ends the others within a minute; the same command goes on from the last checkpoint.
# Exit status: that of the first process that did not end with 0 (see README.md).
set -u
if [ $# -lt 3 ]; then
    echo "usage: launch/local.sh PROCESSES train|sft CONFIG [...]" >&2
    exit 2
fi
case $1 in
    '' | *[!0-9]* | 0*)
        echo "PROCESSES $1 must be a number from 1" >&2
        exit 2
        ;;
esac
processes=$1 command=$2
shift 2
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu
pids=
k=0
while [ "$k" -lt "$processes" ]; do
    pgjax "$command" "$@" --coordinator "localhost:$port" --processes "$processes" --process "$k" &
    pids="$pids $!"
    k=$((k + 1))
done
trap 'kill -TERM $pids 2>/dev/null' TERM INT
status=0
for pid in $pids; do
    wait "$pid"
    ended=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal to this script ended `wait` before the process had ended
        wait "$pid"
        ended=$?
    done
    [ "$status" -ne 0 ] || status=$ended
done
exit "$status"
