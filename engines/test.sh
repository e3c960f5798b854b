#!/usr/bin/env bash
# Builds and tests the C++ runtime as CI does: formatting, clang-tidy, all tests under the address and
# undefined-behaviour sanitizers, those of threads under the thread sanitizer; the TensorRT backend on stand-ins for
# driver and library; and random operations in both runtimes, Python's and this one. Where a tool or package is missing it says which and stops; with OJFA_ENGINES=required that is
# an error.
set -euo pipefail
cd "$(dirname "$0")"
build=${1:-build}
without() {
    echo "the C++ runtime is left out: $1"
    echo "hint: apt-get install cmake g++ ninja-build nlohmann-json3-dev libssl-dev libgtest-dev clang-format clang-tidy"
    [ "${OJFA_ENGINES:-}" != required ] || exit 1
    exit 0
}
for tool in cmake c++ ninja; do
    command -v "$tool" > /dev/null || without "there is no $tool"
done
configure() {
    # What takes the time of the tests is optimized all the same (CMakeLists.txt).
    cmake -S . -B "$build/$1" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-g1 -O0" \
        -DOJFA_TENSORRT=STAND_IN "${@:2}" > "$build/$1.log" 2>&1
}
mkdir -p "$build"
if ! configure asan -DOJFA_SANITIZE=address,undefined -DOJFA_WERROR=ON; then
    cat "$build/asan.log"
    grep -q 'is missing' "$build/asan.log" && without "a package is missing, see above"
    exit 1
fi
if command -v clang-format > /dev/null; then
    find backends examples include src tests tools -name '*.[ch]' -o -name '*.[ch]pp' |
        xargs clang-format --dry-run --Werror
else
    echo "formatting is not checked: there is no clang-format"
fi
if command -v clang-tidy > /dev/null; then
    configure tidy -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON
    find src backends -name '*.cpp' | xargs -P 2 -n 4 clang-tidy -p "$build/tidy" --quiet
else
    echo "the code is not checked by clang-tidy, which isn't there"
fi
cmake --build "$build/asan"
# The slowest takes ten seconds: one that hangs is named.
ctest --test-dir "$build/asan" --output-on-failure --timeout 900 -j 2
# The Python runtime beside it, where there is one with what the tests need.
python=${PYTHON:-python3}
[ ! -x ../.venv/bin/python ] || python=../.venv/bin/python
if "$python" -c 'import hypothesis, onnxruntime, pytest, tokenizers' 2> /dev/null; then
    OMP_NUM_THREADS=1 OJFA_THREADS=1 OJFA_REPLAY_PROGRAMS="$build/asan/tests" \
        "$python" -m pytest -q -s ../tests/both_runtimes
else
    echo "the two runtimes are not compared: $python lacks hypothesis, onnxruntime, pytest or tokenizers"
    [ "${OJFA_ENGINES:-}" != required ] || exit 1
fi
configure tsan -DOJFA_SANITIZE=thread
cmake --build "$build/tsan" --target test_threads test_tensorrt_threads soak
timeout 900 "$build/tsan/tests/test_threads"
timeout 900 "$build/tsan/tests/soak" tests/vectors/gpt2.ojfa reference 8 40
LD_LIBRARY_PATH="$build/tsan/tests/stand_in" timeout 900 "$build/tsan/tests/test_tensorrt_threads"
