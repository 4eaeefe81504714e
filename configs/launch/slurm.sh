#!/usr/bin/env bash
# Slurm: one task per GPU; distav reads the ranks from Slurm. Submit from the project's directory, with any configuration:
#   sbatch --nodes 4 configs/launch/slurm.sh --config configs/multinode.yaml data.root=/data/vggsound
# Options of sbatch replace those below, such as --ntasks-per-node=4 --gpus-per-node=4. Five minutes before the time limit,
# SIGUSR1 makes the ranks of this job write a checkpoint and exit with status 75; the job is then requeued. A run can
# resume on any number of nodes.
#SBATCH --job-name=distav
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# A rank that has failed is named by the others, which then end by themselves.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -m distav.train "$@"
status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
