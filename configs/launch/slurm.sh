#!/usr/bin/env bash
# Slurm: one task per node starts DeepSpeed's launcher there, without ssh. Submit from the project's directory:
#   sbatch --nodes 4 configs/launch/slurm.sh data.root=/data/vggsound
# Five minutes before the time limit, SIGUSR1 makes the ranks write a checkpoint and exit with status 75; the job is then
# requeued. A run can resume on any number of nodes.
#SBATCH --job-name=distav
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

gpus=${SLURM_GPUS_ON_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
hostfile=$PWD/hostfile.$SLURM_JOB_ID
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$gpus/" > "$hostfile"
trap 'rm -f "$hostfile"' EXIT
# The signal goes to the ranks alone; it would end a launcher.
signaled=
trap 'signaled=yes; srun --overlap --ntasks-per-node=1 pkill -USR1 -f "train.py --local_rank"' USR1

export HOSTFILE=$hostfile HEAD_NODE=$head
srun --kill-on-bad-exit=0 bash -c '
  exec deepspeed --hostfile "$HOSTFILE" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$HEAD_NODE" \
    --master_port 29500 distav/train.py --config configs/multinode.yaml "$@"' distav "$@" &
run=$!
wait "$run"
status=$?
if [ "$status" -gt 128 ] && [ -n "$signaled" ]; then # The signal interrupted wait, not the run.
  wait "$run"
  status=$?
fi
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
