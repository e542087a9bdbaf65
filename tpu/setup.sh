#!/usr/bin/env bash
# tpu/setup.sh: brings this checkout's last commit, the pinned packages and the data onto every machine of the slice.
#
# Repeat it after a new commit: existing files are kept, except those that the commit no longer has. Files named in SECRETS go to
# ~/secrets. Sets in DATA are copied from the bucket's data/question_set if they are there, otherwise built from the hub.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
no_more_options

for secret in ${SECRETS[@]+"${SECRETS[@]}"}; do
  [[ -f $secret ]] || fail "$SETTINGS: SECRETS: $secret: no such file"
done
code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
archive=$code/$REMOTE.tar.gz
if [[ $DRY_RUN ]]; then
  archive=$REMOTE.tar.gz
  call git archive --prefix="$REMOTE/" --output="$archive" HEAD
else
  [[ -z $(git -C "$HERE/.." status --porcelain) ]] || say "the working tree has changes: only the last commit is installed"
  git -C "$HERE/.." archive --prefix="$REMOTE/" --output="$archive" HEAD
fi
revision=$(git -C "$HERE/.." rev-parse HEAD)
[[ $DRY_RUN ]] && revision=REVISION

to_workers "$archive" .
if ((${#SECRETS[@]})); then
  on_workers 'mkdir -p -m 700 secrets'
  to_workers "${SECRETS[@]}" secrets/
fi
install="$REMOTE/tpu/worker.sh install $revision $BUCKET/data"
for set in ${DATA[@]+"${DATA[@]}"}; do install+=" $(printf %q "$set")"; done
on_workers "tar -xzf $REMOTE.tar.gz && $install"
