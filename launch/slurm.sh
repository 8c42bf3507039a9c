#!/usr/bin/env bash
# launch/multi_node.sh as a Slurm job. Submit it from the repository's root:
#
#   MODEL=... DATASET=... OUTPUT=... sbatch launch/slurm.sh [flags, which override those of multi_node.sh]
#
# Two minutes before the time limit the run gets SIGTERM, saves and exits. The same command continues it from the newest
# checkpoint in OUTPUT (from step 0 if there is none), and so does Slurm by itself where it
# starts the job again: after a node has failed, or scontrol requeue.
#SBATCH --job-name=megatron_gkd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.log
set -euo pipefail

if [ "${1-}" = --check ]; then # layout and memory alone, where this is typed: NNODES=2 bash launch/slurm.sh --check
    NNODES=${NNODES:-2} exec bash "${SLURM_SUBMIT_DIR:-.}/launch/multi_node.sh" "$@"
fi
OUTPUT=${OUTPUT:-output}
export OUTPUT
nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?start this with sbatch}")
export MASTER_ADDR=${nodes%%$'\n'*} # the first node; a pipe into head could end scontrol with SIGPIPE
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
export NNODES=$SLURM_NNODES

# Slurm runs a copy of this file, so the repository is where the job was submitted.
# shellcheck disable=SC2016  # NODE_RANK is expanded on each node
srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$0" "$@"' "$SLURM_SUBMIT_DIR/launch/multi_node.sh" --resume_from_checkpoint latest "$@"
