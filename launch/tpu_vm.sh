#!/bin/sh
# A Cloud TPU slice of VMs, without Kubernetes: the same command on every worker; pgjax learns from the metadata server which it is.
#   PGJAX_CACHE=/mnt/shared/cache launch/tpu_vm.sh NAME ZONE train proguard_7b --runs /mnt/shared/runs --checkpoint DIR --data.root DIR
# Before: `pip install 'pgjax[tpu]'` on all workers, and what all of them mount (a bucket, say), for runs, data, weights and PGJAX_CACHE:
# worker 0 alone writes compiled programs, and with a folder of their own the others compile at every start.
# To stop: NAME ZONE stop; all save and end with status 143. One that dies ends the others. The same command goes on where it was saved.
set -eu
if [ $# -lt 3 ]; then
    echo "usage: launch/tpu_vm.sh NAME ZONE train|sft CONFIG [...], or NAME ZONE stop" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
quoted() { # for the shell at the other end
    printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")"
}
if [ "$1" = stop ]; then
    remote="pkill -TERM -x pgjax"
else
    remote="${PGJAX_CACHE:+PGJAX_CACHE=$(quoted "$PGJAX_CACHE") }pgjax"
    for word in "$@"; do
        remote="$remote $(quoted "$word")"
    done
fi
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$remote"
