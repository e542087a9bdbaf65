#!/usr/bin/env bash
# tpu/setup.sh: brings this checkout's last commit, the pinned packages and the data onto every machine of the slice.
#
# Again after a new commit: what is there already is kept, but files that the commit has no more. Files named in SECRETS go to ~/secrets; of the sets in DATA, those that
# lie in the bucket's data/question_set are copied from there, others are built from the hub.

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
  [[ -z $(git -C "$HERE/.." status --porcelain) ]] || say "the working tree has changes: the last commit is what goes"
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
