#!/usr/bin/env bash
# Proof on a GPU: installs the checkout, then for every op, the most important first, its contract on
# the device and its benchmark; then memcheck and racecheck on each kernel; ends in a short table.
#
#   bench/gpu.sh [--dry-run] [STATE]
#
# Needs a GPU, and a python3 ($PYTHON) with torch, triton, numpy, pytest, and setuptools, pybind11 and
# ninja to build; no network. It ends within 9 minutes ($GPU_SECONDS, 530): a part that is left or failed is
# run by the next call, given the directory STATE of the earlier one ($OUT, or bench/gpu-state). A
# part runs again when the sources of its op have changed. Rows, log and, where $OUT is set, the
# list of finished parts go to $OUT (else rows and log to bench/results). BENCH_COMMIT names the
# commit in rows where the copy has no git history.
#
# Exit status: 0 all parts are done, 1 a part failed, 2 no GPU or wrong usage, 3 parts are left.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=1 && shift; fi
if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
  echo "usage: bench/gpu.sh [--dry-run] [STATE]" >&2
  exit 2
fi
results=${OUT:-bench/results}
state=${1:-${OUT:-bench/gpu-state}}
seconds=${GPU_SECONDS:-530}
python=${PYTHON:-python3}
site=$PWD/build/gpu-site
log=$results/gpu-$(date +%Y-%m-%d).log
ops=(kd_cross_entropy batch_triplet_loss nearest_neighbor hidden_l2 triplet_loss linear_kd_cross_entropy)
shortest=20  # a part is not begun with less time than this
ending=10    # what the table takes
failed=() left=()

# The sources that an op's results depend on, as a short hash.
fingerprint() {
  local folders=("kdkernels/$1")
  case $1 in  # an op that builds on another
    linear_kd_cross_entropy) folders+=(kdkernels/kd_cross_entropy) ;;
    batch_triplet_loss) folders+=(kdkernels/triplet_loss) ;;
  esac
  find kdkernels/*.py "${folders[@]}" -name '*.py' ! -name _build_info.py -print0 |
    sort -z | xargs -0 cat | sha256sum | cut -c1-12
}

is_finished() { # PART HASH
  [ -f "$state/finished" ] && grep -qxF "$1 $2" "$state/finished"
}

remember() { # PART HASH
  echo "$1 $2" >>"$state/finished"
  if [ -n "${OUT:-}" ] && [ "$state" != "$OUT" ]; then cp "$state/finished" "$OUT/finished"; fi
}

# Runs a command within the time limit of the part and the time left; 0 where it succeeded. Its
# output goes to the log and to $state/last.
run_part() { # PART SECONDS COMMAND...
  local part=$1 budget=$2 time_left=$((seconds - ending - SECONDS)) status=0
  shift 2
  if ((time_left < shortest)); then
    left+=("$part")
    return 1
  fi
  if ((budget > time_left)); then budget=$time_left; fi
  echo "== $part (at most $budget s, $SECONDS s so far)" | tee -a "$log"
  timeout --kill-after=5 "$budget" "$@" 2>&1 | tee -a "$log" "$state/last" >/dev/null || status=$?
  if ((status == 0)); then
    grep -E '^([0-9]+ (passed|skipped)|.*(ERROR SUMMARY|RACECHECK SUMMARY))|:[0-9 ]+calls' \
      "$state/last" | tail -n 3 || true
    return 0
  fi
  grep -E 'WRONG|FAILED|skipped' "$state/last" | head -n 20 || true
  tail -n 25 "$state/last"
  if ((status == 124 || status == 137)); then
    echo "== $part: not done after $budget s" | tee -a "$log"
    left+=("$part")
  else
    echo "== $part: FAILED with status $status" | tee -a "$log"
    failed+=("$part")
  fi
  return 1
}

# A part of one op, unless it is finished.
op_part() { # KIND OP SECONDS COMMAND...
  local kind=$1 op=$2 budget=$3 hash
  shift 3
  hash=$(fingerprint "$op")
  if is_finished "$kind:$op" "$hash"; then
    echo "== $kind $op: done before"
  elif [ -n "$dry_run" ]; then
    echo "== $kind $op (at most $budget s): $*"
  else
    : >"$state/last"
    if run_part "$kind $op" "$budget" "$@"; then remember "$kind:$op" "$hash"; fi
  fi
}

install() {
  # The installed package is tested: PYTHONSAFEPATH keeps the checkout's own off the path.
  local command=("$python" -m pip install --quiet --disable-pip-version-check --no-index
    --no-build-isolation --no-deps --upgrade --target "$site" .)
  if [ -n "$dry_run" ]; then
    echo "== install (at most 90 s): ${command[*]}"
    return
  fi
  rm -rf "$site"
  : >"$state/last"
  if run_part install 90 "${command[@]}"; then
    export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}
  else
    echo "== the checkout is used as it is" | tee -a "$log"
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  fi
}

contract() { # OP
  local only="cuda and $1 and not eager-cuda" workers=$(($(nproc) / 2)) parallel=()
  if [ "$1" = triplet_loss ]; then only="$only and not batch_triplet_loss"; fi
  if [ "$1" = kd_cross_entropy ]; then only="$only and not linear_kd_cross_entropy"; fi
  if ((workers > 8)); then workers=8; fi
  # Most of its time is Triton's compilation.
  if ((workers > 1)) && "$python" -c "import xdist" 2>/dev/null; then parallel=(-n "$workers"); fi
  op_part contract "$1" 200 "$python" -m pytest tests/kernels/test_contract.py -k "$only" -x -W default \
    -p no:cacheprovider "${parallel[@]}"
}

benchmark() { # OP SECONDS
  local op=$1 budget=$2 hash case skip=()
  hash=$(fingerprint "$op")
  if [ -f "$state/finished" ]; then
    while read -r case; do skip+=(--skip "$case"); done < <(
      sed -n "s/^case:$op:\([^ ]*\) $hash\$/\1/p" "$state/finished"
    )
  fi
  op_part bench "$op" "$budget" "$python" -m bench "$op" --device cuda --results "$results" \
    --limit 120 "${skip[@]}"
  if [ -n "$dry_run" ] || [ ! -f "$state/last" ]; then return; fi
  # A benchmark that was stopped has finished cases as well.
  while read -r case; do
    if ! is_finished "case:$op:$case" "$hash"; then remember "case:$op:$case" "$hash"; fi
  done < <(sed -n "s/^  finished: $op \([^,]*\), .*/\1/p" "$state/last")
  : >"$state/last"
}

sanitize() { # TOOL OP
  # Without torch's caching every tensor is an allocation of its own, with bounds to check.
  op_part "$1" "$2" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
    --target-processes application-only --error-exitcode 1 --print-limit 20 \
    "$python" -m bench.gpu.sanitize "$2"
}

if [ -z "$dry_run" ]; then
  if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "bench/gpu.sh: $python has no torch that finds a GPU here" >&2
    exit 2
  fi
  mkdir -p "$results" "$state"
  if [ ! "$state" -ef "$results" ]; then
    for rows in "$state"/*.csv; do
      if [ -e "$rows" ] && [ ! -e "$results/${rows##*/}" ]; then cp "$rows" "$results"; fi
    done
    if [ -n "${OUT:-}" ] && [ -f "$state/finished" ]; then cp "$state/finished" "$OUT/finished"; fi
  fi
  export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
fi

install
for op in "${ops[@]}"; do
  contract "$op"
  case $op in
    kd_cross_entropy) benchmark "$op" 270 ;;
    batch_triplet_loss) benchmark "$op" 150 ;;
    *) benchmark "$op" 90 ;;
  esac
done
if command -v compute-sanitizer >/dev/null || [ -n "$dry_run" ]; then
  for tool in memcheck racecheck; do
    for op in "${ops[@]}"; do sanitize "$tool" "$op"; done
  done
else
  echo "== memcheck and racecheck: skipped, compute-sanitizer is not installed" | tee -a "$log"
fi
if [ -n "$dry_run" ]; then exit 0; fi

rm -f "$state/last"
"$python" -m bench report --summary --results "$results" 2>&1 | tee -a "$log" || failed+=(table)
{
  echo "failed: ${failed[*]:-none}"
  echo "left for the next call with this state: ${left[*]:-none}"
} | tee -a "$log"
if ((${#failed[@]})); then exit 1; fi
if ((${#left[@]})); then exit 3; fi
