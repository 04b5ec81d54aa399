#!/usr/bin/env bash
# What a machine with a Hopper GPU is asked, part by part; JSON and logs go to a folder.
#
#     benchmarks/gpu.sh OUT PART ...
#
# PART: build test sanitize counters replay bench compare layers accuracy. Ends with 1
# if one of them failed. Uses the Python, jax and nvcc that are there, pytest-xdist for
# `test`, compute-sanitizer, ncu and cuobjdump; needs no network. `compare` takes the peers
# that Python can import.
set -uo pipefail
mkdir -p "$1"
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export XLA_PYTHON_CLIENT_PREALLOCATE=false

benchmarks() { python3 -m benchmarks "$@"; }

build() {  # for this GPU's machine code, and PTX, which the tests read
  python3 -m pip install --quiet --no-build-isolation --no-deps --force-reinstall -e . \
    -Ccmake.define.JAX_GDN_BENCH=ON
}

# A GPU test that would be skipped fails. Tests of XLA's H100 compiler without a GPU need
# another plugin; they are no GPU tests.
tests() {
  JAX_GDN_REQUIRE_GPU=1 JAX_GDN_REQUIRE_PTX=1 \
    python3 -m pytest -q -p no:cacheprovider -p no:benchmark -n 16 --dist worksteal \
    -m "slow or not slow" "$@"
}

# Every tool over native calls of every form, at once. In XLA's own pool an access beyond
# a buffer, or of what nobody wrote, would go unnoticed, so every buffer is allocated for
# itself: in pages of 2 MB by `platform`, of which memcheck would see all as there, to the
# byte by `cuda_async`.
sanitize() {
  local tool failed=0
  local -A running
  for tool in memcheck racecheck initcheck synccheck; do
    local options=() allocator=platform
    [ "$tool" = memcheck ] && options=(--padding 4096) allocator=cuda_async
    JAX_GDN_REQUIRE_GPU=1 XLA_PYTHON_CLIENT_ALLOCATOR=$allocator \
      compute-sanitizer --tool "$tool" "${options[@]}" \
      --kernel-name kernel_substring=gdn_ --error-exitcode 9 \
      python3 -m pytest -q -p no:cacheprovider -p no:benchmark \
      -k "native and not on_the_host or row_alone" \
      tests/test_decode.py tests/test_pools.py tests/test_promises.py \
      > "$out/sanitize-$tool.log" 2>&1 &
    running[$tool]=$!
  done
  for tool in "${!running[@]}"; do
    wait "${running[$tool]}" || { echo "$tool ended with $?" && failed=1; }
    grep -H "SUMMARY\|passed\|failed" "$out/sanitize-$tool.log"
  done
  return $failed
}

bench() {
  benchmarks bench --batch 1 8 64 256 512 --layout KV VK --seconds 2 \
    --json "$out/bench.json" --plot "$out/bench.png" &&
    benchmarks bench --warm --batch 1 8 --seconds 2 --json "$out/bench-warm.json"
}

compare() {
  benchmarks compare --defects --json "$out/defects.json" &&
    benchmarks compare --batch 512 256 64 1 8 32 --seconds 2 \
      --json "$out/compare.json" &&
    benchmarks picture "$out/compare.json" "$out/compare.png" &&
    benchmarks compare --batch 1 8 --warm --seconds 2 --json "$out/compare-warm.json"
}

replay() {  # a file a dtype: each takes minutes
  local dtype
  for dtype in float32 bfloat16 float16; do
    benchmarks replay --state-dtype $dtype --json "$out/replay-$dtype.json" || return
  done
}

run() {
  case $1 in
    test) tests 2>&1 | tee "$out/test.log" | tail -n 40 ;;
    counters) benchmarks counters --json "$out/counters.json" ;;
    layers) benchmarks layers --seconds 1 --json "$out/layers.json" ;;
    accuracy) benchmarks accuracy errors --json "$out/accuracy.json" ;;
    build | sanitize | replay | bench | compare) "$1" ;;
    *) echo "gpu.sh: no part $1" && return 2 ;;
  esac
}

status=0
for part in "$@"; do
  echo "== $part (${SECONDS}s)"
  run "$part"
  ended=$?
  [ $ended = 0 ] || status=1
  echo "== $part ended with $ended (${SECONDS}s)"
done
exit $status
