#!/usr/bin/env bash
# tpu/gke/pod.sh train|evaluate OPTION...: `python -m segzero_jax.train`, or `segzero_jax.evaluate`, in a pod. Its files are in
# $DIR and are kept in $STORE, the run's folder in a mounted bucket.
#
# A trainer that is told to stop saves and exits with 0, which a Job takes for done. This script then exits with 75, so that the
# JobSet starts it again. Only process 0 writes files; they are copied to $STORE, and restored from there in a new pod.
# Checkpoints go to the bucket directly.

set -uo pipefail
: "${STORE:?expected the folder of the run in the mounted bucket}" "${DIR:?expected the local directory of the files}"
case ${1-} in
  train) stored=$STORE/run into=--run.dir ;;
  evaluate) stored=$STORE/evaluate into=--out ;;
  *)
    echo "tpu/gke/pod.sh: '${1-}': expected train or evaluate, then its options" >&2
    exit 2
    ;;
esac

# TPUs access locked host memory: GKE requires a higher limit than containers have
# (https://cloud.google.com/kubernetes-engine/docs/how-to/tpus#privileged-mode). The trainer is not root, so only prlimit has the
# pod's capability (see tpu/Dockerfile).
if ! { ulimit -l unlimited || prlimit --pid $$ --memlock=unlimited:unlimited; } 2>/dev/null; then
  echo "tpu/gke/pod.sh: no more than $(ulimit -l) KiB of memory can be locked; if TPUs want more: capability SYS_RESOURCE" >&2
fi

first() { [[ ${MEGASCALE_SLICE_ID:-0}/${TPU_WORKER_ID:-0} == 0/0 ]]; }

copy() {
  first && [[ -e $DIR ]] || return 0
  # Copies keep the source's time: the mounted bucket's own would be later, and hide lines written in between from cp -u.
  mkdir -p "$stored" && cp -ru --preserve=timestamps "$DIR/." "$stored/"
}

stopped='' copier=''
if first; then
  # An unreadable bucket would look empty.
  if ! { mkdir -p "$STORE" && touch "$STORE/.writable"; }; then
    echo "tpu/gke/pod.sh: $STORE: cannot be written to; exit code 1" >&2
    exit 1
  fi
  # All files or none, since the local folder is copied back.
  if [[ ! -e $DIR && -e $stored ]]; then
    if ! { rm -rf "$DIR.part" && cp -r --preserve=timestamps "$stored" "$DIR.part" && mv "$DIR.part" "$DIR"; }; then
      echo "tpu/gke/pod.sh: $stored: could not be copied to $DIR; exit code 1" >&2
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

python -m "segzero_jax.$1" "$into=$DIR" "${@:2}" &
work=$!
trap 'stopped=yes; kill -TERM "$work" 2>/dev/null' TERM INT
code=0
# A signal interrupts the first wait; the second one waits for the process.
wait "$work" || code=$?
while kill -0 "$work" 2>/dev/null; do
  wait "$work"
  code=$?
done
# Stop the copier first: of two simultaneous copies of a file the older could win.
[[ ! $copier ]] || { kill "$copier" && wait "$copier"; }
copy
if [[ $stopped && $code == 0 ]]; then
  echo "tpu/gke/pod.sh: stopped before the end; exit code 75" >&2
  exit 75
fi
exit "$code"
