#!/usr/bin/env bash
# Makes a virtual environment with this package in it, or brings an existing one up to date:
#
#   bash scripts/make_env.sh FOLDER EXTRAS        e.g.  bash scripts/make_env.sh .venv examples,plots
#
# PYTHON  interpreter for a new environment, 3.10 or later     TORCH  version of PyTorch, if it has none
set -euo pipefail
unset CDPATH

venv=${1:?usage: make_env.sh FOLDER EXTRAS}
extras=${2:?usage: make_env.sh FOLDER EXTRAS}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

say() { printf '\n== %s\n' "$*"; }

if [ ! -e "$venv/bin/activate" ]; then # the last file that venv writes
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "make_env.sh: Python 3.10 or later is needed, $python is $("$python" -V 2>&1)" >&2
    exit 1
  fi
  say "new virtual environment in $venv"
  "$python" -m venv "$venv"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"

# Requirements are installed once for every content of setup.py; the package itself, always.
stamp="$venv/.requirements-${extras//,/-}-$(cksum < "$root/setup.py" | tr ' ' '-')"

if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  # The build of fairseq-fixed needs PyTorch, and pip would fetch a CUDA build of it (several GB) for that purpose
  # alone: PyTorch comes first, in the build that fits the machine, and the build uses it.
  default_torch=2.13.0 pip=pip isolation=--no-build-isolation
else
  # Stock fairseq is built where there is no PyTorch (its archive lacks the sources of the extension that it would
  # build otherwise), and later versions of pip refuse the metadata of its requirements.
  default_torch=2.5.1 pip="pip<24.1" isolation=
fi

install_torch() {
  local version=${TORCH:-$default_torch}
  if python -c 'import torch' 2> /dev/null; then
    return
  elif [ "$(uname -s)" != Linux ] || nvidia-smi -L > /dev/null 2>&1; then
    pip install "torch==$version"
  elif ! pip install "torch==$version+cpu"; then # a CPU build, if pip is configured to find one
    say "no CPU build of PyTorch where pip looks: uv knows where they are published"
    pip install uv
    if ! uv pip install --torch-backend cpu "torch==$version"; then
      say "not to be reached: the build that pip finds, which may bring CUDA with it, several GB"
      pip install "torch==$version"
    fi
  fi
}

if [ ! -e "$stamp" ]; then
  say "PyTorch"
  install_torch
  say "fairseq and the other requirements ($extras)"
  pip install "$pip" setuptools wheel cython numpy
  pip install ${isolation:+"$isolation"} "${root}[$extras]"
  touch "$stamp"
fi

say "fairseq_softtopk"
rm -rf "$root/build" # setuptools would pack what was deleted since the last build
pip install --quiet --no-build-isolation --no-deps --force-reinstall "$root"
