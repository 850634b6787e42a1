#!/usr/bin/env bash
# Runs every check: linters, type checker, and the tests against the installed package.
#
#   bash scripts/test.sh [pytest arguments]
#
# VENV  virtual environment, made if there is none (default: .venv in this project)
set -euo pipefail
unset CDPATH

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

bash "$root/scripts/make_env.sh" "$venv" dev
# shellcheck disable=SC1091
source "$venv/bin/activate"

echo "== ruff, mypy, shellcheck"
cd "$root"
ruff check .
ruff format --check .
older=()
if python -c 'import sys, torch; sys.exit(torch.__version__ >= (2, 6))'; then
  older=(--allow-untyped-decorators --no-warn-return-any --no-warn-unused-ignores) # its annotations have holes
fi
mypy "${older[@]}"
shellcheck -x scripts/*.sh examples/*.sh examples/*/*.sh .ci/run

# Away from the project's root, so that what is imported is what was installed.
echo "== pytest"
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
cd "$away"
# One thread a process: two processes that each want all cores slow each other down.
OMP_NUM_THREADS=1 python -m pytest "$root/tests" -p no:cacheprovider -n "${JOBS:-2}" "$@"
