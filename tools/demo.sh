#!/usr/bin/env bash
# The main job on a bare machine: sets everything up, then `frspec demo`. Options go to the demo.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
bash "$here/setup.sh" run
exec "${FRSPEC_VENV:-$here/../.venv}/bin/frspec" demo "$@"
