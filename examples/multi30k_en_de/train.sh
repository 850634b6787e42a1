#!/usr/bin/env bash
# Trains one model, with the settings that all share: bash train.sh NAME [fairseq-train options...]
#
#   bash train.sh pretrained                               pre-trains, with teacher forcing
#   bash train.sh control/seed2 --seed 2 --teacher-forcing-ratio 1
#   bash train.sh NAME OPTIONS                             fine-tunes, with --criterion soft_beam
#
# The options come last, so they override the settings below.  What comes out is RUN/models/NAME/model.pt; a
# model that is there is not trained again, one that was interrupted goes on where it was.
#
#   ATTENTION=softmax   or soft_topk: what the pre-trained model and all others attend with
#   PRETRAIN_EPOCHS=10  of pre-training; the one with the best validation loss is taken
#   UPDATES=600        of fine-tuning; the last one is taken
#   PRETRAINED=file     fine-tune from this checkpoint
#   RUN=folder          where everything goes
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -gt 0 ] || fail "which model? see --help"
[[ $1 != -* ]] || fail "the first argument is the name of the model, got $1"
need fairseq-train
take_run_folder
name=$1 folder=$RUN/models/$1
shift

# ------------------------------------------------------------------------------------------ settings

model=(
  --arch topk_attention_tiny --attention-relaxation "$ATTENTION" --dropout 0.2
  --encoder-embed-dim 256 --encoder-hidden-size 256
  --decoder-embed-dim 256 --decoder-hidden-size 256 --decoder-out-embed-dim 256
)
if [ "$BPE_MERGES" -gt 0 ]; then model+=(--share-all-embeddings); fi # words: a dictionary for each language

case $name in
  pretrained)
    kept=checkpoint_best.pt
    training=(
      --criterion label_smoothed_cross_entropy --label-smoothing 0.1
      --optimizer adam --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-updates 300 --clip-norm 1
      --max-tokens 2000 --max-epoch "$PRETRAIN_EPOCHS"
    )
    start=()
    ;;
  *)
    kept=checkpoint_last.pt
    training=(
      --criterion soft_beam
      --optimizer adam --lr 2e-4 --clip-norm 1
      --max-tokens 600 --max-update "$UPDATES"
      --disable-validation --save-interval-updates 500 --keep-interval-updates 1
    )
    start=(--finetune-from-model "${PRETRAINED:-$RUN/models/pretrained/model.pt}")
    [ -f "${start[1]}" ] || fail "$name starts from ${start[1]}, which is not there: bash train.sh pretrained"
    ;;
esac

# ------------------------------------------------------------------------------------------ training

options="${model[*]} ${training[*]} $*${PRETRAINED:+ from $PRETRAINED}"
mkdir -p "$folder"
[ -e "$folder/options" ] || echo "$options" > "$folder/options"
[ "$(cat "$folder/options")" = "$options" ] ||
  fail "$folder was trained with other options (see the file options in it): remove it or choose another name"
[ ! -e "$folder/model.pt" ] || { echo "-- train $name: done before" && exit; }

echo "-- train $name, log in $folder/train.log"
git -C "$root" describe --always --dirty > "$folder/commit" 2> /dev/null || echo unknown > "$folder/commit"
trap 'echo "$SECONDS" >> "$folder/seconds"' EXIT # a line for each time it was started
logged "$folder/train.log" fairseq-train "$RUN/data-bin" \
  --user-dir "$PLUGIN" --save-dir "$folder" "${start[@]}" "${model[@]}" "${training[@]}" \
  --required-batch-size-multiple 1 --num-workers 0 --seed 1 \
  --no-epoch-checkpoints --log-format simple --log-interval 25 "$@"
mv "$folder/$kept" "$folder/model.pt"
rm -f "$folder"/checkpoint*.pt
