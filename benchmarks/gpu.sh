#!/usr/bin/env bash
# What a machine with a Hopper GPU is asked, part by part; JSON and logs go to a folder.
# -P, because the source tree has no native modules.
#
#     benchmarks/gpu.sh OUT build test sanitize counters replay bench compare layers accuracy
#
# Uses the Python, jax and nvcc that are there (and pytest-xdist for `test`); needs no
# network. `compare` takes the peers that Python can import.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
export XLA_PYTHON_CLIENT_PREALLOCATE=false

build() {  # for this GPU's machine code, and PTX, which the tests read
  python3 -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
}

# A GPU test that would be skipped fails. Tests of XLA's H100 compiler without a GPU need
# another plugin; they are no GPU tests.
tests() {
  JAX_GDN_REQUIRE_GPU=1 JAX_GDN_REQUIRE_PTX=1 \
    python3 -P -m pytest -q -p no:cacheprovider -p no:benchmark -n 16 --dist worksteal "$@"
}

# Every tool over native calls of every form, at once. In XLA's own pool an access beyond
# a buffer, or of what nobody wrote, would go unnoticed: so every buffer is cudaMalloc's.
sanitize() {
  local tool
  for tool in "memcheck --padding 4096" racecheck initcheck synccheck; do
    JAX_GDN_REQUIRE_GPU=1 XLA_PYTHON_CLIENT_ALLOCATOR=platform \
      timeout 300 compute-sanitizer --tool $tool \
      --kernel-name kernel_substring=gdn_ --error-exitcode 9 \
      python3 -P -m pytest -q -p no:cacheprovider -p no:benchmark -k native \
      tests/test_decode.py tests/test_pools.py tests/test_promises.py > "$out/sanitize-${tool%% *}.log" 2>&1 &
  done
  for tool in 1 2 3 4; do
    wait -n
    echo "sanitize: a tool ended with $?"
  done
  grep -H "ERROR SUMMARY\|RACECHECK SUMMARY\|passed\|failed" "$out"/sanitize-*.log
}

for part in "$@"; do
  echo "== $part (${SECONDS}s)"
  case $part in
    build) build ;;
    test) tests 2>&1 | tee "$out/test.log" | tail -n 40 ;;
    sanitize) sanitize ;;
    counters) python3 benchmarks/counters.py --json "$out/counters.json" ;;
    replay)
      python3 -P benchmarks/replay.py --state-dtype float32 bfloat16 --tokens 1 4 \
        --json "$out/replay.json"
      ;;
    bench)
      python3 -P -m jax_gdn bench --full --json "$out/bench.json" --plot "$out/bench.png"
      python3 -P -m jax_gdn bench --warm --batch 1 8 --json "$out/bench-warm.json"
      ;;
    compare)
      python3 benchmarks/compare.py --defects --json "$out/defects.json"
      python3 benchmarks/compare.py --batch 1 8 32 64 256 512 --json "$out/compare.json"
      python3 benchmarks/compare.py --batch 1 8 --warm --json "$out/compare-warm.json"
      ;;
    layers) python3 benchmarks/layers.py --json "$out/layers.json" ;;
    accuracy) python3 benchmarks/accuracy.py errors --json "$out/accuracy.json" ;;
    *) echo "gpu.sh: no part $part" && exit 2 ;;
  esac
  echo "== $part ended with $? (${SECONDS}s)"
done
