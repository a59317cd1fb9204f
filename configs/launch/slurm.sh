#!/usr/bin/env bash
# One process a node under Slurm, which tells JAX how many there are and where the first one is.
#
#   sbatch --nodes 4 configs/launch/slurm.sh eval --task perplexity --data text.txt --out scores.jsonl \
#     --model MODEL --mesh data=4,model=8
#
# When a node dies the others end within a minute; --requeue runs the same command again, which goes on from --out.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail
exec srun --kill-on-bad-exit=1 jaxinfer "$@" --distributed auto
