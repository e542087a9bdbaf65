#!/usr/bin/env bash
# tpu/run.sh [--stop] [-- OPTION...]: starts the training on all machines of the slice and returns.
#
# The training outlives the connection. Options after "--", such as --train.steps=2, are added to TRAIN of the settings. The same
# command resumes the run. --stop makes the run save a checkpoint and end.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
if [[ ${REST[0]-} == --stop ]]; then
  REST=("${REST[@]:1}")
  no_more_options
  on_workers "$REMOTE/tpu/worker.sh stop"
  exit
fi
after_dashes training
train_options ${REST[@]+"${REST[@]}"}
on_workers "$REMOTE/tpu/worker.sh start $STORE $RUN_DIR$(printf ' %q' "${OPTIONS[@]}")"
