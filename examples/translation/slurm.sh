#!/usr/bin/env bash
#SBATCH --job-name=soft_beam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Trains one model on several machines: sbatch slurm.sh RECIPE pretrained|control|soft_beam [options]
#
# RECIPE is a recipe's folder, whose prepare.sh has been run into RUN, on a disk that all machines share.  A job that
# is pre-empted or has come to its time limit is queued again and goes on from its last checkpoint.
set -euo pipefail

RECIPE=$1
shift
export NODES=$SLURM_NNODES
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p):$((20000 + SLURM_JOB_ID % 20000))
export MASTER
requeue() { scontrol requeue "$SLURM_JOB_ID" && exit; }
trap requeue USR1
# An exclusive job has all GPUs of a node, but its step those that were asked for.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c \
  'NODE_RANK=$SLURM_NODEID PROCESSES=${SLURM_GPUS_ON_NODE:-8} exec bash "$0/train.sh" "$@"' "$RECIPE" "$@" &
wait $! || {
  status=$?
  # Where pre-emption has a grace time, SLURM ends the tasks first, which would be a failure of the job.
  [[ $(scontrol show job "$SLURM_JOB_ID") != *PreemptTime=[0-9]* ]] || requeue
  exit "$status"
}
