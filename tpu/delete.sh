#!/usr/bin/env bash
# tpu/delete.sh: deletes the slice NAME in ZONE and everything that tpu/create.sh made for it. The bucket stays.
#
# The training is not asked to save first: tpu/run.sh --stop does that.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
no_more_options

# Resources of both engines: TPU may have been changed in the settings since.
remove 'compute tpus queued-resources' --zone="$ZONE"
remove 'compute instance-groups managed' --zone="$ZONE"
remove 'compute instance-templates'
remove 'compute resource-policies' --region="$REGION"
[[ $DRY_RUN ]] || say "$NAME: nothing is left of it in $ZONE of $PROJECT but $STORE"
