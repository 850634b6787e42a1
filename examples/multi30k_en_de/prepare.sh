#!/usr/bin/env bash
# From Multi30k's files to what fairseq trains on: bash prepare.sh
#
#   MULTI30K=folder     with train, val and test_2016_flickr, .en and .de, plain or .gz; else it downloads them
#   BPE_MERGES=4000     joint; 0: words
#   RUN=folder          where everything goes
#
# Writes RUN/raw, RUN/text and RUN/data-bin.  Each appears when it is complete, and is skipped from then on.
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -eq 0 ] || fail "takes no arguments, got $*"
need python subword-nmt fairseq-preprocess

url=https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw

# -------------------------------------------------------------------------------------------- raw text

take_or_download() { # NAME OUT
  local name=$1 out=$2/$1
  if [ -n "$MULTI30K" ]; then
    take MULTI30K "$name" "$2"
    return
  fi
  need curl
  curl -fsSL --retry 3 "$url/$name.gz" -o "$out.gz" ||
    fail "cannot download $url/$name.gz: set MULTI30K to a folder that has Multi30k's files"
  gunzip "$out.gz" || fail "$url/$name.gz is broken"
}

take_raw() {
  local out=$1 split en de
  for split in train val test_2016_flickr; do
    take_or_download "$split.en" "$out"
    take_or_download "$split.de" "$out"
    en=$(lines "$out/$split.en") de=$(lines "$out/$split.de")
    [ "$en" -eq "$de" ] || fail "$split.en has $en lines but $split.de has $de: they must be parallel"
    [ "$en" -gt 0 ] || fail "$split.en is empty"
  done
  if ! (cd "$out" && sha256sum --check --status "$recipe/multi30k.sha256"); then
    [ -n "$MULTI30K" ] || fail "what $url holds is not the text that this recipe is for"
    echo "   not Multi30k's own text: scores do not compare with others'"
  fi
}

# ------------------------------------------------------------------------------- tokens, BPE, data-bin

tokenize() {
  local out=$1 split lang
  for lang in en de; do
    sed -n "1,${TRAIN_PAIRS}p" "$RUN/raw/train.$lang" > "$out/train.$lang"
    sed -n "1,${HELD_OUT}p" "$RUN/raw/val.$lang" > "$out/valid.$lang"
    sed -n "1,${HELD_OUT}p" "$RUN/raw/test_2016_flickr.$lang" > "$out/test.$lang"
    for split in train valid test; do
      python "$recipe/moses.py" tokenize "$lang" < "$out/$split.$lang" > "$out/$split.tok.$lang"
    done
  done
}

segment() {
  local out=$1 split lang
  cat "$out"/train.tok.{en,de} | learn_bpe "$BPE_MERGES" "$out/codes" "$RUN/prepare.log"
  for split in train valid test; do
    for lang in en de; do
      subword-nmt apply-bpe -c "$out/codes" < "$out/$split.tok.$lang" > "$out/$split.bpe.$lang"
    done
  done
}

prepare_text() {
  tokenize "$1"
  [ "$BPE_MERGES" -eq 0 ] || segment "$1"
}

binarize() {
  local kind=bpe dictionaries=(--joined-dictionary)
  [ "$BPE_MERGES" -gt 0 ] || kind=tok dictionaries=()
  logged "$RUN/prepare.log" fairseq-preprocess -s en -t de "${dictionaries[@]}" --destdir "$1" \
    --trainpref "$RUN/text/train.$kind" --validpref "$RUN/text/valid.$kind" --testpref "$RUN/text/test.$kind"
}

# -------------------------------------------------------------------------------------------- all of it

take_run_folder
keep settings "$DATA_SETTINGS"
step raw take_raw
step text prepare_text
step data-bin binarize
