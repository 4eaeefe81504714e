#!/usr/bin/env bash
# Slurm: an array job encodes the parts of a dataset, and a job that depends on it assembles them. Run it, without sbatch,
# from the project's directory on the login node; OUT must be on a file system that all nodes mount at the same path:
#   PARTS=32 configs/launch/make_shards.sh csv clips.csv shards/mine --codec h264
# Set options of sbatch by SBATCH_PARTITION, SBATCH_ACCOUNT, ... If a part fails, the last job is canceled; rerun the same
# command to continue, encoded clips are kept.
#SBATCH --job-name=make_shards
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

case ${MAKE_SHARDS_STEP:-submit} in
  submit)
    last=$((${PARTS:-16} - 1))
    array=$(sbatch --parsable --export=ALL,MAKE_SHARDS_STEP=encode --array="0-$last" "$0" "$@") || exit
    exec sbatch --export=ALL,MAKE_SHARDS_STEP=assemble --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes \
      "$0" "$@"
    ;;
  encode)
    part=(--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
    ;;
  assemble)
    part=()
    ;;
esac
tools/make_shards.py "$@" --workers "${SLURM_CPUS_PER_TASK:-1}" "${part[@]}"
status=$?
if [ "$status" -eq 3 ]; then # Some clips were rejected, see rejected.csv; the last job depends on status 0.
  exit 0
fi
exit "$status"
