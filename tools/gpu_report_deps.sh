#!/usr/bin/env bash
# Collects, on a machine with network, what tools/gpu_report.sh needs on one without: a folder for
# FRSPEC_DEPS.
#
# usage: tools/gpu_report_deps.sh DIR [part...]
#
#   headers   CLI11, doctest and nlohmann-json, out of Debian's packages; 2 MB
#   shapes    the synthetic models' folders, made with frspec (tools/setup.sh); 5 MB
#   python    wheels for the Python module; 21 MB
#   toolkit   wheels of nvcc and its headers, compute-sanitizer, CMake and ninja; 170 MB
#   cublas    wheels of cuBLAS; 400 MB
#
# Without parts: headers, shapes and python, for a machine that has CUDA's toolkit and CMake. Wheels
# are for this Python, or for the version in FRSPEC_DEPS_PYTHON, e.g. 3.12.
set -euo pipefail
fail() {
  echo "gpu_report_deps: error: $*" >&2
  exit 2
}
case ${1:-} in
-h | --help)
  sed '1d;/^[^#]/Q;s/^# \?//' "${BASH_SOURCE[0]}"
  exit
  ;;
"" | -*) fail "expected a folder to write to, found '${1:-}' (--help says more)" ;;
esac
deps=$(realpath -m -- "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -m "${FRSPEC_VENV:-.venv}")
python=$venv/bin/python
[ -x "$python" ] || python=python3

part_headers() {
  local folder
  folder=$(mktemp -d)
  (cd "$folder" && apt-get download -qq libcli11-dev doctest-dev nlohmann-json3-dev)
  for package in "$folder"/*.deb; do dpkg-deb --extract "$package" "$deps"; done
  rm -r "$folder" "$deps/usr/share/doc"
  # Debian's doctest expects to be in /usr; the others find themselves.
  # shellcheck disable=SC2016
  sed -i 's|set(_IMPORT_PREFIX "/usr")|get_filename_component(_IMPORT_PREFIX "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)|' \
    "$deps/usr/lib/cmake/doctest/doctestTargets.cmake"
}

part_shapes() {
  "$python" -c "import frspec" 2>/dev/null || fail "shapes: frspec is missing; run tools/setup.sh"
  for shape in llama-3-8b llama-3.2-1b qwen2-7b; do
    "$python" -m frspec.cli make-synthetic --force --config $shape "$deps/synthetic/$shape"
  done
}

wheels() {
  local options=(--only-binary=:all: --no-deps -q -d "$deps/wheels") minor
  if [ -n "${FRSPEC_DEPS_PYTHON:-}" ]; then
    options+=(--python-version "$FRSPEC_DEPS_PYTHON" --implementation cp)
    for minor in 39 35 34 31 28 27 25 24 17; do
      options+=(--platform "manylinux_2_${minor}_x86_64")
    done
    options+=(--platform manylinux2014_x86_64)
  fi
  "$python" -m pip download "${options[@]}" "$@"
}

part_python() {
  wheels nanobind typing_extensions numpy safetensors tokenizers jinja2 markupsafe rich \
    markdown-it-py mdurl pygments gguf
}
part_toolkit() {
  wheels "nvidia-cuda-nvcc==13.*" "nvidia-cuda-crt==13.*" "nvidia-nvvm==13.*" \
    "nvidia-cuda-runtime==13.*" "nvidia-cuda-cccl==13.*" "nvidia-cuda-sanitizer-api==13.*" \
    "cmake>=3.25" ninja
}
part_cublas() { wheels "nvidia-cublas==13.*"; }

parts=("$@")
[ $# -gt 0 ] || parts=(headers shapes python)
for part in "${parts[@]}"; do
  declare -F "part_$part" >/dev/null || fail "expected headers, shapes, python, toolkit or cublas"
done
mkdir -p "$deps"
for part in "${parts[@]}"; do
  echo "gpu_report_deps: $part" >&2
  "part_$part"
done
du -sh "$deps"/* >&2
