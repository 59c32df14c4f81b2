#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, which needs no network, in less than ten
# minutes, and writes OUT_DIR/report.md and report.json.
#
# usage: tools/gpu_report.sh OUT_DIR [piece...]
#
#   build         the tests, the benchmarks and, where nanobind is, the Python module
#   tests         cuda_tests on the device, a process for each file; those that fail once more with
#                 FRSPEC_PDL=0, and all that follows too if that helps
#   exactness     speculative text against plain text: random weights, and FRSPEC_MODELS
#   bench         frspec-bench: plain, EAGLE-2 and FR-Spec, with planted accept lengths; what drafting
#                 consists of
#   shapes        bench_cuda: each product against cuBLAS and its floor, attention, drafting, memory
#   sanitizer     compute-sanitizer (memcheck, racecheck) on the tests of the ops
#   resources     registers, spills and shared memory of the kernels
#   transformers  Hugging Face transformers beside it: static cache, eager and torch.compile
#
# Without pieces, all in this order. Each has a time limit, and the next goes on when one fails. A
# piece alone adds to what OUT_DIR already has; the report is written after each. Environment:
#
#   FRSPEC_DEPS    folder made by tools/gpu_report_deps.sh: headers, wheels, model shapes
#   FRSPEC_MODELS  folder of real models: NAME/model, NAME/drafter, NAME/ranking.safetensors, and
#                  prompts.jsonl in Spec-Bench's format
#   FRSPEC_BUILD   build folder (default: build/gpu_report)
#   FRSPEC_CUDA_ARCHS, CUDA_HOME   compute capabilities (default: the GPU's), toolkit
#   FRSPEC_COMMIT  the commit, where git cannot tell
#   FRSPEC_REPORT_LIMIT   seconds for each piece, instead of the limits below
#
# Exit status: 0; 1 when a piece failed, 3 when none passed and none failed (no GPU, say), 2 for a
# wrong command line, 130 or 143 when it was interrupted, which keeps what there is.
set -uo pipefail

fail() {
  echo "gpu_report: error: $*" >&2
  exit 2
}
case ${1:-} in
-h | --help)
  sed '1d;/^[^#]/Q;s/^# \?//' "${BASH_SOURCE[0]}"
  exit
  ;;
"" | -*) fail "expected a folder to write to, found '${1:-}' (--help says more)" ;;
esac
[[ -z ${FRSPEC_REPORT_LIMIT:-} || $FRSPEC_REPORT_LIMIT =~ ^[1-9][0-9]{0,6}$ ]] ||
  fail "FRSPEC_REPORT_LIMIT: expected seconds, found '$FRSPEC_REPORT_LIMIT'"

ALL=(build tests exactness bench shapes sanitizer resources transformers)
declare -A LIMIT=([build]=110 [tests]=45 [exactness]=50 [bench]=50 [shapes]=40 [sanitizer]=130
  [resources]=5 [transformers]=160) # seconds, 590 in all
BUDGET=590
[ -z "${FRSPEC_REPORT_LIMIT:-}" ] ||
  for piece in "${ALL[@]}"; do LIMIT[$piece]=$FRSPEC_REPORT_LIMIT BUDGET=1000000; done
SKIPPED=77

# ==== What pieces share

has_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == "GPU "* ]]; }
skip() {
  echo "$*"
  exit $SKIPPED
}
needs() {
  has_gpu || skip "no GPU: nvidia-smi finds none"
  local program
  for program in "$@"; do
    [ -x "$build/$program" ] || skip "$program is not built"
  done
}
not_hung() {
  ! compgen -G "$out/hung/*" >/dev/null || skip "the tests of $(ls "$out/hung") did not end"
}

# Wheels are kept apart from the machine's packages, which torch needs as they are.
with_site() { PYTHONPATH="$build/package:$site${PYTHONPATH:+:$PYTHONPATH}" "$@"; }

# The folder of a synthetic model, ready-made or made now.
synthetic() {
  local folder=${FRSPEC_DEPS:-/nonexistent}/synthetic/$1
  if [ ! -e "$folder/config.json" ]; then
    folder=$build/synthetic/$1
    [ -e "$folder/config.json" ] ||
      with_site python3 -m frspec.cli make-synthetic --config "$1" "$folder" >&2 || return 1
  fi
  echo "$folder"
}

# PROGRAM FOLDER option...: runs a benchmark over a synthetic model.
on_model() {
  "$build/$1" --model "$2" --drafter "$2/drafter" --ranking "$2/ranking.safetensors" "${@:3}"
}

# cuBLAS is opened at run time; where Python packages have it, the loader must be told.
add_cublas() {
  [[ $(ldconfig -p 2>/dev/null) != *libcublas.so.1[23]* ]] || return
  local folder
  for folder in "$site"/nvidia/cu13/lib "${CUDA_HOME:-/usr/local/cuda}"/{lib64,lib} \
    "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/nvidia/c*/lib; do
    if compgen -G "$folder/libcublas.so.1[23]" >/dev/null; then
      export LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
      return
    fi
  done
  echo "libcublas.so.12 or .13 was not found"
}

# ==== The pieces

piece_build() {
  local options=(-DCMAKE_BUILD_TYPE=Release)
  # Into the page cache: what later pieces would wait for within their limits.
  { cat "${CUDA_HOME:-/usr/local/cuda}"/lib64/libcublas*.so.* &&
    python3 -c "import torch, transformers"; } >/dev/null 2>&1 &
  if [ -n "${FRSPEC_DEPS:-}" ]; then
    options+=("-DCMAKE_PREFIX_PATH=$FRSPEC_DEPS/usr")
    if compgen -G "$FRSPEC_DEPS/wheels/*.whl" >/dev/null; then
      python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" \
        "$FRSPEC_DEPS"/wheels/*.whl || echo "the wheels do not fit this Python; going on without"
    fi
  fi
  local archs=${FRSPEC_CUDA_ARCHS:-}
  if [ -z "$archs" ]; then
    has_gpu || skip "no GPU: nvidia-smi finds none, and FRSPEC_CUDA_ARCHS is not set"
    archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
  fi
  command -v ninja >/dev/null && options+=(-G Ninja)
  with_site cmake -S . -B "$build" "${options[@]}" -DFRSPEC_CUDA=ON "-DFRSPEC_CUDA_ARCHS=$archs" \
    -DFRSPEC_BUILD_TESTS=ON -DFRSPEC_BUILD_TOOLS=ON -DFRSPEC_BUILD_PYTHON=OFF || return 1
  with_site cmake --build "$build" -j "$(nproc)" --target cuda_tests frspec-bench bench_cuda ||
    return 1
  # Only real models and shapes that are not in FRSPEC_DEPS need Python's module.
  build_python || echo "there is no Python module"
}

build_python() {
  with_site python3 -c "import nanobind, typing_extensions" &&
    with_site cmake -S . -B "$build" -DFRSPEC_BUILD_PYTHON=ON \
      "-DPython_EXECUTABLE=$(command -v python3)" &&
    with_site cmake --build "$build" -j "$(nproc)" --target _core _core_stub &&
    mkdir -p "$build/package/frspec" && cp -r python/frspec/. "$build/package/frspec/" &&
    cmake --install "$build" --prefix "$build/package"
}

# A process for each file, so that a kernel that spoils its process or hangs spoils no other.
piece_tests() {
  needs cuda_tests
  add_cublas
  local file failed=()
  for file in $(printf '%s\n' tests/cuda/test_*.cpp | grep -v engine) tests/cuda/*engine*.cpp; do
    test_file "$file" || failed+=("$file")
  done
  [ ${#failed[@]} -gt 0 ] || return 0
  echo "failed: ${failed[*]##*/}"
  export FRSPEC_PDL=0 # is it the early launches?
  for file in "${failed[@]}"; do
    if ! test_file "$file" >>"$out/logs/tests.no_overlap.log" 2>&1; then
      echo "$file fails with FRSPEC_PDL=0 too"
      return 1
    fi
  done
  touch "$out/no_overlap"
  echo "${failed[*]##*/} failed; with FRSPEC_PDL=0 all pass, and what follows ran so"
  return 1
}

test_file() {
  local code=0 hung=$out/hung/${1##*/}
  mkdir -p "$out/hung" && touch "$hung" # stays if this piece's time ends first, too
  timeout --foreground -k 2 $((LIMIT[tests] / 3)) \
    "$build/cuda_tests" --no-colors=true --duration=true "-sf=*${1##*/}" || code=$?
  case $code in
  124 | 137) echo "$1 did not end" ;;
  *) rm "$hung" && [ $code = 0 ] || echo "$1: exit code $code" ;;
  esac
  return $code
}

piece_exactness() {
  needs frspec-bench
  not_hung
  add_cublas
  local status=0 shape folder temperature name
  for shape in llama-3.2-1b llama-3-8b qwen2-7b; do
    folder=$(synthetic $shape) || { status=1 && continue; }
    for temperature in 0 1; do
      on_model frspec-bench "$folder" --device cuda --vocab-sizes full 32768 \
        --plant-accept-length 3 3 --temperature $temperature --seed 1234 --prompt-tokens 300 \
        --new-tokens 96 --repeats 1 --warm-up 0 --no-breakdown \
        --json "$out/pieces/exactness.$shape.T$temperature.json" || status=1
    done
  done
  # As it is, the random drafter is nearly always wrong.
  if folder=$(synthetic llama-3.2-1b); then
    on_model frspec-bench "$folder" --device cuda --temperature 1 \
      --prompt-tokens 300 --new-tokens 96 --repeats 1 --warm-up 0 --no-breakdown \
      --json "$out/pieces/exactness.llama-3.2-1b.T1.unplanted.json" || status=1
  fi
  for folder in "${FRSPEC_MODELS:-/nonexistent}"/*/model; do
    [ -d "$folder" ] || continue
    folder=$(dirname "$folder")
    name=$(basename "$folder")
    # Temperatures 0 and 1 are its default.
    with_site python3 tools/check_exactness.py --model "$folder/model" \
      --drafter "$folder/drafter" --ranking "$folder/ranking.safetensors" \
      --prompts "$FRSPEC_MODELS/prompts.jsonl" --limit 24 --vocab-sizes full 16384 \
      --trees 6x10x60 >"$out/pieces/exactness.$name.txt" || status=1
    cat "$out/pieces/exactness.$name.txt"
  done
  return $status
}

piece_bench() {
  needs frspec-bench
  not_hung
  add_cublas
  local status=0 each folder shape size full part
  # The FR-Spec paper's accept lengths (tables 1 and 6) of EAGLE-2 with the full vocabulary and with
  # a part of it.
  for each in "llama-3-8b 32768 3.89 3.63" "llama-3.2-1b 16384 2.81 2.60"; do
    read -r shape size full part <<<"$each"
    folder=$(synthetic "$shape") || { status=1 && continue; }
    on_model frspec-bench "$folder" --device cuda --vocab-sizes full "$size" \
      --plant-accept-length "$full" "$part" --prompt-tokens 512 --new-tokens 128 --repeats 5 \
      --json "$out/pieces/bench.$shape.json" || status=1
    # What early launches gain where kernels are short.
    [ "$shape" = llama-3.2-1b ] && [ "${FRSPEC_PDL:-}" != 0 ] || continue
    FRSPEC_PDL=0 on_model frspec-bench "$folder" --device cuda --vocab-sizes full "$size" \
      --plant-accept-length "$full" "$part" --prompt-tokens 512 --new-tokens 128 --repeats 3 \
      --json "$out/pieces/bench.$shape.no_overlap.json" || status=1
  done
  return $status
}

piece_shapes() {
  needs bench_cuda
  not_hung
  add_cublas
  local status=0 shape folder
  for shape in llama-3-8b llama-3.2-1b; do
    folder=$(synthetic $shape) || { status=1 && continue; }
    on_model bench_cuda "$folder" --only linears attention drafting upload \
      --json "$out/pieces/shapes.$shape.json" || status=1
    # In a process of its own: kernels and cuBLAS take memory when they are first used.
    on_model bench_cuda "$folder" --only memory \
      --json "$out/pieces/shapes.$shape.memory.json" || status=1
  done
  return $status
}

piece_sanitizer() {
  needs cuda_tests
  add_cublas
  local sanitizer tool status=0
  sanitizer=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:$site/nvidia/cu13/bin" \
    command -v compute-sanitizer) || skip "compute-sanitizer was not found"
  for tool in memcheck racecheck; do
    # Not the engine: it takes too long. Not the errors: they provoke what would be reported.
    timeout --foreground $((LIMIT[sanitizer] - 10)) "$sanitizer" --tool $tool --error-exitcode 86 \
      "$build/cuda_tests" --no-colors=true "-sfe=*test_cuda_engine*,*test_cuda_errors*" \
      >"$out/logs/sanitizer.$tool.log" 2>&1 &
    declare "${tool}_id=$!"
  done
  for tool in memcheck racecheck; do
    local id=${tool}_id code=0
    wait "${!id}" || code=$?
    [ $code = 0 ] || status=1
    echo "$tool: exit code $code"
    grep -E "SUMMARY|\[doctest\]" "$out/logs/sanitizer.$tool.log"
  done
  return $status
}

piece_resources() {
  compgen -G "$build/cuda/*.ptxas" >/dev/null || skip "no kernels are built"
  local source
  for source in cuda/*.cu; do
    source=${source##*/}
    [ -e "$build/cuda/${source%.cu}.ptxas" ] || { echo "$source is not built" && return 1; }
  done
  python3 tools/kernel_resources.py "$build" --json "$out/pieces/resources.kernels.json"
}

piece_transformers() {
  has_gpu || skip "no GPU: nvidia-smi finds none"
  local status=0 shape folder share=$((LIMIT[transformers] * 2 / 3))
  for shape in llama-3-8b llama-3.2-1b; do
    folder=$(synthetic $shape) || { status=1 && continue; }
    timeout --foreground $share python3 tools/compare_transformers.py --model "$folder" --context 512 \
      --json "$out/pieces/transformers.$shape.json" || status=1
    share=$((LIMIT[transformers] - share - 2))
  done
  grep -q '"eager"' "$out"/pieces/transformers.*.json || [ $status != 0 ] ||
    skip "$(sed -n 's/.*"skipped": "\(.*\)".*/\1/p' "$out"/pieces/transformers.*.json | head -n 1)"
  return $status
}

# ==== Running them

out=$(realpath -m -- "$1") || exit 2
shift
for folder in FRSPEC_DEPS FRSPEC_MODELS FRSPEC_BUILD; do
  [ -z "${!folder:-}" ] || export "$folder=$(realpath -m "${!folder}")"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
build=${FRSPEC_BUILD:-$PWD/build/gpu_report}
site=$build/site-packages
export PATH=$PATH:$site/bin:$site/nvidia/cu13/bin
if [ "${1:-}" = --run ]; then # one piece, under its time limit
  if [ "$2" = tests ]; then rm -rf "$out/no_overlap" "$out/hung"; fi
  if [ -e "$out/no_overlap" ]; then export FRSPEC_PDL=0; fi
  "piece_$2"
  exit $?
fi

pieces=("$@")
[ $# -gt 0 ] || pieces=("${ALL[@]}")
for piece in "${pieces[@]}"; do
  [ -n "$piece" ] && [ -n "${LIMIT[$piece]:-}" ] ||
    fail "expected pieces of ${ALL[*]}, found '$piece'"
done
mkdir -p "$out/logs" "$out/pieces" || fail "$out cannot be written"
failed=0
passed=0
written=1
# Ends the running piece, which has a process group of its own, and writes the report.
interrupted() {
  trap "" INT TERM
  local group
  for group in $(jobs -pr); do # not a variable: a signal may come before it is set
    end_group "$group" 2>/dev/null
  done
  echo "interrupted"
  [ ! -e "$out/pieces/machine.json" ] || python3 tools/gpu_report.py write "$out"
  exit "$1"
}
# Time to clean up before SIGKILL: ninja ends its compilers, which have groups of their own.
end_group() {
  kill -TERM "$1" && wait "$1" # timeout hands it on to its group
  local _
  for _ in {1..20}; do
    kill -0 -- "-$1" || return 0
    sleep 0.1
  done
  kill -KILL -- "-$1"
}
trap "interrupted 130" INT
trap "interrupted 143" TERM
python3 tools/gpu_report.py machine "$out" || exit 2
for piece in "${pieces[@]}"; do
  limit=$((BUDGET - SECONDS - 5 < LIMIT[$piece] ? BUDGET - SECONDS - 5 : LIMIT[$piece]))
  [ $limit -ge 5 ] || limit=5
  log=$out/logs/$piece.log
  printf '[%4d s] %s (at most %d s)\n' $SECONDS "$piece" "$limit"
  rm -f "$out/pieces/$piece".* "$out/logs/$piece".*
  start=$SECONDS
  code=0
  # In the background: bash answers signals while it waits, not while a command runs.
  FRSPEC_REPORT_LIMIT=$limit timeout -k 5 "$limit" \
    bash tools/gpu_report.sh "$out" --run "$piece" >"$log" 2>&1 &
  wait $! || code=$?
  status=$(python3 tools/gpu_report.py record "$out" "$piece" $code $((SECONDS - start))) || exit 2
  printf '[%4d s] %s: %s\n' $SECONDS "$piece" "$status"
  python3 tools/gpu_report.py write "$out" && written=1 || written=0
  case $code in
  0) passed=1 ;;
  "$SKIPPED") ;;
  *) failed=1 && tail -n 5 "$log" | sed 's/^/         | /' ;;
  esac
done
[ $written = 1 ] || fail "$out/report.md could not be written"
echo "$out/report.md is written"
[ $((failed + passed)) -gt 0 ] || exit 3
exit $failed
