# Settings of a recipe, read by the scripts in this folder.  RECIPE is the recipe's folder; its settings.sh says what
# is its own.  Each setting below can be given from outside: MERGES=8000 bash examples/wmt14_en_fr/run.sh
# shellcheck shell=bash disable=SC2034
set -euo pipefail
unset CDPATH

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=../functions.sh source-path=SCRIPTDIR
source "$here/../functions.sh"
[ -n "${RECIPE:-}" ] || fail "is run by the script of the same name in a recipe's folder, such as examples/wmt14_en_fr"
recipe_name=$(basename "$RECIPE")

# Where
export RUN=${RUN:-$root/runs/$recipe_name${SMALL:+_small}} # everything goes here
export DATA=${DATA:-}                               # folder with train.SRC and train.TGT; empty: download
export PLUGIN=${PLUGIN:-$root/fairseq_softtopk}     # --user-dir
export PYTHONUTF8=1

# What it was prepared with need not be said again.
if [ -f "$RUN/settings" ]; then
  while IFS='=' read -r name value; do
    [ -n "${!name:-}" ] || export "$name=$value"
  done < "$RUN/settings"
fi

# What the recipe says: SRC TGT, VALID_SET TEST_SET, ARCH, TOKENS, MAX_TOKENS, and download_raw
# shellcheck source=/dev/null
source "$RECIPE/settings.sh"
export SRC TGT TOKENS MAX_TOKENS
if [ -n "${SMALL:-}" ]; then # of run.sh --small
  ARCH+=(
    --encoder-layers 1 --encoder-embed-dim 64 --encoder-hidden-size 64
    --decoder-layers 1 --decoder-embed-dim 64 --decoder-hidden-size 64 --decoder-out-embed-dim 64
  )
fi

# Data
export TOKENIZED=${TOKENIZED:-}                     # 1: DATA is in Moses tokens, with entities such as &apos;
export PAIRS=${PAIRS:-0}                            # at most so many training pairs, from the top; 0: all
export HELD_OUT=${HELD_OUT:-2000}                   # pairs for validation and test if DATA has none
export SEGMENTER=${SEGMENTER:-bpe}                  # bpe (subword-nmt) or sentencepiece
export MERGES=${MERGES:-32000}                      # of BPE, or SentencePiece's vocabulary; joint
export LEARN_LINES=${LEARN_LINES:-1000000}          # lines of each language that these are learned from
export SHARD=${SHARD:-1000000}                      # pairs in a shard, at most
export WORKERS=${WORKERS:-$(nproc)}                 # shards at a time

# Training
export SCHEDULE=${SCHEDULE:-modern}                 # or paper
export DEVICE=${DEVICE:-gpu}                        # or cpu
export PRECISION=${PRECISION:-}                     # fp16, amp or fp32: see train.sh
export PROCESSES=${PROCESSES:-1}                    # on this machine, one for each GPU
export NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-0}  # machines, and which this one is
export MASTER=${MASTER:-localhost:29500}            # host and port of the first
export UPDATES=${UPDATES:-} BATCH=${BATCH:-}        # of pre-training, and
export FINETUNE_UPDATES=${FINETUNE_UPDATES:-} FINETUNE_BATCH=${FINETUNE_BATCH:-} # of fine-tuning: see train.sh
export UPDATE_FREQ=${UPDATE_FREQ:-}                 # in how many parts a process takes its share of a batch
export AVERAGE=${AVERAGE:-5}                        # checkpoints whose mean is scored

settings=(SRC TGT PAIRS HELD_OUT SEGMENTER MERGES LEARN_LINES SHARD TOKENS MAX_TOKENS VALID_SET TEST_SET DATA TOKENIZED)

take_run_folder() { # work under other settings must not be taken for its own
  local name
  case $SEGMENTER in
    bpe | sentencepiece) ;;
    *) fail "SEGMENTER must be bpe or sentencepiece, got $SEGMENTER" ;;
  esac
  for name in PAIRS NODE_RANK; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "$name must be a whole number, got ${!name}"
  done
  for name in HELD_OUT MERGES LEARN_LINES SHARD MAX_TOKENS WORKERS PROCESSES NODES AVERAGE; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name must be a positive whole number, got ${!name}"
  done
  for name in UPDATES BATCH FINETUNE_UPDATES FINETUNE_BATCH UPDATE_FREQ; do
    [[ ${!name} =~ ^([1-9][0-9]*)?$ ]] || fail "$name must be a positive whole number, got ${!name}"
  done
  [ "$NODE_RANK" -lt "$NODES" ] || fail "NODE_RANK must be less than NODES, $NODES, got $NODE_RANK"
  [[ $RUN != *:* ]] || fail "RUN must not contain a colon, by which fairseq separates shards, got $RUN"
  mkdir -p "$RUN"
  RUN=$(cd "$RUN" && pwd)
  [ ! -e "$RUN/raw" ] || [ "$(cat "$RUN/settings")" = "$(own_settings)" ] ||
    fail "$RUN was made with other settings, see $RUN/settings: remove it (but $RUN/downloads) or choose another RUN"
}

need_device() {
  [ "$DEVICE" != gpu ] || python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "PyTorch sees no GPU: give DEVICE=cpu, or install a PyTorch with CUDA"
}

own_settings() { for name in "${settings[@]}"; do echo "$name=${!name}"; done; }

keep_settings() { # of the first step, when it is complete
  own_settings > "$RUN/settings.part"
  mv "$RUN/settings.part" "$RUN/settings"
}

shards() { (cd "$RUN/shards" && find . -name "*.$SRC" -printf '%f\n' | sed "s/\.$SRC$//" | sort); }
