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
  export PAIRS=${PAIRS:-10000} HELD_OUT=${HELD_OUT:-100} MERGES=${MERGES:-1000} SHARD=${SHARD:-4000}
  export UPDATES=${UPDATES:-40} FINETUNE_UPDATES=${FINETUNE_UPDATES:-4} AVERAGE=${AVERAGE:-2}
  if [ "${SCHEDULE:-modern}" = modern ]; then
    export BATCH=${BATCH:-2000} FINETUNE_BATCH=${FINETUNE_BATCH:-2000} UPDATE_FREQ=${UPDATE_FREQ:-1}
  fi
fi
# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -eq 0 ] || fail "the only option is --small, got $*"
[ "$NODES" -eq 1 ] || fail "is for one machine: with several, prepare.sh on one, then train.sh on each, see README.md"

need_device
bash "$here/prepare.sh"
take_run_folder
options=()
if [ -n "${SMALL:-}" ]; then options=(--batch-size-valid 50 --log-interval 5); fi
for name in pretrained control soft_beam; do bash "$here/train.sh" "$name" "${options[@]}"; done
for name in pretrained control soft_beam; do
  folder=$RUN/models/$name
  [ ! "$folder/scores.json" -nt "$folder/model.pt" ] || continue
  echo "-- translate and score $name"
  bash "$here/generate.sh" "$name" test "$folder/test.txt"
  bash "$here/score.sh" "$folder/test.txt" test > /dev/null
  mv "$folder/test.txt.json" "$folder/scores.json"
done
echo
python "$root/scripts/score_table.py" "$RUN"/models/{pretrained,control,soft_beam}
