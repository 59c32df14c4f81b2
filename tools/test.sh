#!/usr/bin/env bash
# Every test on a bare machine: sets everything up, then the C++ tests (those of the CUDA kernels on
# the CPU, under the emulation of tests/emulation) and pytest.
# usage: tools/test.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh test
venv=$(realpath -m "${FRSPEC_VENV:-.venv}")
export PATH="$venv/bin:$PATH"
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}

cmake -S . -B build/tests -G Ninja -DCMAKE_BUILD_TYPE=Release -DFRSPEC_BUILD_TESTS=ON \
  -DFRSPEC_BUILD_TOOLS=ON -DFRSPEC_BUILD_PYTHON=OFF -DFRSPEC_CUDA=OFF
cmake --build build/tests
[ -x build/tests/cuda_tests ] || { echo "test.sh: error: no CUDA headers were found" >&2; exit 1; }
export FRSPEC_BENCH=$PWD/build/tests/frspec-bench FRSPEC_BENCH_CUDA=$PWD/build/tests/bench_cuda

# Both run, so that one failure does not hide another.
cpp=passed
ctest --test-dir build/tests --output-on-failure || cpp=FAILED
py=passed
python -m pytest "$@" || py=FAILED

echo "C++ tests $cpp, Python tests $py"
[ "$cpp $py" = "passed passed" ]
