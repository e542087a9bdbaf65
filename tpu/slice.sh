# shellcheck shell=bash disable=SC2034
# Sourced by the commands in this folder: settings, the resources of a slice, and access to its machines.
#
# Two engines make slices. v4 and v5e are queued resources of the Cloud TPU API; v5p and v6e are managed instance groups of
# Compute Engine, with a workload policy that makes one slice of their machines.

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The clone's folder on each machine, below the user's home.
REMOTE=segzero-jax

# A machine that vanishes closes no connection: without these timeouts ssh would wait for it forever.
PATIENCE=(-oConnectTimeout=20 -oServerAliveInterval=15 -oServerAliveCountMax=4)

DRY_RUN='' SETTINGS=${TPU_SETTINGS:-$HERE/settings.sh} REST=()

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# The comment at the head of a command is its help.
help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  printf '\n  --settings FILE  the settings of the slice [tpu/settings.sh]\n  --dry-run        print what would be called; call nothing\n  --help\n'
}

# Reads the options that all commands have and leaves the others in REST. Then reads and checks the settings.
begin() {
  while (($#)); do
    case $1 in
      --help | -h) help && exit 0 ;;
      --dry-run) DRY_RUN=yes ;;
      --settings)
        (($# > 1)) || fail "--settings: expected a file"
        SETTINGS=$2 && shift
        ;;
      *) REST+=("$1") ;;
    esac
    shift
  done
  read_settings
  [[ $DRY_RUN ]] || command -v gcloud >/dev/null || fail "gcloud: not found; https://cloud.google.com/sdk/docs/install has it"
}

no_more_options() { ((${#REST[@]} == 0)) || fail "${REST[0]}: unexpected; --help lists the options"; }

# after_dashes WHAT: leaves in REST the options after "--", such as those of the training. Nothing may come before "--".
after_dashes() {
  ((${#REST[@]})) || return 0
  [[ ${REST[0]} == -- ]] || fail "${REST[0]}: unexpected; options of the $1 come after --"
  REST=("${REST[@]:1}")
}

read_settings() {
  [[ -f $SETTINGS ]] || fail "$SETTINGS: no such file; copy tpu/settings.example.sh to tpu/settings.sh and fill it in"
  PROJECT='' ZONE='' NAME='' TPU='' SPOT=yes BUCKET='' SERVICE_ACCOUNT='' NETWORK=default SUBNETWORK='' PUBLIC_ADDRESSES=yes
  SSH_FLAGS=() SECRETS=() DATA=() TRAIN=()
  # A separate bash: before "||" errexit is off, and bash would continue after a bad line such as SPOT = no.
  local problem
  problem=$(bash -ec 'source "$1"' - "$SETTINGS" 2>&1 >/dev/null) || fail "$SETTINGS: bash cannot read it: ${problem##*$'\n'}"
  # shellcheck source=tpu/settings.example.sh
  source "$SETTINGS"
  export TPU_SETTINGS=$SETTINGS
  local key
  for key in PROJECT ZONE NAME TPU BUCKET SERVICE_ACCOUNT; do
    [[ ${!key} ]] || fail "$SETTINGS: $key is empty; tpu/settings.example.sh says what it is"
  done
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "$SETTINGS: ZONE=$ZONE: expected a zone such as us-west4-a"
  [[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "$SETTINGS: NAME=$NAME: expected small letters, digits and dashes, 40 at most"
  [[ $BUCKET =~ ^gs://[a-z0-9][a-z0-9._-]+[a-z0-9]$ ]] || fail "$SETTINGS: BUCKET=$BUCKET: expected gs://NAME"
  for key in SPOT PUBLIC_ADDRESSES; do
    [[ ${!key} == yes || ${!key} == no ]] || fail "$SETTINGS: $key=${!key}: expected yes or no"
  done
  REGION=${ZONE%-*} RUN_DIR=runs/$NAME STORE=$BUCKET/$NAME
  read_tpu
  [[ $ENGINE != queue || " ${SSH_FLAGS[*]-} " != *" --tunnel-through-iap "* ]] ||
    fail "$SETTINGS: SSH_FLAGS: --tunnel-through-iap is not known to gcloud for $TPU; from a machine in the network: --internal-ip"
}

# Derives engine, chips and hosts from TPU=v5e:4x4. Machines hold four chips; a v5e slice of up to eight is one machine.
read_tpu() {
  GENERATION=${TPU%%:*} TOPOLOGY=${TPU#*:}
  local expected="expected v4:AxBxC, v5e:AxB, v5p:AxBxC or v6e:AxB, such as v5e:4x4"
  case $GENERATION in
    v4 | v5p) [[ $TOPOLOGY =~ ^[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$ ]] || fail "$SETTINGS: TPU=$TPU: $expected" ;;
    v5e | v6e) [[ $TOPOLOGY =~ ^(1x1|2x2|2x4|4x4|4x8|8x8|8x16|16x16)$ ]] || fail "$SETTINGS: TPU=$TPU: $expected; there are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16" ;;
    *) fail "$SETTINGS: TPU=$TPU: $expected" ;;
  esac
  CHIPS=$((${TOPOLOGY//x/*}))
  if [[ $GENERATION == v4 || $GENERATION == v5p ]] && ((CHIPS % 4)); then
    fail "$SETTINGS: TPU=$TPU: expected a multiple of four chips, such as 2x2x1: a machine has four"
  fi
  HOSTS=$(((CHIPS + 3) / 4))
  ENGINE=group
  [[ $GENERATION == v4 || $GENERATION == v5e ]] && ENGINE=queue
  [[ $GENERATION == v5e && $CHIPS -le 8 ]] && HOSTS=1
  return 0
}

# Sets OPTIONS for the trainer: TRAIN of the settings, the given options, and the run's directories, which follow from NAME.
train_options() {
  OPTIONS=(${TRAIN[@]+"${TRAIN[@]}"} "$@")
  not_ours --run.dir ${OPTIONS[@]+"${OPTIONS[@]}"}
  not_ours --run.checkpoint_dir ${OPTIONS[@]+"${OPTIONS[@]}"}
  OPTIONS+=(--run.dir="$RUN_DIR" --run.checkpoint_dir="$STORE/checkpoints")
}

# not_ours OPTION GIVEN...: refuses OPTION, since the folder of a run or an evaluation is what is copied to the bucket.
not_ours() {
  local option
  for option in "${@:2}"; do
    [[ $option != "$1" && $option != "$1="* ]] || fail "$option: where files go follows from NAME; take another NAME"
  done
}

# Runs a command, or in a dry run prints it, quoted for a shell.
call() {
  if [[ ! $DRY_RUN ]]; then
    "$@"
    return
  fi
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,-]+$ ]] || word=\'${word//\'/\'\\\'\'}\'
    words+=("$word")
  done
  echo "${words[*]}"
}

# Whether gcloud can describe a resource; a dry run assumes that it exists. Ends the command if gcloud fails otherwise.
there() {
  [[ $DRY_RUN ]] && return 0
  local answer
  answer=$(asked "$@" --format=none)
  if [[ $answer == unknown ]]; then
    say "$NAME: left as it is, since gcloud cannot tell what exists; run the same command again"
    exit 1
  fi
  [[ $answer != absent ]]
}

# remove KIND FLAG...: deletes the resource NAME, if it exists; FLAG... go to both describe and delete.
remove() {
  local words force=()
  read -ra words <<<"$1"
  [[ $1 != *queued-resources ]] || force=(--force)
  shift
  if there gcloud "${words[@]}" describe "$NAME" "$@"; then
    call gcloud "${words[@]}" delete "$NAME" "$@" --project="$PROJECT" --quiet ${force[@]+"${force[@]}"}
  fi
}

# Prints one word for the slice: absent, waiting, ready, lost (preempted or broken), or unknown if gcloud fails.
slice_state() {
  if [[ $ENGINE == queue ]]; then queue_state; else group_state; fi
}

queue_state() {
  local state
  state=$(asked gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)')
  case $state in
    ACTIVE)
      state=$(asked gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)')
      # The request still exists, and would block a new one.
      [[ $state != absent ]] || state=lost
      ;;
    SUSPENDED | FAILED) state=lost ;;
    absent | unknown) ;;
    *) state=waiting ;;
  esac
  case $state in
    READY) echo ready ;;
    CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING) echo waiting ;;
    absent | waiting | lost) echo "$state" ;;
    PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING) echo lost ;;
    # A lost slice is deleted; an unknown state is left to a person.
    *) echo unknown ;;
  esac
}

# Prints in one line Google's reason why there is no slice, or no longer one; nothing if it gives none.
slice_problem() {
  local said
  if [[ $ENGINE == queue ]]; then
    said=$(asked gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state)')
  else
    said=$(asked gcloud compute instance-groups managed list-errors "$NAME" --zone="$ZONE" --limit=1 --format='value(error.code,error.message)')
  fi
  [[ ! $said || $said == absent || $said == unknown ]] || printf '%s\n' "${said//$'\n'/ }"
}

group_state() {
  local states
  states=$(asked gcloud compute instance-groups managed list-instances "$NAME" --zone="$ZONE" --format='value(instanceStatus)')
  case $states in
    absent | unknown) echo "$states" ;;
    *STOP* | *TERMINATED* | *SUSPEND*) echo lost ;;
    *) group_size "$(grep -c '^RUNNING$' <<<"$states")" "$(grep -c . <<<"$states")" ;;
  esac
}

# group_size RUNNING ALL: prints ready or waiting; warns of a group made for another TPU, which would never be ready.
group_size() {
  if (($1 == HOSTS)); then
    echo ready
  else
    (($1 == 0 || $1 < $2)) || say "$NAME: $1 machines run, TPU=$TPU has $HOSTS; if TPU was changed: tpu/delete.sh, or change it back"
    echo waiting
  fi
}

# Prints gcloud's output, "absent" for a missing resource, or "unknown" for any other failure, which is reported.
asked() {
  local answer problem
  problem=$(mktemp)
  if answer=$("$@" --project="$PROJECT" 2>"$problem"); then
    printf '%s\n' "$answer"
  # Nothing exists in an API that was never enabled.
  elif grep -qE "NOT_FOUND|/$NAME' was not found|has not been used in project|SERVICE_DISABLED|API .* not enabled" "$problem"; then
    echo absent
  else
    say "gcloud: $(grep -m 1 ERROR "$problem" || tail -n 1 "$problem")"
    echo unknown
  fi
  rm -f "$problem"
}

# Prints the names of a group's machines, all or none; gcloud itself addresses those of a queued resource.
machines() {
  if [[ $DRY_RUN ]]; then
    echo MACHINE
    return
  fi
  local list count
  list=$(gcloud compute instance-groups managed list-instances "$NAME" --zone="$ZONE" --project="$PROJECT" \
    --format='value(instance.basename())') || fail "$NAME: gcloud does not tell which machines it has; try again"
  count=$(grep -c . <<<"$list") || true
  ((count == HOSTS)) || fail "$NAME: has $count machines, expected $HOSTS; tpu/status.sh says more"
  printf '%s\n' "$list"
}

# on_workers COMMAND [WORKER]: runs a shell command on all machines at once, or on one of them.
on_workers() {
  local command=$1 worker=${2:-all} list machine children=() child status=0 flags=(${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"})
  local option
  for option in "${PATIENCE[@]}"; do flags+=(--ssh-flag="$option"); done
  [[ $worker == all ]] || ((10#$worker < HOSTS)) || fail "$NAME: no worker $worker; there are $HOSTS"
  if [[ $ENGINE == queue ]]; then
    call gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --project="$PROJECT" "${flags[@]}" \
      --worker="$worker" --command="$command" </dev/null
    return
  fi
  # Names of a group's machines end in random letters: only the machine itself knows its worker number.
  [[ $worker == all ]] || command="[ \"\$($REMOTE/tpu/worker.sh number)\" != $((10#$worker)) ] || $command"
  list=$(machines) || exit 1
  while read -r machine; do
    call gcloud compute ssh "$machine" --zone="$ZONE" --project="$PROJECT" "${flags[@]}" --command="$command" </dev/null &
    children+=($!)
  done <<<"$list"
  for child in "${children[@]}"; do wait "$child" || status=$?; done
  return "$status"
}

# to_workers FILE... FOLDER: copies files to all machines, into a folder below the home directory.
to_workers() {
  local files=("${@:1:$#-1}") folder=${*: -1} list machine option flags=(${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"})
  for option in "${PATIENCE[@]}"; do flags+=(--scp-flag="$option"); done
  flags+=(--zone="$ZONE" --project="$PROJECT")
  if [[ $ENGINE == queue ]]; then
    # One by one: with --worker=all gcloud wants its key in a running ssh-agent, and refuses any other.
    for machine in $(if [[ $DRY_RUN ]]; then echo WORKER; else seq 0 $((HOSTS - 1)); fi); do
      call gcloud compute tpus tpu-vm scp "${files[@]}" "$NAME:$folder" "${flags[@]}" --worker="$machine"
    done
    return
  fi
  list=$(machines) || exit 1
  for machine in $list; do
    call gcloud compute scp "${files[@]}" "$machine:$folder" "${flags[@]}"
  done
}
