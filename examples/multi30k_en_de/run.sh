#!/usr/bin/env bash
# From Multi30k's files to a table of BLEU scores in one command: bash run.sh [--small] [EXPERIMENT]
#
# Prepares the data, trains the systems of the experiment with every seed, chooses each model's length penalty on
# the validation set, scores the test set, and compares every system with the first.
# Run again after an interruption: what is finished is skipped.
#
#   finetuning          soft beam against further teacher forcing, from one pre-trained model (default)
#   attention           what relaxes the attention, in the settings of that model
#   attention_paper     the same in the settings of the paper's Table 4: words, 2 layers of 500, SGD
#
#   --small             a few sentences and updates, to see that everything runs; its BLEU means nothing
#   MULTI30K=folder     Multi30k's files; else they are downloaded
#   RUN=folder          where everything goes (default: runs/multi30k_en_de in this project, with _words for
#                       attention_paper and with _small for --small)
#   SYSTEMS="..."       names in finetuning.txt, or in attention.txt (default: all)
#   SEEDS="1 2 3"
#   JOBS=2              systems trained at a time, with OMP_NUM_THREADS=1 thread each
#   BPE_MERGES=4000     joint; 0: words
#   MODEL=lstm          or transformer, with a RUN of its own
#   EPOCHS UPDATES=800 ATTENTION=softmax PRETRAINED=file     see train.sh --help
#   LENPENS="0.5 1 1.5 2 2.5"
set -euo pipefail

small='' words='' experiment=
if [ "${1:-}" = --small ]; then
  small=_small
  shift
fi
experiment=${1:-finetuning} systems=attention.txt
case $experiment in
  finetuning) systems=finetuning.txt ;;
  attention_paper)
    words=_words
    export BPE_MERGES=${BPE_MERGES:-0}
    ;;
esac
export RUN=${RUN:-$(dirname "${BASH_SOURCE[0]}")/../../runs/multi30k_en_de$words$small}
if [ -n "$small" ]; then
  export TRAIN_PAIRS=${TRAIN_PAIRS:-200} HELD_OUT=${HELD_OUT:-20} BPE_MERGES=${BPE_MERGES:-200}
  export EPOCHS=${EPOCHS:-2} UPDATES=${UPDATES:-3}
  export LENPENS=${LENPENS:-0.5 2} SEEDS=${SEEDS:-1}
fi
# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "$experiment" != --help ] || show_help
[ $# -le 1 ] || fail "wants at most --small and one experiment, got $*"
[[ $experiment =~ ^(finetuning|attention|attention_paper)$ ]] ||
  fail "no experiment $experiment, only finetuning, attention and attention_paper"
need python subword-nmt fairseq-preprocess fairseq-train fairseq-generate sacrebleu

# ---------------------------------------------------------------------------------------- what to train

names=$(awk '/^[^#]/ { print $1 }' "$recipe/$systems")
control=$(head -n 1 <<< "$names")
[ -n "$SYSTEMS" ] || SYSTEMS=$(echo "$names" | xargs)

for system in $SYSTEMS; do
  grep -qxF "$system" <<< "$names" || fail "no system $system in $systems, only $(echo "$names" | xargs)"
  if [[ $system =~ ^(sparsemax|entmax15)$ ]]; then
    python -c 'import entmax' 2> /dev/null ||
      fail "$system wants the package entmax: pip install entmax, or name the others in SYSTEMS"
  fi
done

list() { # a line for each model: its name, its options
  local system seed
  if [ "$experiment" = finetuning ] && [ -z "$PRETRAINED" ]; then echo finetuning/pretrained; fi
  for seed in $SEEDS; do
    for system in $SYSTEMS; do
      awk -v name="$system" -v seed="$seed" -v experiment="$experiment" \
        '$1 == name { $1 = experiment "/" name "/seed" seed; print $0, "--seed", seed }' "$recipe/$systems"
    done
  done
}

# ------------------------------------------------------------------------------------------------- steps

bash "$recipe/prepare.sh"
take_run_folder

if [ "$experiment" = finetuning ] && [ -z "$PRETRAINED" ]; then bash "$recipe/train.sh" finetuning/pretrained; fi

unfinished='' # what one system comes to does not keep the others from the table
# shellcheck disable=SC2016
list | xargs -P "$JOBS" -L 1 bash -c 'bash "$0/train.sh" "$@" && bash "$0/evaluate.sh" "$1"' "$recipe" ||
  unfinished=yes

models=$RUN/models/$experiment

compare() { # compare SYSTEM/SEED test|test-1: paired bootstrap test of its translations against the control's
  local folder=$models/$1 against=$models/$control/${1#*/}
  if [ ! -e "$folder/$2.txt" ] || [ ! -e "$against/$2.txt" ]; then return; fi
  if [ "$(grep -o ' from [0-9a-f]*$' "$folder/options")" != "$(grep -o ' from [0-9a-f]*$' "$against/options")" ]; then
    echo "run.sh: $1 was not fine-tuned from the same checkpoint as $control/${1#*/}: no comparison" >&2
    rm -f "$folder/$2.paired.json"
    unfinished=yes
    return
  fi
  if [ "$folder/$2.paired.json" -nt "$folder/$2.txt" ] && [ "$folder/$2.paired.json" -nt "$against/$2.txt" ]; then return; fi
  echo "-- compare $1/$2.txt with that of $control/${1#*/}"
  sacrebleu "$RUN/text/test.tok.de" -i "$against/$2.txt" "$folder/$2.txt" --tokenize none -lc --force -w 2 \
    --paired-bs --quiet > "$folder/paired.part"
  mv "$folder/paired.part" "$folder/$2.paired.json"
}

for folder in "$models"/*/seed*/; do # also what was trained before: its control may be new
  name=$(basename "$(dirname "$folder")")/$(basename "$folder")
  if [[ $name = "$control"/* ]] || [ ! -e "$folder/test.txt" ]; then continue; fi
  [ -e "$models/$control/${name#*/}/test.txt" ] || {
    echo "run.sh: $name has no $control/${name#*/} to compare with: add $control to SYSTEMS" >&2
    rm -f "$folder"/*.paired.json
  }
  for translations in test test-1; do compare "$name" "$translations"; done
done

echo
python "$recipe/table.py" write "$models" --control "$control" || unfinished=yes
echo
[ -z "$unfinished" ] || fail "not all systems are finished: mend what the messages above say and run again"
echo "tables: $models/results.tsv $models/results.md"
