#!/usr/bin/env bash
# From a fresh machine to a training: makes .venv in this checkout, installs the project into it,
# and starts.
#
#   ./launch.sh                    the tour: the report's study in miniature, on any machine, in
#                                  about two minutes
#   ./launch.sh test [ARGS]        the linters, the type checker and the tests (ARGS go to pytest)
#   ./launch.sh OPTIONS            train, as `accelerate launch -m cifar_accel OPTIONS` does
#   ./launch.sh COMMAND [ARGS]     as `cifar-accel COMMAND ARGS` does: study, report, predict
#
# Needs python3 >= 3.11, nothing else; uses uv when it is there. PYTHON chooses the interpreter.
# Signals reach the training, and its exit code comes back: 0 done, 2 bad input, 143 stopped by a
# signal after a checkpoint, 1 the rest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$here/.venv"

die() { echo "launch.sh: $*" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python3.14}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python3 ./launch.sh"
}

# Make .venv with the interpreter $1, and install $2 (the checkout, perhaps with an extra) into it.
install_with_uv() {
  if [ ! -x "$venv/bin/python" ]; then
    uv venv --quiet --seed --python "$1" "$venv"
  fi
  VIRTUAL_ENV="$venv" uv pip install --quiet \
    --constraint "$here/constraints.txt" --editable "$2"
}

install_with_pip() {
  if [ ! -x "$venv/bin/pip" ]; then
    "$1" -m venv "$venv" ||
      die "python3 cannot make a virtual environment (on Debian: apt install python3-venv)"
  fi
  "$venv/bin/pip" install --quiet --disable-pip-version-check \
    --constraint "$here/constraints.txt" --editable "$2"
}

# Install the project with extra $1 ("" or "dev"), unless this very state was installed before.
install() {
  local extra=$1
  local stamp="$venv/.installed$extra"
  local python=""
  local state
  # Found first, so that a machine without a Python is told so before anything else.
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python) || exit 2
  fi
  state=$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)
  if [ -z "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    return
  fi

  local target="$here"
  if [ -n "$extra" ]; then
    target="$here[$extra]"
  fi
  local tool=pip
  if command -v uv >/dev/null; then
    tool=uv
  fi
  echo "launch.sh: installing into $venv with $tool" \
    "(torch is large: the first time takes a minute or more)"
  "install_with_$tool" "$python" "$target"
  echo "$state" > "$stamp"
}

case "${1-}" in
  test)
    shift
    install dev
    cd "$here"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
    exec "$venv/bin/python" -m pytest "$@"
    ;;
  *)
    install ""
    exec "$venv/bin/python" -m cifar_accel.launch "$@"
    ;;
esac
