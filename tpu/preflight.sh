#!/usr/bin/env bash
# tpu/preflight.sh [-- OPTION...]: checks, on all machines together, what a start would trip over.
#
# Devices and mesh, versions equal everywhere, writing to the bucket, the reward servers, disk space; of the run that
# tpu/run.sh would start with the same options. Nothing is trained, and beside a training it is refused. See `python -m segzero_jax.preflight --help`.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
after_dashes training
train_options ${REST[@]+"${REST[@]}"}
on_workers "$REMOTE/tpu/worker.sh preflight$(printf ' %q' "${OPTIONS[@]}")"
