#!/usr/bin/env bash
# tpu/evaluate.sh -- OPTION...: starts an evaluation of the run on all machines of the slice and returns.
#
# The options are those of `python -m segzero_jax.evaluate`, --dataset and --mesh among them; of the run it is the newest
# checkpoint unless --checkpoint says otherwise. The same again goes on where it was cut off; tpu/logs.sh shows how far it is,
# tpu/run.sh --stop ends it. What it writes, evaluate/NAME on the first machine, is copied to NAME/evaluate in the bucket.
# tpu/babysit.sh waits for its end, and then starts the training, which ends at once where it is done.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
after_dashes evaluation
((${#REST[@]})) || fail "nothing to ask; expected -- --dataset NAME/SPLIT --mesh FSDPxTENSOR"
not_ours --out "${REST[@]}"
folder=evaluate/$NAME
on_workers "$REMOTE/tpu/worker.sh evaluate $STORE $folder --checkpoint=$STORE$(printf ' %q' "${REST[@]}") --out=$folder"
