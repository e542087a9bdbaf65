#!/usr/bin/env bash
# tpu/preflight.sh [-- OPTION...]: checks, on all machines together, what could make a start fail.
#
# It checks the run that tpu/run.sh would start with the same options: devices and mesh, equal versions on all machines, write
# access to the bucket, the reward servers, disk space. Nothing is trained. It is refused while a training runs.
# See `python -m segzero_jax.preflight --help`.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
after_dashes training
train_options ${REST[@]+"${REST[@]}"}
on_workers "$REMOTE/tpu/worker.sh preflight$(printf ' %q' "${OPTIONS[@]}")"
