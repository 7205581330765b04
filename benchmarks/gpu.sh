#!/usr/bin/env bash
# Every check and measurement that needs a GPU, within minutes, and one table at the end.
#
#   benchmarks/gpu.sh [--wheels FOLDER] [--minutes 9] [--out FILE]
#   benchmarks/gpu.sh --device cpu --tiny      the rehearsal, on any machine
#
# Needs a Python with torch, torchvision, timm, accelerate, scikit-learn and pyarrow: PYTHON names
# it. What else is missing is installed for this one call from the wheels in FOLDER. All other
# options are those of benchmarks/gpu.py (--help); docs/gpu.md tells more.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

wheels=""
words=()
while [ $# -gt 0 ]; do
  if [ "$1" = --wheels ]; then
    wheels=${2:?"--wheels needs a folder"}
    shift 2
  else
    words+=("$1")
    shift
  fi
done

path=$here
if [ -n "$wheels" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --target "$scratch" "$wheels"/*.whl
  path="$here:$scratch"
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m benchmarks.gpu ${words[@]+"${words[@]}"}
