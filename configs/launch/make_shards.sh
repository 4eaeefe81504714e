#!/usr/bin/env bash
# Slurm: an array of jobs encodes the parts of a set, and one that waits for them puts it together. Not by sbatch, but
# from the project's folder on the login node; OUT has to lie where all nodes see it under the same name:
#   PARTS=32 configs/launch/make_shards.sh csv clips.csv shards/mine --codec h264
# Options of sbatch go into SBATCH_PARTITION, SBATCH_ACCOUNT, ... If a part fails, the last job is cancelled; give the
# same command again, and all that was encoded is kept.
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
if [ "$status" -eq 3 ]; then # Some candidates cannot be used; rejected.csv will tell them, and nothing waits for it.
  exit 0
fi
exit "$status"
