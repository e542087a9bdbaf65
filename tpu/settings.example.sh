# shellcheck shell=bash disable=SC2034
# What the commands in tpu/ work on. Copy it to tpu/settings.sh, which git ignores, and fill it in; or name another file with
# --settings FILE. Bash reads it: no spaces around "=", quotes around what has spaces.

PROJECT=my-project
ZONE=us-west4-a

# Names the slice, its run and their folder in the bucket.
NAME=segzero-7b

# Generation and topology, as `python -m segzero_jax.plan --topology` takes them: v5e:4x4, v5p:2x2x4, v6e:4x4; or v4:2x2x4,
# which it does not know.
TPU=v5e:4x4

# "yes": Spot, which costs less and may be taken away at any moment. "no": on demand.
SPOT=yes

# Runs are copied there and come back from there; checkpoints are written there.
BUCKET=gs://my-bucket

# The account that the machines act as (README: accounts); needed, because the default one may do far too much.
SERVICE_ACCOUNT=segzero-tpu@my-project.iam.gserviceaccount.com

# Of the slice; the reward server should be in the same.
NETWORK=default
SUBNETWORK=

# "no": machines without public addresses. The network then needs Cloud NAT for packages, and ssh another way in.
PUBLIC_ADDRESSES=yes

# More flags for gcloud's ssh and scp, such as --internal-ip or, for v5p and v6e, --tunnel-through-iap.
SSH_FLAGS=()

# Files that each machine needs in ~/secrets: the reward server's authority, a token. What builds data and trains has the
# variables of one named segzero.env, such as HF_TOKEN, one NAME=value a line.
SECRETS=()

# Data sets that tpu/setup.sh brings to each machine: names that `python -m segzero_jax.data.build` knows from the hub, or of
# one's own that were built and copied to BUCKET/data/question_set/NAME (README: data of one's own).
DATA=(refCOCOg_9k_840)

# What is trained: options of `python -m segzero_jax.train`, but for run.dir and where checkpoints go. Keys after the "--" of
# tpu/run.sh take the place of those here; --config is given once, here.
TRAIN=(--config configs/seg_zero_7b.yaml --mesh=4x4)
