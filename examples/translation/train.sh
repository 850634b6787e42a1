#!/usr/bin/env bash
# Trains one model: bash train.sh pretrained|control|soft_beam [fairseq-train options...]
#
#   pretrained          from scratch, with teacher forcing
#   control, soft_beam  fine-tunes that one, for the same number of updates: with teacher forcing, with the beam
#
#   SCHEDULE=modern     Adam, label smoothing; paper: the paper's, 1.1 million updates
#   UPDATES, FINETUNE_UPDATES   empty: the schedule's, 100,000 and 4,000, or 1,000,000 and 100,000
#   BATCH, FINETUNE_BATCH       of all processes together: tokens (modern: 64,000 and 16,000) or sentences (paper: 80)
#   UPDATE_FREQ         batches of which a process makes its share of an update; empty: of modern, as many as
#                       it takes to have the batches of 8 processes; of paper, 1
#   DEVICE=gpu          or cpu
#   PRECISION=fp16      or amp, or fp32, which is the only one on CPUs; empty: fp16 for modern on GPUs, else fp32.  There
#                       is no bf16: fairseq-train's own --bf16 is for TPUs
#   PROCESSES=1 NODES=1 NODE_RANK=0 MASTER=localhost:29500   see slurm.sh; one process for each GPU
#   RUN=folder          where everything goes
#
# Run again, it goes on from the last checkpoint; it refuses to go on with other options.  What comes out is
# RUN/models/NAME/model.pt, the mean of the last AVERAGE checkpoints.  Options of fairseq-train come last and override.
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[[ ${1:-} =~ ^(pretrained|control|soft_beam)$ ]] || fail "wants pretrained, control or soft_beam, see --help"
[[ $SCHEDULE =~ ^(modern|paper)$ ]] || fail "SCHEDULE must be modern or paper, got $SCHEDULE"
[[ $DEVICE =~ ^(gpu|cpu)$ ]] || fail "DEVICE must be gpu or cpu, got $DEVICE"
if [ -z "$PRECISION" ]; then
  PRECISION=fp32
  [ "$DEVICE-$SCHEDULE" != gpu-modern ] || PRECISION=fp16
fi
[[ $PRECISION =~ ^(fp16|amp|fp32)$ ]] || fail "PRECISION must be fp16, amp or fp32, got $PRECISION"
[ "$DEVICE" = gpu ] || [ "$PRECISION" = fp32 ] || fail "PRECISION must be fp32 on CPUs, got $PRECISION"
need python fairseq-train torchrun
take_run_folder
name=$1 folder=$RUN/models/$1
shift

# ------------------------------------------------------------------------------------------ schedules

world=$((PROCESSES * NODES))
if [ "$SCHEDULE" = modern ]; then # tokens
  : "${UPDATE_FREQ:=$(((world + 7) / world))}" "${BATCH:=64000}" "${FINETUNE_BATCH:=16000}"
else # sentences
  : "${UPDATE_FREQ:=1}" "${BATCH:=80}" "${FINETUNE_BATCH:=80}"
fi
batch=$BATCH
[ "$name" = pretrained ] || batch=$FINETUNE_BATCH
parts=$((world * UPDATE_FREQ))
[ $((batch % parts)) -eq 0 ] || fail "a batch of $batch cannot be shared by $world processes with UPDATE_FREQ=$UPDATE_FREQ: change one"
batch=$((batch / parts))

case $SCHEDULE-$name in
  modern-pretrained)
    updates=${UPDATES:-100000}
    schedule=(
      --criterion label_smoothed_cross_entropy --label-smoothing 0.1
      --optimizer adam --adam-betas '(0.9, 0.98)' --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-updates 4000
      --clip-norm 1 --max-tokens "$batch"
    )
    ;;
  modern-*)
    updates=${FINETUNE_UPDATES:-4000}
    schedule=(
      --criterion soft_beam --label-smoothing 0.1
      --optimizer adam --lr 3e-4 --lr-scheduler polynomial_decay --total-num-update "$updates"
      --clip-norm 1 --max-tokens "$batch"
    )
    ;;
  paper-pretrained) # the learning rate falls to a tenth every 1e5 updates, from 5e5 on
    updates=${UPDATES:-1000000}
    schedule=(
      --criterion cross_entropy --optimizer sgd --lr 1 --lr-scheduler manual
      --update2lr "{'1':1,'500000':1e-1,'600000':1e-2,'700000':1e-3,'800000':1e-4,'900000':1e-5}"
      --clip-norm 1 --batch-size "$batch" --sentence-avg
    )
    ;;
  paper-*)
    updates=${FINETUNE_UPDATES:-100000}
    schedule=(
      --criterion soft_beam --soft-beam-objective gold --soft-beam-size 5 --soft-beam-epsilon 0.1
      --soft-beam-score-grad-clip 0.5 --teacher-forcing-ratio 0.8
      --optimizer sgd --lr 0.05 --lr-scheduler fixed --clip-norm 1 --batch-size "$batch" --sentence-avg
    )
    ;;
esac
every=$((updates < 20 ? 1 : updates / 20)) # 20 checkpoints, of which the last are kept
schedule+=(--max-update "$updates" --save-interval-updates "$every" --keep-interval-updates "$AVERAGE")

start=() origin=''
if [ "$name" != pretrained ]; then
  pretrained=$RUN/models/pretrained/model.pt
  [ -f "$pretrained" ] || fail "$name starts from $pretrained: train that first"
  start=(--finetune-from-model "$pretrained" --disable-validation)
  origin=" from $(sha256sum < "$pretrained" | cut -c 1-16)"
fi
if [ "$name" = control ]; then schedule+=(--teacher-forcing-ratio 1); fi

[ -d "$RUN/data-bin" ] || fail "$RUN/data-bin is not there: run prepare.sh"
if [ "$SCHEDULE" = modern ]; then # fairseq would leave out what is longer than a batch
  longest=$(cat "$RUN"/pieces/[0-9]*.longest | sort -n | tail -n 1)
  [ "$batch" -gt "$longest" ] ||
    fail "a process takes batches of $batch tokens, less than the longest sentence has, $longest: change BATCH or FINETUNE_BATCH, or UPDATE_FREQ=$UPDATE_FREQ"
fi

# ------------------------------------------------------------------------------------------- processes

engine=(--update-freq "$UPDATE_FREQ" --distributed-world-size "$world" --load-checkpoint-on-all-dp-ranks)
[ "$DEVICE" = gpu ] || engine+=(--cpu)
[ "$PRECISION" = fp32 ] || engine+=("--$PRECISION")

launch() { # launch OPTIONS...: fairseq-train, in as many processes as are wanted
  if [ "$world" -eq 1 ]; then
    fairseq-train "$@"
    return
  fi
  local backend=nccl
  [ "$DEVICE" = gpu ] || backend=gloo
  # shellcheck disable=SC2016
  torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$PROCESSES" \
    --master-addr "${MASTER%:*}" --master-port "${MASTER##*:}" --no-python \
    bash -c 'exec fairseq-train "$@" --distributed-rank "$RANK" --device-id "$LOCAL_RANK"' fairseq-train "$@" \
    --distributed-init-method env:// --distributed-no-spawn --distributed-backend "$backend" --ddp-backend legacy_ddp
}

data=$(for shard in $(shards); do echo "$RUN/data-bin/$shard"; done | paste -sd :)
log=$folder/train.log
mkdir -p "$folder"
if [ "$NODE_RANK" -eq 0 ]; then
  options="${ARCH[*]} ${schedule[*]} $*; $world x $UPDATE_FREQ such batches, $PRECISION$origin"
  if [ ! -e "$folder/options" ]; then
    echo "$options" > "$folder/options.part"
    mv "$folder/options.part" "$folder/options"
  fi
  [ "$(cat "$folder/options")" = "$options" ] ||
    fail "$folder was trained with other options, or from another model (see the file options in it): remove it or choose another RUN"
else
  log=$folder/train-$NODE_RANK.log
fi
[ ! -e "$folder/model.pt" ] || { echo "-- train $name: done before" && exit; }
need_device
[ "$NODE_RANK" -gt 0 ] || lock "$folder"

echo "-- train $name, log in $log"
if [ "$NODE_RANK" -eq 0 ]; then
  trap 'echo "$SECONDS" >> "$folder/seconds"' EXIT # a line for each start
  python "$here/checkpoints.py" mend "$folder"
fi
logged "$log" launch "$data" --user-dir "$PLUGIN" -s "$SRC" -t "$TGT" --save-dir "$folder" \
  "${start[@]}" "${ARCH[@]}" "${schedule[@]}" "${engine[@]}" --required-batch-size-multiple 1 \
  --max-tokens-valid 4000 --keep-last-epochs "$AVERAGE" --seed 1 \
  --log-format simple --log-interval "$((every < 100 ? every : 100))" "$@"
if [ "$NODE_RANK" -eq 0 ]; then
  python "$here/checkpoints.py" average "$folder" "$AVERAGE" "$every" "$folder/model.part"
  mv "$folder/model.part" "$folder/model.pt"
else # what starts from it on this machine must find it
  for ((second = 0; second < 600; second++)); do
    [ ! -f "$folder/model.pt" ] || exit 0
    sleep 1
  done
  fail "the first machine has not written $folder/model.pt ten minutes after the training's end"
fi
