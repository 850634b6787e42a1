#!/usr/bin/env bash
# From sentences to BLEU in one command: bash examples/quickstart.sh [--small]
#
# Pre-trains topk_attention with teacher forcing, then fine-tunes it twice from the same checkpoint and for
# the same number of updates: with teacher forcing (the control) and with soft_beam.  Prints a table and draws an
# attention heat map and the loss curves.  Run again after an interruption: it goes on where it was.
#
#   --small               a tenth of the work, to see that everything runs; its BLEU means nothing
#   DATA=folder           your own sentences: train.SRC, train.TGT, valid.*, test.*; else a corpus is written
#   SRC=en TGT=de         languages (the written corpus: en to de or fr)
#   MERGES=1500           of BPE, joint
#   UPDATES=500           of pre-training; of real sentences some thousands
#   FINETUNE_UPDATES=100  of each of the two
#   MAX_TOKENS=1000       in an update
#   ARCH=topk_attention_tiny   or another LSTM, such as lstm
#   RUN=folder            where everything goes (default: runs/quickstart in this project)
#   VENV=folder           virtual environment, made if there is none (default: .venv in this project)
#   SEED=1
set -euo pipefail
unset CDPATH

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
run=${RUN:-$root/runs/quickstart}
data=${DATA:-} contents=''
src=${SRC:-en} tgt=${TGT:-de} seed=${SEED:-1}

pairs=8000 held_out=500 merges=1500
pretrain_updates=500 finetune_updates=100
max_tokens=${MAX_TOKENS:-1000} arch=${ARCH:-topk_attention_tiny} log_interval=25
# Threads that wait without spinning: a quarter slower on an idle machine, twice as fast on a busy one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
[ $# -le 1 ] || { echo "quickstart.sh: the only option is --small, got $*" >&2 && exit 2; }
case ${1:-} in
  '') ;;
  --small) pairs=800 held_out=50 merges=400 pretrain_updates=30 finetune_updates=10 log_interval=5 ;;
  -h | --help) sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//' && exit ;;
  *) echo "quickstart.sh: the only option is --small, got $1" >&2 && exit 2 ;;
esac
merges=${MERGES:-$merges} pretrain_updates=${UPDATES:-$pretrain_updates}
finetune_updates=${FINETUNE_UPDATES:-$finetune_updates}

fail() { echo "quickstart.sh: $*" >&2 && exit 1; }

check_data() { # the user's folder must hold six files, each as long as its other language's
  local split lang
  for split in train valid test; do
    for lang in "$src" "$tgt"; do
      [ -f "$data/$split.$lang" ] || fail "DATA=$data has no file $split.$lang"
      [ -s "$data/$split.$lang" ] || fail "$data/$split.$lang is empty"
    done
    local a b
    a=$(grep -c '' "$data/$split.$src") b=$(grep -c '' "$data/$split.$tgt")
    [ "$a" -eq "$b" ] || fail "$data/$split.$src has $a lines but $split.$tgt has $b: they must be parallel"
  done
}

for number in "$merges" "$pretrain_updates" "$finetune_updates" "$max_tokens"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "MERGES, UPDATES, FINETUNE_UPDATES and MAX_TOKENS are positive numbers, got $number"
done
if [ -n "$data" ]; then
  check_data
  data=$(cd "$data" && pwd)
  contents=$(cat "$data"/{train,valid,test}.{"$src","$tgt"} | cksum)
else
  case $src-$tgt in
    en-de | en-fr) ;;
    *) fail "the written corpus is en-de or en-fr, got $src-$tgt: set DATA for other languages" ;;
  esac
fi
mkdir -p "$run/done"
run=$(cd "$run" && pwd)
if type -P flock > /dev/null; then # what an interruption has left running keeps the lock
  exec 9> "$run/lock"
  flock --nonblock 9 || fail "$run is being worked on by another process"
fi

# A run folder belongs to one set of settings: steps of another must not be taken for its own.
settings="data=$data${contents:+ ($contents)} src=$src tgt=$tgt seed=$seed pairs=$pairs merges=$merges"
settings+=" arch=$arch tokens=$max_tokens updates=$pretrain_updates+$finetune_updates"
[ -e "$run/settings" ] || echo "$settings" > "$run/settings"
[ "$(cat "$run/settings")" = "$settings" ] ||
  fail "$run was made with other settings ($(cat "$run/settings")): remove it or choose another RUN"

step() { # step NAME COMMAND...: runs the command unless it has succeeded before
  local name=$1
  shift
  [ ! -e "$run/done/$name" ] || { echo "-- $name: done before" && return; }
  echo "-- $name"
  "$@"
  touch "$run/done/$name"
}

logged() { # logged FILE COMMAND...: everything into the file, what shows progress onto the terminal
  local log=$1
  shift
  "$@" 2>&1 | tee -a "$log" | grep --line-buffered -oE '(train_inner|valid) \| .{,190}|Translated .*' ||
    [ "${PIPESTATUS[0]}" -eq 0 ] || { tail -n 15 "$log" >&2 && fail "$1 failed, see $log"; }
}

# ---------------------------------------------------------------------------------------- sentences

write_corpus() {
  python "$root/scripts/write_corpus.py" --target "$tgt" --out "$run/text" --seed "$seed" \
    --train "$pairs" --valid "$held_out" --test "$held_out"
}

take_data() {
  mkdir -p "$run/text"
  local split lang
  for split in train valid test; do
    # Some tools take a carriage return within a line for its end.
    for lang in "$src" "$tgt"; do tr '\r' ' ' < "$data/$split.$lang" > "$run/text/$split.$lang"; done
  done
}

tokenize() {
  local split lang
  for split in train valid test; do
    for lang in "$src" "$tgt"; do
      sacremoses -q -l "$lang" tokenize -a < "$run/text/$split.$lang" > "$run/text/$split.tok.$lang"
    done
  done
}

learn_bpe() {
  cat "$run/text/train.tok.$src" "$run/text/train.tok.$tgt" |
    subword-nmt learn-bpe -s "$merges" > "$run/text/codes" 2>> "$run/bpe.log" ||
    fail "subword-nmt failed, see $run/bpe.log"
  local split lang
  for split in train valid test; do
    for lang in "$src" "$tgt"; do
      subword-nmt apply-bpe -c "$run/text/codes" < "$run/text/$split.tok.$lang" > "$run/text/$split.bpe.$lang"
    done
  done
}

binarize() {
  rm -rf "$run/data-bin"
  logged "$run/preprocess.log" fairseq-preprocess -s "$src" -t "$tgt" --joined-dictionary \
    --trainpref "$run/text/train.bpe" --validpref "$run/text/valid.bpe" --testpref "$run/text/test.bpe" \
    --destdir "$run/data-bin"
}

# ----------------------------------------------------------------------------------------- training

note_time() { echo $((SECONDS - began)) >> "$run/$training/seconds"; } # a line for each time it was started

train() { # train NAME OPTIONS...: resumes from checkpoint_last.pt if there is one
  local name=$1
  shift
  mkdir -p "$run/$name"
  training=$name began=$SECONDS
  trap note_time EXIT
  logged "$run/$name/train.log" fairseq-train "$run/data-bin" \
    --user-dir fairseq_softtopk --arch "$arch" --share-all-embeddings \
    --dropout 0.1 --optimizer adam --max-tokens "$max_tokens" --required-batch-size-multiple 1 \
    --seed "$seed" --save-dir "$run/$name" --no-epoch-checkpoints --save-interval-updates 100 --keep-interval-updates 1 \
    --log-format simple --log-interval "$log_interval" "$@"
  trap - EXIT
  note_time
}

pretrain() {
  train pretrained --criterion soft_beam --teacher-forcing-ratio 1 --max-update "$pretrain_updates" \
    --lr 5e-3
}

finetune() { # finetune NAME OPTIONS...
  local name=$1
  shift
  train "$name" --finetune-from-model "$run/pretrained/checkpoint_last.pt" --max-update "$finetune_updates" \
    --lr 5e-4 --clip-norm 1 --criterion soft_beam "$@"
}

# ------------------------------------------------------------------------------------------ scoring

translate() { # translate NAME: beam search, detokenised
  local name=$1
  logged "$run/$name/generate.log" fairseq-generate "$run/data-bin" --user-dir fairseq_softtopk \
    --path "$run/$name/checkpoint_last.pt" --beam 5 --max-tokens 4000 --required-batch-size-multiple 1 \
    --source-lang "$src" --target-lang "$tgt" --tokenizer moses --bpe subword_nmt --bpe-codes "$run/text/codes" \
    --results-path "$run/$name"
  grep '^D-' "$run/$name/generate-test.txt" | sed 's/^D-//' | sort -n | cut -f3 > "$run/$name/hypotheses.$tgt"
  sacrebleu "$run/text/test.$tgt" -i "$run/$name/hypotheses.$tgt" -m bleu chrf > "$run/$name/scores.tmp"
  mv "$run/$name/scores.tmp" "$run/$name/scores.json"
}

draw() {
  python "$root/scripts/plot_training.py" "$run/control/train.log" "$run/soft_beam/train.log" --out "$run/loss.png"
  python "$root/scripts/plot_attention.py" "$run/data-bin" "$run/soft_beam/checkpoint_last.pt" \
    --bpe-codes "$run/text/codes" --sentence="$(grep -m 1 . "$run/text/test.$src")" --out "$run/attention.png"
}

# --------------------------------------------------------------------------------------- everything

bash "$root/scripts/make_env.sh" "$venv" examples,plots
# shellcheck disable=SC1091
source "$venv/bin/activate"
begin=$SECONDS
cd "$run" # a folder named fairseq_softtopk in the current folder would shadow the installed package

if [ -n "$data" ]; then step corpus take_data; else step corpus write_corpus; fi
step tokenize tokenize
step bpe learn_bpe
step binarize binarize
step pretrain pretrain
step finetune-control finetune control --teacher-forcing-ratio 1
# A fifth of teacher forcing, as so short a pre-training leaves it much to learn; half the beams, for half the time
step finetune-soft-beam finetune soft_beam --teacher-forcing-ratio 0.2 --soft-beam-size 5 --soft-beam-hypotheses 10
for name in pretrained control soft_beam; do step "translate-$name" translate "$name"; done
step draw draw
echo
python "$root/scripts/score_table.py" "$run"/{pretrained,control,soft_beam}
echo
echo "pictures: $run/loss.png $run/attention.png     $((SECONDS - begin)) seconds after installation"
