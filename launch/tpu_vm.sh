#!/bin/sh
# A Cloud TPU slice of VMs, without Kubernetes: the same command on every worker; pgjax learns from the metadata server which it is.
#   launch/tpu_vm.sh NAME ZONE train proguard_7b --runs /mnt/shared/runs --checkpoint DIR --data.root DIR
# Before: `pip install 'pgjax[tpu]'` on all workers (the same way), and a file system that all of them mount, for runs, data and weights.
# A worker that dies ends the others within a minute; the same command goes on from the last checkpoint.
# To stop: launch/tpu_vm.sh NAME ZONE stop sends SIGTERM to all; they save after the step they are in and end with status 143.
set -eu
if [ $# -lt 3 ]; then
    echo "usage: launch/tpu_vm.sh NAME ZONE train|sft CONFIG [...], or NAME ZONE stop" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
if [ "$1" = stop ]; then
    remote="pkill -TERM -x pgjax"
else
    remote=pgjax
    for word in "$@"; do # quoted once for the shell at the other end
        remote="$remote '$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
    done
fi
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$remote"
