# shellcheck shell=bash disable=SC2034
# Settings of the commands in tpu/. Copy this file to tpu/settings.sh, which git ignores, and fill it in; or name another file
# with --settings FILE. Bash reads it: no spaces around "=", quotes around values with spaces.

PROJECT=my-project
ZONE=us-west4-a

# The name of the slice, its run and their folder in the bucket.
NAME=segzero-7b

# Generation and topology, as `python -m segzero_jax.plan --topology` takes them: v5e:4x4, v5p:2x2x4, v6e:4x4; or v4:2x2x4,
# which plan does not know.
TPU=v5e:4x4

# "yes": Spot, which costs less and may be preempted at any moment. "no": on demand.
SPOT=yes

# Runs are copied to and restored from this bucket; checkpoints are written to it.
BUCKET=gs://my-bucket

# The service account that the machines act as (README: accounts). Required: the default one has far too many permissions.
SERVICE_ACCOUNT=segzero-tpu@my-project.iam.gserviceaccount.com

# The slice's network; the reward server should be in the same one.
NETWORK=default
SUBNETWORK=

# "no": machines without public addresses. Packages then need Cloud NAT in the network, and ssh needs another way in.
PUBLIC_ADDRESSES=yes

# Extra flags for gcloud's ssh and scp, such as --internal-ip or, for v5p and v6e, --tunnel-through-iap.
SSH_FLAGS=()

# Files that each machine needs in ~/secrets: the reward server's certificate authority, a token. Data builds and the training
# get the variables in a file named segzero.env, such as HF_TOKEN, one NAME=value a line.
SECRETS=()

# Data sets that tpu/setup.sh brings to each machine: names that `python -m segzero_jax.data.build` knows from the hub, or your
# own sets, built and copied to BUCKET/data/question_set/NAME (README: data of one's own).
DATA=(refCOCOg_9k_840)

# Options of `python -m segzero_jax.train`, except run.dir and the checkpoint directory. Keys after the "--" of tpu/run.sh
# override those here; --config is given once, here.
TRAIN=(--config configs/seg_zero_7b.yaml --mesh=4x4)
