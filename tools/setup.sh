#!/usr/bin/env bash
# Makes .venv in this clone with frspec built and installed into it.
#
# usage: tools/setup.sh [run|test|ci]
#   run   (default) what running frspec needs
#   test  also what the C++ and Python tests need, a CUDA compiler and its headers among it
#   ci    also the formatters
#
# Where nvcc is found (in PATH, /usr/local/cuda, or the environment), frspec is built with CUDA.
# Debian/Ubuntu packages that are missing are installed when this runs as root, and named when it
# does not. Everything else comes from PyPI. FRSPEC_VENV names another folder for the environment;
# an environment that happens to be active is left alone. Running it again is quick: only what
# changed is done anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*" >&2; }
fail() {
  echo "setup: error: $*" >&2
  exit 1
}

purpose=${1:-run}
case $purpose in
  run) enough=(run test ci) ;; # the purposes whose set-up serves this one
  test) enough=(test ci) ;;
  ci) enough=(ci) ;;
  -h | --help)
    sed '1d;/^[^#]/Q;s/^# \?//' tools/setup.sh
    exit
    ;;
  *) fail "expected run, test or ci, found '$purpose'" ;;
esac
python=${PYTHON:-python3}
cxx=${CXX:-g++}
venv=${FRSPEC_VENV:-.venv}
venv=$(realpath -m "$venv")

command -v "$python" >/dev/null || fail "python3 (3.10 or newer) is missing"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "expected Python 3.10 or newer, found $("$python" -V 2>&1)"

# ==== Nothing to do?

# What the installed package is made of.
state() {
  "$python" - "$venv" "${CXX:-}" "${CXXFLAGS:-}" "${CMAKE_ARGS:-}" "${FRSPEC_CUDA_ARCHS:-}" \
    "$(command -v nvcc || true)" "${CUDA_HOME:-}" "${CUDA_PATH:-}" <<'PYTHON'
import hashlib
import pathlib
import sys

state = hashlib.sha256(repr((sys.version, sys.argv[1:])).encode())
roots = ("CMakeLists.txt", "pyproject.toml", "README.md", "bindings", "cuda", "python", "runtime")
for root in map(pathlib.Path, (*roots, "tools/setup.sh")):
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if path.is_file() and path.suffix not in (".pyc", ".so"):
            data = path.read_bytes()
            state.update(f"{path} {len(data)}\n".encode() + data)
print(state.hexdigest())
PYTHON
}

has_venv() { "$venv/bin/python" -c "import pip" 2>/dev/null; }

now=$(state)
if has_venv; then
  for each in "${enough[@]}"; do
    if [ "$(cat "$venv/frspec-$each.stamp" 2>/dev/null)" = "$now" ]; then exit 0; fi
  done
fi

# ==== What only the system's packages can give

has_header() {
  [ -e "/usr/include/$1" ] || echo "#include <$1>" | "$cxx" -E -x c++ - >/dev/null 2>&1
}
has_python_headers() {
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}
has_module() { "$python" -c "import $1" 2>/dev/null; }

missing_packages() {
  command -v "$cxx" >/dev/null || echo g++
  has_venv || has_module "venv, ensurepip" || has_module "venv, pip" || echo python3-venv
  has_python_headers || echo python3-dev
  has_header nlohmann/json.hpp || echo nlohmann-json3-dev
  [ "$purpose" != run ] || return 0
  has_header doctest/doctest.h || echo doctest-dev
  has_header simde/x86/avx512.h || echo libsimde-dev
  has_header CLI/CLI.hpp || echo libcli11-dev
}

mapfile -t missing < <(missing_packages)
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "Debian/Ubuntu packages are missing; as root: apt-get install ${missing[*]}"
  fi
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -eq 0 ] ||
    fail "installed, but not for $(command -v "$python") and $cxx: ${missing[*]}"
fi

# ==== The environment, built from what is in the clone

if ! has_venv; then
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    fail "$venv: expected a virtual environment or nothing, found something else"
  fi
  say "making $venv"
  if has_module ensurepip; then
    "$python" -m venv --clear "$venv"
  else
    "$python" -m venv --clear --without-pip "$venv"
    "$python" -m pip -qq --python "$venv/bin/python" install pip
  fi
fi
rm -f "$venv"/frspec-*.stamp
export PATH="$venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
install() { "$venv/bin/python" -m pip -qq install "$@"; }

# What the build needs beside the compiler, once more than in pyproject.toml: without build
# isolation these keep their place, and a rebuild compiles only what changed.
tools=("scikit-build-core>=0.10" "nanobind>=2.4" "typing_extensions")
cmake_version=$(cmake --version 2>/dev/null | sed -n '1s/.* //p' || true)
oldest=$(printf '%s\n' "${cmake_version:-0}" 3.25 | sort -V | head -n 1)
[ "$oldest" = 3.25 ] || tools+=("cmake>=3.25")
command -v ninja >/dev/null || tools+=(ninja)
# The compiler and the headers of CUDA from PyPI, where the system has none: the kernels' tests are
# compiled for an emulation of CUDA, and the kernels themselves for every GPU.
if [ "$purpose" != run ] && ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
  tools+=("nvidia-cuda-nvcc==13.*" "nvidia-cuda-crt==13.*" "nvidia-nvvm==13.*")
  tools+=("nvidia-cuda-runtime==13.*" "nvidia-cuda-cccl==13.*")
fi
# Pinned, because every version formats a little otherwise.
[ "$purpose" != ci ] || tools+=(clang-format==14.0.6 ruff==0.17.6)
say "fetching build tools"
install "${tools[@]}"

# Options of an earlier build would stay in force; objects are kept.
rm -f build/cp*/CMakeCache.txt
say "building and installing frspec (some minutes the first time)"
if [ "$purpose" = run ]; then
  install --no-build-isolation .
else
  install --no-build-isolation ".[test]"
fi
echo "$now" >"$venv/frspec-$purpose.stamp"
say "frspec is ready in $venv"
