#!/usr/bin/env bash
# tpu/babysit.sh [--every SECONDS (60)] [--tries N] [-- OPTION...]: keeps the training going until it is done.
#
# Polls the slice and does whatever is missing: creates it, sets it up, starts the training, deletes a slice that was taken away.
# It keeps no state: each poll finds out the current one. You may stop it (Ctrl-C) and start it again at any moment; slice and
# training go on. Run it on a machine that stays on, in tmux or the like: a hang-up ends it.
#
# Gives up after acting N times (20) without a new checkpoint in the bucket, and at once when the training ends with exit code 2
# or 5 (updates that are not finite), which only a person can fix.
# Exit codes: 0 the training is done; 1 gave up; 130 stopped. The slice stays in each case.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
every=60 tries=20
set -- ${REST[@]+"${REST[@]}"}
while (($#)); do
  case $1 in
    --every | --tries)
      [[ ${2-} =~ ^[0-9]+$ ]] || fail "$1 ${2:-(nothing)}: expected a number"
      if [[ $1 == --every ]]; then every=$2; else tries=$2; fi
      shift
      ;;
    --) break ;;
    *) fail "$1: unexpected; options of the training come after --" ;;
  esac
  shift
done
more=("$@")

if [[ $DRY_RUN ]]; then
  echo "# Every $every seconds:"
  "$HERE/status.sh" --dry-run
  echo "# Where there is no slice:"
  "$HERE/create.sh" --dry-run
  echo "# Where it is lost, before another is made:"
  "$HERE/delete.sh" --dry-run
  echo "# Where a machine is new:"
  "$HERE/setup.sh" --dry-run
  echo "# Where the training does not run, at the first start as after an interruption:"
  "$HERE/run.sh" --dry-run ${more[@]+"${more[@]}"}
  echo "# Where a machine's training has failed while others wait for it, before the next start:"
  "$HERE/run.sh" --dry-run --stop
  exit 0
fi

still="the slice stays, and costs, until tpu/delete.sh"
child='' answer=$(mktemp) problem=$(mktemp)
trap 'rm -f "$answer" "$problem"' EXIT
trap '[[ ! $child ]] || { kill -- "-$child"; kill -CONT -- "-$child"; } 2>/dev/null || true; say "stopped; slice and training go on, and the same command goes on watching them"; exit 130' INT TERM HUP

# Runs a command in the background and waits for it, so that a signal is handled at once and ends the command's children too.
set -m
await() {
  local code=0
  "$@" </dev/null &
  child=$!
  wait "$child" || code=$?
  child=''
  return "$code"
}

look_at_slice() { slice_state >"$answer"; }
look_at_problem() { slice_problem >"$answer"; }
look_at_machines() { "$HERE/status.sh" >"$answer" 2>"$problem"; }

# Whether there is a checkpoint that was not there when this was asked before.
saw_checkpoint() {
  await newest_checkpoint || true
  [[ -s $answer && $(<"$answer") != "$newest" ]] && newest=$(<"$answer")
}
newest_checkpoint() { (gcloud storage ls "$STORE/checkpoints/" 2>/dev/null | grep -oE '/[0-9]+/$' | sort -V | tail -n 1) >"$answer"; }

# Sets STATE, one word for the training on all machines: new, idle, running, done, failed (CODE is the exit code, WORKER a worker
# that has it) or unknown (only ANSWERS machines reported).
training_state() {
  local lines
  await look_at_machines || true
  # Wait for an evaluation; once it has ended, start the training.
  lines=$(grep -oE 'segzero (evaluation )?(new|idle|running|done|failed [0-9]+)$' "$answer" |
    sed -E 's/evaluation (done|failed.*)/idle/; s/evaluation //' || true)
  # If any machine evaluates, all count as running: they start and end one after the other.
  if grep -q 'segzero evaluation running$' "$answer"; then
    lines=$(sed -E 's/^segzero (idle|done)$/segzero running/' <<<"$lines")
  fi
  CODE=$(sed -n 's/^segzero failed //p' <<<"$lines" | sort -n | tail -n 1)
  WORKER=$(sed -n "s/^worker \([0-9]*\): segzero failed $CODE\$/\1/p" "$answer" | head -n 1)
  ANSWERS=$(grep -c . <<<"$lines") || true
  if ((ANSWERS != HOSTS)); then
    STATE=unknown
  elif [[ $CODE ]]; then
    STATE=failed
  elif grep -q new <<<"$lines"; then
    STATE=new
  elif grep -q idle <<<"$lines"; then
    STATE=idle
  elif grep -q running <<<"$lines"; then
    STATE=running
  else
    STATE='done'
  fi
}

# Prints and counts the next action; gives up after too many without progress.
try() {
  tried=$((tried + 1)) looks=0
  if ((tried > tries)) && saw_checkpoint; then tried=1; fi
  if ((tried > tries)); then
    say "$NAME: gave up: did something $tries times without a new checkpoint; tpu/status.sh and tpu/logs.sh say more; $still"
    exit 1
  fi
  say "$1"
}

# A failure here (no quota, a broken connection) is retried at the next poll, and counts.
attempt() { await "$@" || say "${1##*/}: failed; looking again in $every s"; }

# One poll: does whatever is missing.
tend() {
  await look_at_slice || echo unknown >"$answer"
  case $(<"$answer") in
    absent) try "$NAME: making the slice" && attempt "$HERE/create.sh" && return ;;
    lost)
      await look_at_problem || true
      reason=$(<"$answer")
      try "$NAME: was taken away or broke${reason:+ ($reason)}; deleting what is left" && attempt "$HERE/delete.sh" && return
      ;;
    ready) ;;
    *) return 0 ;;
  esac
  training_state
  case $STATE in
    running)
      looks=$((looks + 1))
      if ((looks % 10 == 0)); then
        # Running alone is no progress: a training may wait an hour for its reward server, and then end.
        if saw_checkpoint; then tried=0; fi
      fi
      ;;
    'done')
      # Copies the last files: the timer copies once a minute, too late if the slice is deleted next.
      await on_workers "$REMOTE/tpu/worker.sh copy" || say "$NAME: the last files of the training are not in $STORE yet; its machine tries again every minute"
      say "$NAME: the training is done; $still"
      exit 0
      ;;
    new) try "$NAME: setting up" && attempt "$HERE/setup.sh" ;;
    unknown) try "$NAME: $ANSWERS of $HOSTS machines answer$(grep . "$problem" | tail -n 1 | sed 's/^/: /' || true)" ;;
    failed)
      if ((CODE == 2 || CODE == 5)); then
        say "$NAME: the training ended with exit code $CODE; put it right and start again ($still): worker ${WORKER:-0}: $("$HERE/logs.sh" --worker "${WORKER:-0}" --lines 1 2>/dev/null || true)"
        exit 1
      fi
      try "$NAME: the training ended with exit code $CODE; starting it again"
      await "$HERE/run.sh" --stop || true # It has said why.
      attempt "$HERE/run.sh" ${more[@]+"${more[@]}"}
      ;;
    idle) try "$NAME: starting the training" && attempt "$HERE/run.sh" ${more[@]+"${more[@]}"} ;;
  esac
}

tried=0 looks=0 newest=none
while true; do
  tend
  await sleep "$every"
done
