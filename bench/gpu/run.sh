#!/usr/bin/env bash
# Runs every stage of bench/run_gpu.py here, without network: ./run.sh [SECONDS [OPTIONS of run_gpu.py]]
# Lines, log, tables and plots are in $OUT (out/ beside this file, unless set).
set -u
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python3}" budget="${1:-600}" out="${OUT:-$here/out}"
shift $(($# > 0))
mkdir -p "$out"
exec > >(tee -a "$out/log.txt") 2>&1
"$python" "$here/install.py" "$here/site" || exit 1
export PYTHONPATH="$here/site" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

run() {
  "$python" "$here/bench/run_gpu.py" --out "$out" --budget "$budget" "$@" &
  child=$!
  trap 'kill -TERM $child' TERM INT
  while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done
}

run "$@"
for _ in 1 2 3; do # a process that crashed is gone on behind; one that was told to stop is not
  ((code > 128 && code != 137 && code != 143)) || break
  run --resume "$@"
done
"$python" "$here/bench/run_gpu.py" --report "$out"
exit "$code"
