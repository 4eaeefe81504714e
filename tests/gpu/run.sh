#!/usr/bin/env bash
# Verifies distav on one GPU; README.md in this directory describes the parts.
#
#   tests/gpu/run.sh OUT [PART ...]               15 minutes at most; writes logs, JSON and summary.json to OUT
#   DEVICE=cpu tests/gpu/run.sh OUT [PART ...]    rehearses the same script on a CPU with small sizes
#
# PYTHON is the interpreter and TIME_S the total time limit in seconds. exit status: 0 all passed, 3 a threshold failed,
# 1 a part failed or did not run.
set -euo pipefail
out=$(realpath -m "${1:?usage: tests/gpu/run.sh OUT [PART ...]}")
time_s=${TIME_S:-900}
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
# The runner enforces the limit; this is a safeguard in case it hangs.
exec timeout --foreground -k 20 $((time_s + 40)) \
  "${PYTHON:-python3}" -m tests.gpu.proof "$out" "${@:2}" --device "${DEVICE:-cuda}" --seconds "$time_s"
