#!/usr/bin/env bash
# From corpora to a table of BLEU scores in one command: bash run.sh [--small]
#
# Prepares the data, pre-trains with teacher forcing, fine-tunes with teacher forcing (the control) and with
# soft_beam, translates the test set with each, and scores it.  Run again after an interruption: it goes on.
#
#   --small             the size of a test: 2 processes on the CPU, a small model, a few updates; its BLEU means
#                       nothing
#
# The settings of prepare.sh and train.sh (see their --help) are given from outside: DATA=folder PROCESSES=8 bash run.sh
set -euo pipefail

if [ "${1:-}" = --small ]; then
  shift
  export SMALL=1 DEVICE=${DEVICE:-cpu} PROCESSES=${PROCESSES:-2} WORKERS=${WORKERS:-2} OMP_NUM_THREADS=1
  export HELD_OUT=${HELD_OUT:-100} MERGES=${MERGES:-1000} SHARD=${SHARD:-4000} UPDATES=${UPDATES:-40}
  export FINETUNE_UPDATES=${FINETUNE_UPDATES:-4} AVERAGE=${AVERAGE:-2}
fi
# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -eq 0 ] || fail "the only option is --small, got $*"

bash "$here/prepare.sh"
take_run_folder
options=()
if [ -n "${SMALL:-}" ]; then options=(--max-tokens 1000 --max-sentences-valid 50 --log-interval 5); fi
for name in pretrained control soft_beam; do bash "$here/train.sh" "$name" "${options[@]}"; done
for name in pretrained control soft_beam; do
  folder=$RUN/models/$name
  [ ! -e "$folder/scores.json" ] || continue
  echo "-- translate and score $name"
  bash "$here/generate.sh" "$name" test "$folder/test.txt"
  bash "$here/score.sh" "$folder/test.txt" test > /dev/null
  mv "$folder/test.txt.json" "$folder/scores.json"
done
echo
python "$root/scripts/score_table.py" "$RUN"/models/{pretrained,control,soft_beam}
