#!/usr/bin/env bash
# A TPU slice of a GKE cluster, by XPK (pip install xpk), which makes the JobSet and sets what JAX looks for.
#
#   CLUSTER=my-cluster TYPE=v5litepod-16 IMAGE=gcr.io/me/jaxinfer NAME=run1 bash configs/launch/gke_xpk.sh \
#     generate --prompts /data/prompts.jsonl --out /data/answers.jsonl --model MODEL --mesh data=2,model=8
#
# A pod that dies restarts all of them, at most RESTARTS times; the command then goes on from --out, which must be on
# storage that outlives the pods.
set -euo pipefail
command="jaxinfer $(printf '%q ' "$@")--distributed auto"
exec xpk workload create --cluster "$CLUSTER" --workload "$NAME" --tpu-type "$TYPE" --docker-image "$IMAGE" \
  --max-restarts "${RESTARTS:-3}" --command "$command"
