#!/usr/bin/env bash
# tpu/evaluate.sh -- OPTION...: starts an evaluation of the run on all machines of the slice and returns.
#
# The options are those of `python -m segzero_jax.evaluate`, --dataset and --mesh among them. The run's newest checkpoint is
# evaluated unless --checkpoint names another. The same command resumes an interrupted evaluation; tpu/logs.sh shows its
# progress, tpu/run.sh --stop ends it. Its output, evaluate/NAME on worker 0, is copied to NAME/evaluate in the bucket.
# tpu/babysit.sh waits for its end and then starts the training, which ends at once if it is done.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
after_dashes evaluation
((${#REST[@]})) || fail "nothing to ask; expected -- --dataset NAME/SPLIT --mesh FSDPxTENSOR"
not_ours --out "${REST[@]}"
folder=evaluate/$NAME
on_workers "$REMOTE/tpu/worker.sh evaluate $STORE $folder --checkpoint=$STORE$(printf ' %q' "${REST[@]}") --out=$folder"
