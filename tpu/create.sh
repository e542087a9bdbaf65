#!/usr/bin/env bash
# tpu/create.sh [--wait]: requests the slice.
#
# v4 and v5e wait in Cloud TPU's queue until there is capacity; v5p and v6e are a managed instance group, which keeps trying.
# Returns at once, or with --wait once the slice is ready. An existing slice is left as it is; a template or policy left behind
# by an earlier attempt is recreated.

# shellcheck source=tpu/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
begin "$@"
wait_for_it=''
for option in ${REST[@]+"${REST[@]}"}; do
  [[ $option == --wait ]] || fail "$option: unexpected; --help lists the options"
  wait_for_it=yes
done

create_queued() {
  local flags=(--zone="$ZONE" --project="$PROJECT" --node-id="$NAME" --network="$NETWORK")
  flags+=(--service-account="$SERVICE_ACCOUNT" --scopes=https://www.googleapis.com/auth/cloud-platform)
  if [[ $GENERATION == v4 ]]; then
    flags+=(--type=v4 --topology="$TOPOLOGY" --runtime-version=tpu-ubuntu2204-base)
  else
    flags+=(--accelerator-type="v5litepod-$CHIPS" --runtime-version=v2-alpha-tpuv5-lite)
  fi
  [[ $SUBNETWORK ]] && flags+=(--subnetwork="$SUBNETWORK")
  [[ $SPOT == yes ]] && flags+=(--spot)
  [[ $PUBLIC_ADDRESSES == no ]] && flags+=(--internal-ips)
  call gcloud compute tpus queued-resources create "$NAME" "${flags[@]}" --async
}

# Leftovers of an earlier attempt may have other settings. A dry run shows every creation.
remove_old() { [[ $DRY_RUN ]] || remove "$@"; }

create_group() {
  local template=(--project="$PROJECT" --network="$NETWORK" --service-account="$SERVICE_ACCOUNT" --scopes=cloud-platform)
  local group=(--zone="$ZONE" --project="$PROJECT" --template="$NAME" --size="$HOSTS" --default-action-on-vm-failure=do-nothing)
  local machine=ct5p-hightpu-4t
  [[ $GENERATION == v6e ]] && machine=ct6e-standard-4t
  [[ $TPU == v6e:1x1 ]] && machine=ct6e-standard-1t
  [[ $SUBNETWORK ]] && template+=(--subnet="$SUBNETWORK" --region="$REGION")
  [[ $SPOT == yes ]] && template+=(--provisioning-model=SPOT --instance-termination-action=STOP)
  [[ $PUBLIC_ADDRESSES == no ]] && template+=(--no-address)
  remove_old 'compute instance-templates'
  if ((HOSTS > 1)); then
    group+=(--workload-policy="projects/$PROJECT/regions/$REGION/resourcePolicies/$NAME")
    remove_old 'compute resource-policies' --region="$REGION"
    call gcloud compute resource-policies create workload-policy "$NAME" --region="$REGION" --project="$PROJECT" \
      --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
  fi
  call gcloud compute instance-templates create "$NAME" "${template[@]}" --machine-type="$machine" \
    --maintenance-policy=TERMINATE --boot-disk-size=200GB --image-project=ubuntu-os-accelerator-images \
    --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  call gcloud compute instance-groups managed create "$NAME" "${group[@]}"
}

# A slice made before TPU was changed in the settings would keep costing money beside the new one, under the same name.
refuse_another() {
  local other=(compute tpus queued-resources)
  [[ $ENGINE == group ]] || other=(compute instance-groups managed)
  ! there gcloud "${other[@]}" describe "$NAME" --zone="$ZONE" ||
    fail "$NAME: there is a slice of this name, made for another TPU than $TPU; tpu/delete.sh deletes it"
}

state=absent
[[ $DRY_RUN ]] || state=$(slice_state)
case $state in
  absent)
    [[ $DRY_RUN ]] || refuse_another
    if [[ $ENGINE == queue ]]; then create_queued; else create_group; fi
    ;;
  unknown) exit 1 ;;
  lost) fail "$NAME: was taken away or is broken; tpu/delete.sh, then tpu/create.sh, or tpu/babysit.sh" ;;
  *) say "$NAME: is there already, $state" ;;
esac
[[ $wait_for_it && ! $DRY_RUN ]] || exit 0
until state=$(slice_state) && [[ $state == ready ]]; do
  [[ $state != lost && $state != absent ]] || fail "$NAME: $state; tpu/status.sh says more"
  sleep "${TPU_LOOK_S:-30}"
done
say "$NAME: ready"
