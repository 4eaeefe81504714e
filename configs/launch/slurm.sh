#!/usr/bin/env bash
# Slurm: one task a node starts DeepSpeed's launcher there, without ssh. Submit from the project's folder:
#   sbatch --nodes 4 configs/launch/slurm.sh data.root=/data/vggsound
# A job that ran out of time goes on when it is submitted again.
#SBATCH --job-name=distav
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
set -euo pipefail

gpus=${SLURM_GPUS_ON_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
hostfile=$PWD/hostfile.$SLURM_JOB_ID
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$gpus/" > "$hostfile"
trap 'rm -f "$hostfile"' EXIT

export HOSTFILE=$hostfile HEAD_NODE=$head
srun --kill-on-bad-exit=1 bash -c '
  exec deepspeed --hostfile "$HOSTFILE" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$HEAD_NODE" \
    --master_port 29500 distav/train.py --config configs/multinode.yaml "$@"' distav "$@"
