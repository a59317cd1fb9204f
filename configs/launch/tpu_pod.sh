#!/usr/bin/env bash
# One program on every host of a TPU slice, by gcloud: each host runs the same command, and JAX finds the others.
#
#   NAME=my-v5e-16 ZONE=us-west4-a bash configs/launch/tpu_pod.sh \
#     generate --prompts prompts.jsonl --out answers.jsonl --model MODEL --mesh data=2,model=8
#
# The mesh is of all chips of the slice. Only the first host prints and writes. When a host dies the others end within
# a minute (exit status 3): run the same line again, and it goes on from --out.
set -euo pipefail
command="jaxinfer $(printf '%q ' "$@")--distributed auto"
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$command"
