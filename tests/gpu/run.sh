#!/usr/bin/env bash
# Proves the GPU path on one GPU; README.md beside this file says what each part shows.
#
#   tests/gpu/run.sh OUT [PART ...]               8 minutes; writes logs, JSON and summary.json to OUT
#   DEVICE=cpu tests/gpu/run.sh OUT [PART ...]    rehearses the same script on a CPU with small sizes
#
# PYTHON names the interpreter and TIME_S the seconds in all. exit status: 0 all passed, 3 a threshold failed,
# 1 a part failed or did not run.
set -euo pipefail
out=$(realpath -m "${1:?usage: tests/gpu/run.sh OUT [PART ...]}")
time_s=${TIME_S:-480}
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# The runner keeps to the time by itself; this ends it where it cannot.
exec timeout --foreground -k 20 $((time_s + 40)) \
  "${PYTHON:-python3}" -m tests.gpu.proof "$out" "${@:2}" --device "${DEVICE:-cuda}" --seconds "$time_s"
