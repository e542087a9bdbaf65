#!/usr/bin/env bash
# tpu/status.sh: prints the state of the slice and, once it is ready, of each machine.
#
# The slice: absent, waiting, ready, lost (taken away or broken), with Google's message if it is waiting or lost. A machine: new
# (run tpu/setup.sh), idle (tpu/run.sh), running, done, failed with an exit code, which is 128 + N if signal N ended it
# (tpu/logs.sh). "evaluation" precedes the state of a job that tpu/evaluate.sh started.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
no_more_options
state=ready
if [[ ! $DRY_RUN ]]; then
  state=$(slice_state)
  echo "$NAME: $state"
elif [[ $ENGINE == queue ]]; then
  call gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' --project="$PROJECT"
  call gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' --project="$PROJECT"
else
  call gcloud compute instance-groups managed list-instances "$NAME" --zone="$ZONE" --format='value(instanceStatus)' --project="$PROJECT"
fi
[[ $state != waiting && $state != lost ]] || slice_problem | sed "s/^/$NAME: /"
[[ $state == ready ]] || exit 0
# A machine that is not set up has no script to report that.
on_workers "if [ -x $REMOTE/tpu/worker.sh ]; then $REMOTE/tpu/worker.sh state; else echo segzero new; fi"
