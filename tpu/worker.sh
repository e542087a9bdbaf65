#!/usr/bin/env bash
# tpu/worker.sh install REVISION [STORED SET...] | preflight OPTION... | start STORE RUN_DIR OPTION... |
# evaluate STORE OUT OPTION... | stop | state | number | fetch | copy: one machine's part.
#
# The other commands in tpu/ call it on every machine. The training, or evaluation, is a systemd unit: it outlives the connection,
# is told to stop when the machine is about to be taken away, and keeps its exit code.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UNIT=segzero
UV_VERSION=0.9.7
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
cd "$ROOT"

# Installs packages, then data sets. The mark of a finished setup, .revision, comes last: until then the machine counts as new,
# also if it was set up for an earlier commit, whose packages may differ.
install() {
  local set
  # After a broken connection gcloud retries while the first install still runs.
  exec 8>>.installing
  flock 8
  rm -f .revision
  remove_old_files
  install_packages
  for set in "${@:3}"; do bring "$2" "$set"; done
  echo "$1" >.revision
}

# Removes an earlier commit's files that this one no longer has: unpacking only adds files.
remove_old_files() {
  tar -tzf "$ROOT.tar.gz" | sed -n 's|^[^/]*/||; /[^/]$/p' | LC_ALL=C sort >.files.new
  [[ ! -f .files ]] || LC_ALL=C comm -23 .files .files.new | tr '\n' '\0' | xargs -0 rm -f
  mv .files.new .files
}

install_packages() {
  if [[ -x .venv/bin/python && $(cat .installed 2>/dev/null) == "$(cat constraints.txt pyproject.toml | sha256sum)" ]]; then
    return
  fi
  rm -f .installed
  # The images bring Python 3.10; uv brings its own 3.11.
  [[ -x $HOME/.local/bin/uv ]] || curl -LsSf "https://astral.sh/uv/$UV_VERSION/install.sh" | sh
  "$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.11 .venv
  "$HOME/.local/bin/uv" pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[tpu]'
  cat constraints.txt pyproject.toml | sha256sum >.installed
}

# bring STORED SET: puts a data set into data.dir. A built set in the bucket is copied, whole or not at all (its checksums tell),
# unless this machine has one of that name. Otherwise the set is built, which works only for sets on the hub.
bring() {
  local stored=$1/question_set/$2 data=$HOME/.cache/segzero_jax part answer code=0
  part=$data/.part
  if answer=$(gcloud storage ls "$stored/" 2>&1); then
    [[ ! -e $data/question_set/$2 ]] || return 0
    rm -rf "$part"
    mkdir -p "$part/question_set/$2" "$data/question_set"
    gcloud storage rsync --recursive "$stored" "$part/question_set/$2"
    (run segzero_jax.data.build "$2" --check --data-dir="$part") || {
      echo "tpu/worker.sh: $stored: not whole; copy it there again" >&2
      exit 1
    }
    mv "$part/question_set/$2" "$data/question_set/$2"
    rm -rf "$part"
  elif [[ $answer == *'matched no objects'* ]]; then
    (run segzero_jax.data.build "$2") || code=$?
    ((code == 0)) || { echo "tpu/worker.sh: $2: not in $stored, and not built here" >&2 && exit "$code"; }
  else
    printf 'tpu/worker.sh: %s: cannot be read now, so this machine is not set up: %s\n' "$stored" "$answer" >&2
    exit 1
  fi
}

# Prints the training's state in systemd as one word; "failed" comes with the exit code, 128 + N if signal N ended it.
state() {
  local active sub how code
  active=$(systemctl show "$UNIT" --property=ActiveState --value)
  sub=$(systemctl show "$UNIT" --property=SubState --value)
  how=$(systemctl show "$UNIT" --property=ExecMainCode --value)
  code=$(systemctl show "$UNIT" --property=ExecMainStatus --value)
  # CLD_KILLED and CLD_DUMPED of waitid(2): the status is then the signal, and 2 and 5 would be read as exit codes.
  [[ $how != [23] ]] || code=$((128 + code))
  case $active/$sub in
    # Before .revision is checked: it may run while another commit is being set up.
    active/running | activating/* | deactivating/*) echo running && return ;;
  esac
  [[ -f .revision ]] || { echo new && return; }
  case $active/$sub in
    # systemd counts an end by SIGINT or SIGTERM as success.
    active/exited) if ((code)); then echo "failed $code"; else echo 'done'; fi ;;
    failed/*) echo "failed $code" ;;
    *) echo idle ;;
  esac
}

# Prints this machine's state. An evaluation is marked as one: tpu/babysit.sh looks after the training.
report() {
  local word mine
  word=$(state)
  case $word in
    new | idle) ;;
    *) if [[ -f .run ]] && read_place && [[ $FOLDER == evaluate ]]; then word="evaluation $word"; fi ;;
  esac
  mine=$(number 2>/dev/null) || mine='?'
  echo "worker $mine: segzero $word"
}

# Refused beside a training: it would claim the same ports and chips, which would end the training. The preflight process holds
# the lock until it ends, even if its client has hung up.
preflight() {
  exec 9>>.checking
  flock --nonblock 9 || { echo "tpu/worker.sh: $CHECKS" >&2 && exit 2; }
  [[ $(state) != running ]] || { echo "tpu/worker.sh: runs already; tpu/run.sh --stop ends it" >&2 && exit 2; }
  echo "$$" >.checking
  run segzero_jax.preflight "$@"
}
CHECKS="a preflight still runs; tpu/run.sh --stop ends it"

nothing_checks() { (flock --nonblock 9) 9>>.checking; }

# Stops a preflight, and a training started since the machine's last boot: systemd knows no other.
stop() {
  nothing_checks || kill "$(cat .checking)" || true
  local was
  was=$(state)
  [[ $(systemctl show "$UNIT" --property=LoadState --value) == not-found ]] || sudo systemctl stop "$UNIT"
  # systemctl reports success, however the unit ended.
  [[ $was != running || $(state) != failed* ]] || {
    echo "tpu/worker.sh: ended with $(state), so its last step may not be saved; tpu/logs.sh says more" >&2
    exit 1
  }
}

# Runs a module to its end with the training's variables: ~/secrets/segzero.env as systemd reads it, one NAME=value a line,
# quoted or not.
run() {
  local line value
  while IFS= read -r line || [[ $line ]]; do
    [[ $line =~ ^[[:space:]]*([A-Za-z_][A-Za-z0-9_]*)=[[:space:]]*(.*[^[:space:]]|)[[:space:]]*$ ]] || continue
    line=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
    export "$line=$value"
  done < <(cat "$HOME/secrets/segzero.env" 2>/dev/null)
  exec .venv/bin/python -m "$@"
}

start() { launch segzero_jax.train "$1" "$2" run config.yaml "${@:3}"; }

evaluate() { launch segzero_jax.evaluate "$1" "$2" evaluate . "${@:3}"; }

# launch MODULE STORE DIR FOLDER MARK OPTION...: starts MODULE. Once MARK exists in DIR, DIR is copied to FOLDER in STORE.
launch() {
  local module=$1 where=("${@:2:4}")
  shift 5
  [[ $(state) != new ]] || { echo "tpu/worker.sh: not set up: tpu/setup.sh" >&2 && exit 2; }
  [[ $(state) != running ]] || { echo "tpu/worker.sh: runs already; tpu/run.sh --stop ends it" >&2 && exit 2; }
  nothing_checks || { echo "tpu/worker.sh: $CHECKS" >&2 && exit 2; }
  # Also stop the timer's service: a copy that still runs would hold the unit name that the next one needs.
  sudo systemctl stop "$UNIT" "$UNIT-copy.timer" "$UNIT-copy.service" 2>/dev/null || true
  sudo systemctl reset-failed "$UNIT" "$UNIT-copy" 2>/dev/null || true
  printf 'STORE=%q DIR=%q FOLDER=%q MARK=%q\n' "${where[@]}" >.run
  if is_first; then
    fetch
    sudo systemd-run --quiet --unit="$UNIT-copy" --uid="$USER" --setenv=HOME="$HOME" --on-active=60 --on-unit-active=60 \
      --timer-property=AccuracySec=1s "$ROOT/tpu/worker.sh" copy
  fi
  # --remain-after-exit: the exit code stays readable. "mixed": SIGTERM goes to the trainer alone, so that it can save.
  # After=: at a shutdown the unit stops before the network, which saving needs.
  # LimitMEMLOCK: TPUs access locked host memory; systemd's default limit is 8 MB.
  sudo systemd-run --quiet --unit="$UNIT" --remain-after-exit --uid="$USER" --working-directory="$ROOT" \
    --setenv=HOME="$HOME" --setenv=JAX_COMPILATION_CACHE_DIR="${where[0]}/compiled" \
    --property=EnvironmentFile="-$HOME/secrets/segzero.env" --property=After="network.target network-online.target" \
    --property=KillMode=mixed --property=TimeoutStopSec=300 --property=LimitMEMLOCK=infinity \
    --property=StandardOutput=append:"$ROOT/train.log" --property=StandardError=append:"$ROOT/train.log" \
    --property=ExecStopPost="$ROOT/tpu/worker.sh copy" \
    "$ROOT/.venv/bin/python" -m "$module" "$@"
}

# Prints this machine's worker number in the slice, which is also JAX's process number.
number() {
  curl -sf --max-time 10 --retry 5 -H Metadata-Flavor:Google "$METADATA" || {
    echo "tpu/worker.sh: the metadata server does not tell which worker this is; try again" >&2
    exit 1
  }
}

# Only process 0 writes files.
is_first() {
  local mine
  mine=$(number) || exit 1
  [[ $mine == 0 ]]
}

# Reads the local and the stored folder of the files. Units started by an earlier commit recorded only a run's.
read_place() {
  # shellcheck disable=SC1091
  source .run
  DIR=${DIR-$RUN_DIR} FOLDER=${FOLDER-run} MARK=${MARK-config.yaml}
}

# Fetches the files from the bucket if this machine has none, as after a preemption. All or none of them, since the local
# folder is copied back to the bucket.
fetch() {
  read_place
  [[ ! -e $DIR/$MARK ]] || return 0
  local answer
  if ! answer=$(gcloud storage ls "$STORE/$FOLDER/" 2>&1); then
    [[ $answer == *'matched no objects'* ]] && return 0
    printf 'tpu/worker.sh: %s: cannot be read now, so nothing is started: %s\n' "$STORE/$FOLDER" "$answer" >&2
    exit 1
  fi
  rm -rf "$DIR.part"
  mkdir -p "$DIR.part"
  gcloud storage rsync --recursive "$STORE/$FOLDER" "$DIR.part"
  rm -rf "$DIR"
  mv "$DIR.part" "$DIR"
}

# Copies the files to the bucket, except checkpoints, which the trainer writes there itself.
copy() {
  read_place
  is_first && [[ -e $DIR/$MARK ]] || return 0
  gcloud storage rsync --quiet --recursive --exclude='^checkpoints/.*' "$DIR" "$STORE/$FOLDER"
}

case ${1-} in
  install) install "${@:2}" ;;
  preflight) preflight "${@:2}" ;;
  start) start "${@:2}" ;;
  evaluate) evaluate "${@:2}" ;;
  stop) stop ;;
  state) report ;;
  number) number ;;
  fetch) fetch ;;
  copy) copy ;;
  *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
