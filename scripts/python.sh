#!/bin/sh
# Says nothing if the interpreter named can make the environment; else one sentence.
set -eu

python=${1:-python3}

if ! command -v "$python" >/dev/null; then
  echo "sparkdl needs Python 3.11 or later, and there is no $python on PATH: install one" \
    "(apt-get install python3 python3-venv), or name one: make install PYTHON=python3.12." >&2
  exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "sparkdl needs Python 3.11 or later, and $python is $("$python" -V 2>&1): name another," \
    "for example make install PYTHON=python3.12." >&2
  exit 1
fi
# Debian leaves these two out of its python3.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "$python cannot make virtual environments: install the package that can" \
    "(apt-get install python3-venv)." >&2
  exit 1
fi
