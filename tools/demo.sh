#!/usr/bin/env bash
# The main job on a bare machine: sets everything up, then `frspec demo`. Options go to the demo.
set -euo pipefail
clone=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
bash "$clone/tools/setup.sh" run
venv=$(cd "$clone" && realpath -m "${FRSPEC_VENV:-.venv}")
exec "$venv/bin/frspec" demo "$@"
