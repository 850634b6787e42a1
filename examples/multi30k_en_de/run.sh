#!/usr/bin/env bash
# From Multi30k's files to a table of BLEU scores in one command: bash run.sh [--small]
#
# Prepares the data, pre-trains a model, fine-tunes it once for every system in systems.txt and every seed,
# chooses each one's length penalty on the validation set, scores the test set, and compares every system with
# `control`.
# Run again after an interruption: what is finished is skipped.
#
#   --small             a few sentences and updates, to see that everything runs; its BLEU means nothing
#   MULTI30K=folder     Multi30k's files; else they are downloaded
#   RUN=folder          where everything goes (default: runs/multi30k_en_de in this project, with --small
#                       runs/multi30k_en_de_small)
#   SYSTEMS="..."       names in systems.txt (default: all)
#   SEEDS="1 2 3"       of fine-tuning
#   JOBS=2              systems trained at a time, with OMP_NUM_THREADS=1 thread each
#   BPE_MERGES=4000     joint; 0: words
#   UPDATES=600 PRETRAIN_EPOCHS=10 ATTENTION=softmax PRETRAINED=file     see train.sh --help
#   LENPENS="0.5 1 1.5 2 2.5"
set -euo pipefail

if [ "${1:-}" = --small ]; then
  shift
  export RUN=${RUN:-$(dirname "${BASH_SOURCE[0]}")/../../runs/multi30k_en_de_small}
  export TRAIN_PAIRS=200 HELD_OUT=20 BPE_MERGES=${BPE_MERGES:-200} PRETRAIN_EPOCHS=2 UPDATES=3
  export LENPENS=${LENPENS:-0.5 2} SEEDS=${SEEDS:-1}
fi
# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -eq 0 ] || fail "the only option is --small, got $*"
need python subword-nmt fairseq-preprocess fairseq-train fairseq-generate sacrebleu

# ------------------------------------------------------------------------------------- what to fine-tune

names=$(grep -vE '^[[:space:]]*(#|$)' "$recipe/systems.txt" | awk '{ print $1 }')
[ -n "$SYSTEMS" ] || SYSTEMS=$(echo "$names" | xargs)

list() { # a line for each model: its name, its options
  local system seed
  [ -n "$PRETRAINED" ] || echo pretrained
  for seed in $SEEDS; do
    for system in $SYSTEMS; do
      awk -v name="$system" -v seed="$seed" \
        '$1 == name { $1 = name "/seed" seed; print $0, "--seed", seed }' "$recipe/systems.txt"
    done
  done
}

for system in $SYSTEMS; do
  grep -qxF "$system" <<< "$names" || fail "no system $system in systems.txt, only $(echo "$names" | xargs)"
done

# ------------------------------------------------------------------------------------------------- steps

bash "$recipe/prepare.sh"
take_run_folder

[ -n "$PRETRAINED" ] || bash "$recipe/train.sh" pretrained

# shellcheck disable=SC2016
list | xargs -P "$JOBS" -L 1 bash -c 'bash "$0/train.sh" "$@" && bash "$0/evaluate.sh" "$1"' "$recipe" ||
  fail "not all systems are finished: mend what the messages above say and run again"

compare() { # compare SYSTEM SEED: paired bootstrap test of its translations against the control's
  local control=$RUN/models/control/seed$2/test.txt folder=$RUN/models/$1/seed$2
  if [ ! -e "$control" ] || [ "$folder/paired.json" -nt "$folder/test.txt" ]; then return; fi
  echo "-- compare $1/seed$2 with control/seed$2"
  sacrebleu "$RUN/text/test.tok.de" -i "$control" "$folder/test.txt" --tokenize none -lc --force -w 2 \
    --paired-bs --quiet > "$folder/paired.part"
  mv "$folder/paired.part" "$folder/paired.json"
}

for system in $SYSTEMS; do
  [ "$system" != control ] || continue
  for seed in $SEEDS; do compare "$system" "$seed"; done
done

echo
python "$recipe/table.py" write "$RUN"
echo
echo "tables: $RUN/results.tsv $RUN/results.md"
