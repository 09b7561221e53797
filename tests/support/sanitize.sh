#!/usr/bin/env bash
# Runs the kernel tests on an extension built with address and undefined-behaviour sanitizers, beside the normal build;
# then the GPU's kernels as fibers of this machine (tests/support/gpu_on_host). --all: every combination of the tests'
# parameters, and the GPU's kernels in every shape and with a thread sanitizer, too.
set -euo pipefail
cd "$(dirname "$0")/../.."
site=build/sanitized
rm -rf "$site"
GSPO_KERNELS_SANITIZE=address,undefined GSPO_KERNELS_REQUIRE_NATIVE=1 \
  "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --target "$site" .
compiler=${CXX:-g++}
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$site" PYTHONSAFEPATH=1
"$PYTHON" -P -c 'import gspo_kernels._native as n; assert "sanitized" in n.__file__, n.__file__'
for isa in baseline avx2 avx512; do
  if GSPO_KERNELS_ISA=$isa "$PYTHON" -P -c 'import gspo_kernels._native as n; n.instruction_set()' 2>/dev/null; then
    echo "sanitized kernels, $isa"
    GSPO_KERNELS_ISA=$isa "$PYTHON" -P -m pytest --numprocesses auto -x \
      -k "(native and not cpu_products) or stride or neighbours or cpu_sparse" tests/rows/test_rows.py \
      tests/rows/test_row_independence.py tests/rows/test_kept_native.py tests/linear/test_cpu_products.py \
      tests/linear/test_cpu_sparse.py "$@"
  fi
done

unset LD_PRELOAD
on_host() {  # a sanitizer, further flags
  echo "sanitized GPU kernels on this machine, $*"
  local program="$site/gpu_rows$(printf "_%s" "$@")"
  "$compiler" -std=c++17 -O1 -g "-fsanitize=$1" -fno-sanitize-recover=all -Wno-unknown-pragmas -DGSPO_ON_HOST "${@:2}" \
    -Itests/support/gpu_on_host tests/support/gpu_on_host/rows.cpp -o "$program"
  TSAN_OPTIONS=halt_on_error=1 "$program"
}
if [[ " $* " == *" --all "* ]]; then
  on_host address,undefined &
  on_host thread
else  # fp16 has the addresses of bf16; a thread sanitizer sees these shapes in tests/rows/test_gpu_on_host.py
  on_host address,undefined -DGSPO_FEW -DGSPO_TYPE=float &
  on_host address,undefined -DGSPO_FEW
fi
wait $!  # for its verdict
