#!/usr/bin/env bash
# The trainer in a pod: `python -m segzero_jax.train` with the given options; the run's files are kept in $STORE.
#
# A trainer that is told to stop saves and exits with 0, which a Job takes for done. This script then exits with 75, so that the
# JobSet starts it again. Only process 0 writes files; they are copied to $STORE, a mounted bucket, and restored from there in a
# new pod. Checkpoints go to the bucket directly.

set -uo pipefail
: "${STORE:?expected the folder of the run in the mounted bucket}" "${RUN_DIR:?expected the directory of the run}"

# TPUs access locked host memory: GKE requires a higher limit than containers have
# (https://cloud.google.com/kubernetes-engine/docs/how-to/tpus#privileged-mode). The trainer is not root, so only prlimit has the
# pod's capability (see tpu/Dockerfile).
if ! { ulimit -l unlimited || prlimit --pid $$ --memlock=unlimited:unlimited; } 2>/dev/null; then
  echo "tpu/gke/train.sh: no more than $(ulimit -l) KiB of memory can be locked; if TPUs want more: capability SYS_RESOURCE" >&2
fi

first() { [[ ${MEGASCALE_SLICE_ID:-0}/${TPU_WORKER_ID:-0} == 0/0 ]]; }

copy() {
  first && [[ -e $RUN_DIR ]] || return 0
  # Copies keep the source's time: the mounted bucket's own would be later, and hide lines written in between from cp -u.
  mkdir -p "$STORE/run" && cp -ru --preserve=timestamps "$RUN_DIR/." "$STORE/run/"
}

stopped='' copier=''
if first; then
  # An unreadable bucket would look empty.
  if ! { mkdir -p "$STORE" && touch "$STORE/.writable"; }; then
    echo "tpu/gke/train.sh: $STORE: cannot be written to; exit code 1" >&2
    exit 1
  fi
  # All files or none, since the local folder is copied back.
  if [[ ! -e $RUN_DIR && -e $STORE/run ]]; then
    if ! { rm -rf "$RUN_DIR.part" && cp -r --preserve=timestamps "$STORE/run" "$RUN_DIR.part" && mv "$RUN_DIR.part" "$RUN_DIR"; }; then
      echo "tpu/gke/train.sh: $STORE/run: could not be copied to $RUN_DIR; exit code 1" >&2
      exit 1
    fi
  fi
  (
    trap 'kill "${!-}" 2>/dev/null; exit' TERM
    while true; do
      sleep "${COPY_EVERY_S:-60}" &
      wait $!
      copy
    done
  ) &
  copier=$!
fi

python -m segzero_jax.train --run.dir="$RUN_DIR" "$@" &
trainer=$!
trap 'stopped=yes; kill -TERM "$trainer" 2>/dev/null' TERM INT
code=0
# A signal interrupts the first wait; the second one waits for the trainer.
wait "$trainer" || code=$?
while kill -0 "$trainer" 2>/dev/null; do
  wait "$trainer"
  code=$?
done
# Stop the copier first: of two simultaneous copies of a file the older could win.
[[ ! $copier ]] || { kill "$copier" && wait "$copier"; }
copy
if [[ $stopped && $code == 0 ]]; then
  echo "tpu/gke/train.sh: stopped before the end; exit code 75" >&2
  exit 75
fi
exit "$code"
