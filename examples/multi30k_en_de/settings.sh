# Settings, read by all scripts of the recipe.  Each can be set from outside: SEEDS="1 2" bash run.sh
# shellcheck shell=bash disable=SC2034
set -euo pipefail

unset CDPATH
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$recipe/../.." && pwd)
# shellcheck source=../functions.sh source-path=SCRIPTDIR
source "$recipe/../functions.sh"

# Where
export RUN=${RUN:-$root/runs/multi30k_en_de}        # everything goes here
export MULTI30K=${MULTI30K:-}                       # folder with Multi30k's files; empty: download them
export PLUGIN=${PLUGIN:-$root/fairseq_softtopk}     # --user-dir

# Data
export BPE_MERGES=${BPE_MERGES:-4000}               # joint; 0: words
export TRAIN_PAIRS=${TRAIN_PAIRS:-29000}            # at most so many sentence pairs, from the top
export HELD_OUT=${HELD_OUT:-1014}                   # the same of validation and test
DATA_SETTINGS="BPE_MERGES=$BPE_MERGES TRAIN_PAIRS=$TRAIN_PAIRS HELD_OUT=$HELD_OUT"

# Training
export MODEL=${MODEL:-lstm}                         # or transformer: what all but attention_paper train
export ATTENTION=${ATTENTION:-softmax}              # or another --attention-relaxation, of finetuning/pretrained
export EPOCHS=${EPOCHS:-}                           # of training from scratch; empty: see train.sh
export UPDATES=${UPDATES:-800}                       # of fine-tuning, for every system
export PRETRAINED=${PRETRAINED:-}                   # a checkpoint to fine-tune from; empty: pre-train one

# Evaluation
export LENPENS=${LENPENS:-0.5 1 1.5 2 2.5}          # length penalties to choose from, on validation

# What to run, and how
export SYSTEMS=${SYSTEMS:-}                         # names in the experiment's list; empty: all
export SEEDS=${SEEDS:-1 2 3}
export JOBS=${JOBS:-2}                              # at a time
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}        # threads of each
export PYTHONUTF8=1

keep() { # keep NAME SETTINGS: in RUN/NAME; work under other settings must not be taken for its own
  [ -e "$RUN/$1" ] || echo "$2" > "$RUN/$1"
  [ "$(cat "$RUN/$1")" = "$2" ] ||
    fail "$RUN was made with other settings ($(cat "$RUN/$1")): remove it or choose another RUN"
}

take_run_folder() {
  [[ $BPE_MERGES =~ ^[0-9]+$ ]] || fail "BPE_MERGES must be a whole number, 0 for words, got $BPE_MERGES"
  mkdir -p "$RUN"
  RUN=$(cd "$RUN" && pwd)
  [ ! -e "$RUN/settings" ] || keep settings "$DATA_SETTINGS"
}
