#!/usr/bin/env bash
# Scores a model on the test set: bash evaluate.sh EXPERIMENT/NAME
#
# The length penalty is the one that is best on the validation set, and once more fairseq's default, 1: the two sets
# differ in how long their references are.  Writes into RUN/models/EXPERIMENT/NAME: valid-LENPEN.txt for each of
# LENPENS, lenpen (the chosen one), test.txt, test-1.txt, and the scores of them all.
#
#   LENPENS="0.5 1 1.5 2 2.5"
#   RUN=folder          where everything goes
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -eq 1 ] || fail "wants the name of a model, see --help"
take_run_folder
name=$1 folder=$RUN/models/$1
[ -f "$folder/model.pt" ] || fail "$folder/model.pt is not there: bash train.sh $name"
keep lenpens "LENPENS=$LENPENS" # a system that has more to choose from is not compared with others

translate() { # translate SPLIT OUT LENPEN
  [ ! "$2.bleu.json" -nt "$folder/model.pt" ] || { echo "-- ${2#"$RUN/models/"}: done before" && return; }
  echo "-- ${2#"$RUN/models/"}, lenpen $3"
  bash "$recipe/generate.sh" "$folder/model.pt" "$1" "$2" --lenpen "$3"
  bash "$recipe/score.sh" "$2" "$1" > /dev/null
}

for lenpen in $LENPENS; do translate valid "$folder/valid-$lenpen.txt" "$lenpen"; done
python "$recipe/table.py" choose "$folder" > "$folder/lenpen.part"
mv "$folder/lenpen.part" "$folder/lenpen"
translate test "$folder/test.txt" "$(cat "$folder/lenpen")"
translate test "$folder/test-1.txt" 1
