#!/usr/bin/env bash
# From corpora to what fairseq trains on: bash prepare.sh
#
#   DATA=folder         train.SRC and train.TGT, plain or .gz, and valid.* and test.* if there are any: without
#                       them HELD_OUT pairs each are taken out of train; without DATA it downloads the corpora
#   TOKENIZED=1         DATA is in Moses tokens, with entities such as &apos;
#   PAIRS=0             at most so many training pairs, from the top
#   SEGMENTER=bpe       or sentencepiece
#   MERGES=32000        of BPE, or SentencePiece's vocabulary; joint
#   SHARD=1000000       pairs in a shard, at most; WORKERS shards are worked on at a time
#   RUN=folder          where everything goes
#
# Writes RUN/raw, shards, tokens, codes, pieces and data-bin.  What is finished is skipped when it is run again: a
# folder or a shard gets its name when it is complete.
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -eq 0 ] || fail "takes no arguments, got $*"
need python subword-nmt fairseq-preprocess sacrebleu
take_run_folder
export here RUN
LONGEST=1023 # pieces of a sentence that fairseq's task takes

text() { python "$here/text.py" "$@"; }

each_shard() { # each_shard FUNCTION FOLDER: calls the function with the folder and each shard, WORKERS at a time
  # shellcheck disable=SC2016
  shards | xargs -P "$WORKERS" -I {} bash -c 'set -euo pipefail; "$0" "$@"' "$1" "$2" {} ||
    fail "not all shards are finished: mend what the messages above say and run again"
}

parts() { # parts FOLDER COMMAND: as step, but keeps the shards that are finished
  local folder=$1 command=$2
  [ ! -e "$RUN/$folder" ] || { echo "-- $folder: done before" && return; }
  echo "-- $folder"
  mkdir -p "$RUN/$folder.part"
  "$command" "$RUN/$folder.part"
  mv "$RUN/$folder.part" "$RUN/$folder"
}

# -------------------------------------------------------------------------------------------- raw text

take_text() { # take_text NAME OUT: a file of DATA, as text
  local words=0
  take DATA "$1" "$2"
  [[ $1 == train.* ]] || words=$LONGEST
  text check "$2/$1" "$DATA/$1" "$words"
  if [ -n "$TOKENIZED" ]; then
    text detokenize "${1##*.}" < "$2/$1" > "$2/plain"
    mv "$2/plain" "$2/$1"
  fi
}

held_out_files() { # those that DATA has
  local name
  for name in {valid,test}.{"$SRC","$TGT"}; do
    [ ! -f "$DATA/$name" ] && [ ! -f "$DATA/$name.gz" ] || echo "$name"
  done
}

parallel() { # parallel OUT SPLIT: ends unless the two files are as long
  local source target
  source=$(lines "$1/$2.$SRC") target=$(lines "$1/$2.$TGT")
  [ "$source" -gt 0 ] || fail "$2.$SRC is empty"
  [ "$source" -eq "$target" ] || fail "$2.$SRC has $source lines but $2.$TGT has $target: they must be parallel"
}

limit() { # limit OUT: the first PAIRS of the training pairs
  local language
  [ "$PAIRS" -gt 0 ] || return 0
  parallel "$1" train # the first may not show it
  for language in "$SRC" "$TGT"; do
    sed -n "1,${PAIRS}p;${PAIRS}q" "$1/train.$language" > "$1/first"
    mv "$1/first" "$1/train.$language"
  done
}

take_raw() {
  local out=$1 split language
  if [ -z "$DATA" ]; then
    download_raw "$out"
    limit "$out"
  else
    for language in "$SRC" "$TGT"; do take_text "train.$language" "$out"; done
    limit "$out"
    if [ -n "$(held_out_files)" ]; then # all four, or take_text complains
      for split in valid test; do
        for language in "$SRC" "$TGT"; do take_text "$split.$language" "$out"; done
      done
    else
      mkdir "$out/split"
      text hold-out "$out" "$out/split" "$SRC" "$TGT" "$HELD_OUT" "$MAX_TOKENS"
      mv "$out"/split/* "$out"
      rmdir "$out/split"
    fi
  fi
  for split in train valid test; do parallel "$out" "$split"; done
  keep_settings
}

cut_shards() { # line by line in turn: fairseq shuffles within a shard only, so each must be a sample of all corpora
  local language n
  n=$((($(lines "$RUN/raw/train.$SRC") + SHARD - 1) / SHARD))
  [ "$n" -le 10000 ] || fail "$n shards of $SHARD pairs are too many: at most 10,000, choose a larger SHARD"
  for language in "$SRC" "$TGT"; do
    split --number "r/$n" --numeric-suffixes --suffix-length 4 --additional-suffix ".$language" \
      "$RUN/raw/train.$language" "$1/"
  done
}

# ---------------------------------------------------------------------------------------------- tokens

tokenize_shard() { # what is counted is written last: a shard that has it is complete
  local out=$1 shard=$2
  [ ! -e "$out/$shard.counts" ] || return 0
  # shellcheck disable=SC2086
  python "$here/text.py" tokens "$RUN/shards/$shard" "$out/$shard" "$SRC" "$TGT" $TOKENS \
    --max-tokens "$MAX_TOKENS" --not-in "$out"/{valid,test}.{"$SRC","$TGT"} > "$out/$shard.counts.part"
  mv "$out/$shard.counts.part" "$out/$shard.counts"
}
export -f tokenize_shard

tokenize() {
  local out=$1 split shard
  [ "$SEGMENTER" = bpe ] || TOKENS+=" --pieces"
  export TOKENS
  for split in valid test; do
    # shellcheck disable=SC2086
    text tokens "$RUN/raw/$split" "$out/$split" "$SRC" "$TGT" $TOKENS > /dev/null
  done
  each_shard tokenize_shard "$out"
  cat "$out"/*.counts | awk -F '\t' '{ n[$2] += $1 } END { for (what in n) print "   " n[what], what }' | sort -rn
  for shard in $(shards); do
    [ -s "$out/$shard.$SRC" ] || fail "no pair of shard $shard is left: choose a larger SHARD"
  done
}

# --------------------------------------------------------------------------------------- pieces, data-bin

learn() { # from as many lines of each shard
  local out=$1 language shard n
  n=$((LEARN_LINES / $(shards | wc -l) + 1))
  for language in "$SRC" "$TGT"; do
    for shard in $(shards); do head -n "$n" "$RUN/tokens/$shard.$language"; done >> "$out/sample"
  done
  if [ "$SEGMENTER" = bpe ]; then
    learn_bpe "$MERGES" "$out/codes" "$RUN/prepare.log" < "$out/sample"
  else
    logged "$RUN/prepare.log" python -c 'import sys, sentencepiece as spm
spm.SentencePieceTrainer.train(input=sys.argv[1], model_prefix=sys.argv[2], vocab_size=int(sys.argv[3]),
                               character_coverage=1.0, normalization_rule_name="identity", num_threads=int(sys.argv[4]),
                               input_sentence_size=500_000, shuffle_input_sentence=True)
assert spm.SentencePieceProcessor(model_file=sys.argv[2] + ".model").vocab_size() == int(sys.argv[3])' \
      "$out/sample" "$out/spm" "$MERGES" "$WORKERS"
  fi
  rm "$out/sample"
}

segment() { # segment IN OUT: a file
  if [ "$SEGMENTER" = bpe ]; then
    subword-nmt apply-bpe -c "$RUN/codes/codes" < "$1" > "$2.part"
  else
    python "$here/text.py" pieces "$RUN/codes/spm.model" < "$1" > "$2.part"
  fi
  mv "$2.part" "$2"
}

segment_shard() { # and the length of its longest sentence, which train.sh asks for
  local out=$1 shard=$2 language
  [ ! -e "$out/$shard.longest" ] || return 0
  for language in "$SRC" "$TGT"; do
    segment "$RUN/tokens/$shard.$language" "$out/$shard.$language"
  done
  awk 'NF > n { n = NF } END { print n + 0 }' "$out/$shard".{"$SRC","$TGT"} > "$out/$shard.longest.part"
  mv "$out/$shard.longest.part" "$out/$shard.longest"
}
export -f segment segment_shard

segment_all() {
  local split language long
  for split in valid test; do
    segment_shard "$1" "$split"
    for language in "$SRC" "$TGT"; do
      long=$(awk -v n="$LONGEST" 'NF > n { print "line " NR " has " NF " pieces"; exit }' "$1/$split.$language")
      [ -z "$long" ] ||
        fail "$split.$language, $long, more than the $LONGEST that fairseq's task takes: mend it, remove $RUN, run again"
    done
  done
  each_shard segment_shard "$1"
}

binarize_shard() { # the first holds the validation and test sets, too
  local out=$1 shard=$2 held_out=()
  [ ! -e "$out/$shard" ] || return 0
  rm -rf "$out/$shard.part"
  [ "$shard" != 0000 ] || held_out=(--validpref "$RUN/pieces/valid" --testpref "$RUN/pieces/test")
  fairseq-preprocess -s "$SRC" -t "$TGT" --srcdict "$out/dict.txt" --joined-dictionary --workers 1 \
    --trainpref "$RUN/pieces/$shard" "${held_out[@]}" --destdir "$out/$shard.part" > "$out/$shard.log" 2>&1 || {
    echo "fairseq-preprocess: $(tail -n 1 "$out/$shard.log") (see $out/$shard.log)" >&2
    return 1
  }
  mv "$out/$shard.part" "$out/$shard"
}
export -f binarize_shard

binarize() {
  local out=$1 language
  if [ ! -e "$out/dict.txt" ]; then
    rm -rf "$out/all"
    mkdir "$out/all"
    for language in "$SRC" "$TGT"; do
      for shard in $(shards); do cat "$RUN/pieces/$shard.$language"; done > "$out/all/train.$language"
    done
    logged "$RUN/prepare.log" fairseq-preprocess -s "$SRC" -t "$TGT" --joined-dictionary --dict-only \
      --workers "$WORKERS" --trainpref "$out/all/train" --destdir "$out/all"
    mv "$out/all/dict.$SRC.txt" "$out/dict.txt"
    rm -r "$out/all"
  fi
  each_shard binarize_shard "$out"
}

# -------------------------------------------------------------------------------------------- all of it

lock "$RUN"
step raw take_raw
step shards cut_shards
parts tokens tokenize
step codes learn
parts pieces segment_all
parts data-bin binarize
