#!/usr/bin/env bash
# Trains one model: bash train.sh EXPERIMENT/NAME [fairseq-train options...]
#
#   bash train.sh finetuning/pretrained             pre-trains, with teacher forcing
#   bash train.sh finetuning/NAME OPTIONS           fine-tunes that one, with --criterion soft_beam
#   bash train.sh attention/NAME OPTIONS            trains, with the settings of the pre-trained model
#   bash train.sh attention_paper/NAME OPTIONS      trains, with the settings of the paper's Table 4
#
# NAME is anything, such as control/seed2.  All models of an experiment share their settings, those below.
# The options come last, so they override the settings below.  What comes out is RUN/models/NAME/model.pt; a
# model that is there is not trained again, one that was interrupted goes on where it was.
#
#   ATTENTION=softmax  or another --attention-relaxation, also with its options ("soft_topk --attention-top-k 3"):
#                      with what finetuning/pretrained attends, and what is fine-tuned from it
#   MODEL=lstm         or transformer (attention_paper is an LSTM always)
#   EPOCHS=10          of training, 32 of a Transformer, 13 in attention_paper; the one with the best
#                      validation loss is taken.  On several devices an epoch has fewer updates: give
#                      --total-num-update, in which the learning rate falls to 0
#   UPDATES=800        of fine-tuning; the last one is taken
#   PRETRAINED=file    fine-tune from this checkpoint
#   RUN=folder         where everything goes
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -gt 0 ] || fail "which model? see --help"
[[ $1 =~ ^(finetuning|attention|attention_paper)/[^/] ]] ||
  fail "the first argument is finetuning/NAME, attention/NAME or attention_paper/NAME, got $1"
need fairseq-train
take_run_folder
name=$1 folder=$RUN/models/$1
shift

# ------------------------------------------------------------------------------------------ settings

case $MODEL in # both train on two CPU cores
  lstm)
    small=(
      --arch topk_attention_tiny --dropout 0.2 --encoder-embed-dim 256 --encoder-hidden-size 256
      --decoder-embed-dim 256 --decoder-hidden-size 256 --decoder-out-embed-dim 256
    )
    epochs=${EPOCHS:-10} per_epoch=524 # updates
    from_scratch=(--lr 2e-3 --warmup-updates 300 --max-tokens 1000) finetuning_lr=3e-4
    ;;
  transformer)
    small=(--arch topk_attention_transformer_tiny --dropout 0.2)
    epochs=${EPOCHS:-32} per_epoch=267
    from_scratch=(--lr 3e-3 --warmup-updates 1000 --max-tokens 2000) finetuning_lr=1e-4
    ;;
  *) fail "MODEL is lstm or transformer, got $MODEL" ;;
esac
scheduled=$((per_epoch * epochs))
if [ "$BPE_MERGES" -gt 0 ]; then small+=(--share-all-embeddings); fi # words: a dictionary for each language
from_scratch+=(
  --criterion label_smoothed_cross_entropy --label-smoothing 0.1
  --optimizer adam --lr-scheduler polynomial_decay --total-num-update "$scheduled"
  --clip-norm 1 --max-epoch "$epochs"
)

kept=checkpoint_best.pt start=()
case $name in
  attention/*) model=("${small[@]}") training=("${from_scratch[@]}") ;;
  attention_paper/*)
    [ "$BPE_MERGES" = 0 ] || fail "$name is of words: set BPE_MERGES=0, and a RUN of its own"
    # OpenNMT's defaults: 13 epochs of 64 sentences, the learning rate halved from the 9th on
    model=(--arch topk_attention_opennmt)
    training=(
      --criterion cross_entropy --sentence-avg
      --optimizer sgd --lr 1 --lr-scheduler fixed --force-anneal 9 --lr-shrink 0.5 --clip-norm 5
      --batch-size 64 --max-epoch "${EPOCHS:-13}"
    )
    ;;
  finetuning/pretrained)
    read -ra attention <<< "$ATTENTION"
    model=("${small[@]}" --attention-relaxation "${attention[@]}") training=("${from_scratch[@]}")
    ;;
  finetuning/*)
    kept=checkpoint_last.pt
    training=(
      --criterion soft_beam --label-smoothing 0.1
      --optimizer adam --lr "$finetuning_lr" --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --clip-norm 1
      --max-tokens 600 --max-update "$UPDATES"
      --disable-validation --save-interval-updates 500 --keep-interval-updates 1
    )
    start=(--finetune-from-model "${PRETRAINED:-$RUN/models/finetuning/pretrained/model.pt}")
    [ -f "${start[1]}" ] || fail "$name starts from ${start[1]}, which is not there: bash train.sh finetuning/pretrained"
    found=$(python "$recipe/attention.py" "${start[1]}") || exit 1 # it has said why
    read -ra attention <<< "$found"
    model=("${small[@]}" "${attention[@]}")
    ;;
esac

# ------------------------------------------------------------------------------------------ training

options="${model[*]} ${training[*]} $*"
if [ -n "${start[*]}" ]; then options+=" from $(sha256sum < "${start[1]}" | cut -c 1-12)"; fi
mkdir -p "$folder"
if [ ! -e "$folder/options" ]; then
  ! compgen -G "$folder/*.pt" > /dev/null || fail "$folder has a model, but not the file options: remove the folder"
  echo "$options" > "$folder/options"
fi
[ "$(cat "$folder/options")" = "$options" ] ||
  fail "$folder was trained with other options (see the file options in it): remove the folder or choose another name"
[ ! -e "$folder/model.pt" ] || { echo "-- train $name: done before" && exit; }
lock "$folder"

echo "-- train $name, log in $folder/train.log"
if [[ $name =~ ^(attention/|finetuning/pretrained$) ]] && [ "$BPE_MERGES $TRAIN_PAIRS" != "4000 29000" ]; then
  echo "   the learning rate is 0 after $scheduled updates, $epochs epochs of all pairs with 4,000 merges: for others,"
  echo "   give --total-num-update"
fi
git -C "$root" describe --always --dirty > "$folder/commit" 2> /dev/null || echo unknown > "$folder/commit"
trap 'echo "$SECONDS" >> "$folder/seconds"' EXIT # a line for each time it was started
logged "$folder/train.log" fairseq-train "$RUN/data-bin" \
  --user-dir "$PLUGIN" --save-dir "$folder" "${start[@]}" "${model[@]}" "${training[@]}" \
  --required-batch-size-multiple 1 --num-workers 0 --seed 1 \
  --no-epoch-checkpoints --log-format simple --log-interval 25 "$@"
mv "$folder/$kept" "$folder/model.pt"
rm -f "$folder"/checkpoint*.pt
