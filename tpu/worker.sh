#!/usr/bin/env bash
# tpu/worker.sh install REVISION [STORED SET...] | preflight OPTION... | start STORE RUN_DIR OPTION... |
# evaluate STORE OUT OPTION... | stop | state | number | fetch | copy: one machine's part.
#
# The commands beside it call it on every machine. systemd keeps the training, or the evaluation: it outlives the connection, is
# told to stop when the machine is about to be taken away, and leaves its exit code behind.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UNIT=segzero
UV_VERSION=0.9.7
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
cd "$ROOT"

# Packages, then data sets. What says that the machine is set up comes last: until then it counts as new, also where it was set
# up for an earlier commit, whose packages may be others.
install() {
  local set
  # Where a connection breaks, gcloud asks again while the first is still at it.
  exec 8>>.installing
  flock 8
  rm -f .revision
  remove_old_files
  install_packages
  for set in "${@:3}"; do bring "$2" "$set"; done
  echo "$1" >.revision
}

# What an earlier commit brought and this one has no more: unpacking only adds.
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

# bring STORED SET: a data set into data.dir. Where it lies in the bucket as it was built, it is copied, unless there is one of
# its name: whole or not at all, by its checksums. Else it is built, which it can be from the hub alone.
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

# What systemd knows of the training, as one word; "failed" has the exit code with it, 128 + N where signal N ended it.
state() {
  local active sub how code
  active=$(systemctl show "$UNIT" --property=ActiveState --value)
  sub=$(systemctl show "$UNIT" --property=SubState --value)
  how=$(systemctl show "$UNIT" --property=ExecMainCode --value)
  code=$(systemctl show "$UNIT" --property=ExecMainStatus --value)
  # CLD_KILLED and CLD_DUMPED of waitid(2). The status is the signal then: 2 and 5 would be read as exit codes.
  [[ $how != [23] ]] || code=$((128 + code))
  case $active/$sub in
    # Also while another commit is being set up.
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

# What this machine says of itself. An evaluation is named: tpu/babysit.sh looks after the training.
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

# Beside a training the same ports and chips would be asked for, and the training would take that for its own end. What
# checks holds the lock until it ends, also where whoever asked for it has hung up.
preflight() {
  exec 9>>.checking
  flock --nonblock 9 || { echo "tpu/worker.sh: $CHECKS" >&2 && exit 2; }
  [[ $(state) != running ]] || { echo "tpu/worker.sh: runs already; tpu/run.sh --stop ends it" >&2 && exit 2; }
  echo "$$" >.checking
  run segzero_jax.preflight "$@"
}
CHECKS="a preflight still runs; tpu/run.sh --stop ends it"

nothing_checks() { (flock --nonblock 9) 9>>.checking; }

# A training that was started since the machine was; systemd has forgotten any other. And a preflight.
stop() {
  nothing_checks || kill "$(cat .checking)" || true
  local was
  was=$(state)
  [[ $(systemctl show "$UNIT" --property=LoadState --value) == not-found ]] || sudo systemctl stop "$UNIT"
  # systemctl calls that a success, however it has ended.
  [[ $was != running || $(state) != failed* ]] || {
    echo "tpu/worker.sh: ended with $(state), so its last step may not be saved; tpu/logs.sh says more" >&2
    exit 1
  }
}

# Runs a module to its end with what the training gets: ~/secrets/segzero.env as systemd reads it, NAME=value a line, in
# quotes or not.
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

# launch MODULE STORE DIR FOLDER MARK OPTION...: its files, in DIR once MARK is there, are kept in FOLDER of the bucket's STORE.
launch() {
  local module=$1 where=("${@:2:4}")
  shift 5
  [[ $(state) != new ]] || { echo "tpu/worker.sh: not set up: tpu/setup.sh" >&2 && exit 2; }
  [[ $(state) != running ]] || { echo "tpu/worker.sh: runs already; tpu/run.sh --stop ends it" >&2 && exit 2; }
  nothing_checks || { echo "tpu/worker.sh: $CHECKS" >&2 && exit 2; }
  # The timer's service as well: a copy that still runs would have the name that the next one is to get.
  sudo systemctl stop "$UNIT" "$UNIT-copy.timer" "$UNIT-copy.service" 2>/dev/null || true
  sudo systemctl reset-failed "$UNIT" "$UNIT-copy" 2>/dev/null || true
  printf 'STORE=%q DIR=%q FOLDER=%q MARK=%q\n' "${where[@]}" >.run
  if is_first; then
    fetch
    sudo systemd-run --quiet --unit="$UNIT-copy" --uid="$USER" --setenv=HOME="$HOME" --on-active=60 --on-unit-active=60 \
      --timer-property=AccuracySec=1s "$ROOT/tpu/worker.sh" copy
  fi
  # --remain-after-exit: the exit code can still be read. "mixed": first the trainer alone is told, so that it can save.
  # After=: at a shutdown it ends before the network does, which saving needs.
  # LimitMEMLOCK: TPUs reach into the host's memory, which is locked for that; systemd's own limit is 8 MB.
  sudo systemd-run --quiet --unit="$UNIT" --remain-after-exit --uid="$USER" --working-directory="$ROOT" \
    --setenv=HOME="$HOME" --setenv=JAX_COMPILATION_CACHE_DIR="${where[0]}/compiled" \
    --property=EnvironmentFile="-$HOME/secrets/segzero.env" --property=After="network.target network-online.target" \
    --property=KillMode=mixed --property=TimeoutStopSec=300 --property=LimitMEMLOCK=infinity \
    --property=StandardOutput=append:"$ROOT/train.log" --property=StandardError=append:"$ROOT/train.log" \
    --property=ExecStopPost="$ROOT/tpu/worker.sh copy" \
    "$ROOT/.venv/bin/python" -m "$module" "$@"
}

# Which worker of the slice this is; JAX numbers processes by it as well.
number() {
  curl -sf --max-time 10 --retry 5 -H Metadata-Flavor:Google "$METADATA" || {
    echo "tpu/worker.sh: the metadata server does not say which worker this is; once more" >&2
    exit 1
  }
}

# Process 0 alone writes files.
is_first() {
  local mine
  mine=$(number) || exit 1
  [[ $mine == 0 ]]
}

# Where the files are, and where they are kept; what an earlier commit has started had no other than a run's.
read_place() {
  # shellcheck disable=SC1091
  source .run
  DIR=${DIR-$RUN_DIR} FOLDER=${FOLDER-run} MARK=${MARK-config.yaml}
}

# The files from the bucket, where this machine has none: it replaces one that was taken away. All or none of them, for what
# lies here is what is copied to the bucket.
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

# The files into the bucket, checkpoints excepted, which the trainer writes there itself.
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
