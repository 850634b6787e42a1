#!/usr/bin/env bash
# Translates a split by beam search: bash generate.sh MODEL SPLIT OUT [fairseq-generate options...]
#
#   bash generate.sh soft_beam test out.txt --lenpen 1.5
#
# MODEL is a name in RUN/models, SPLIT is valid or test.  OUT gets a line of detokenised text for each sentence.
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -ge 3 ] || fail "wants a model, a split and a file to write, see --help"
need python fairseq-generate
take_run_folder
model=$RUN/models/$1/model.pt split=$2 out=$3
shift 3
[ -f "$model" ] || fail "$model is not there"
[ -f "$RUN/pieces/$split.$SRC" ] || fail "there is no split $split in $RUN/pieces: valid or test"

engine=()
[ "$DEVICE" = gpu ] || engine=(--cpu)
post_process=subword_nmt detokenize=(python "$here/text.py" detokenize "$TGT")
[ "$SEGMENTER" = bpe ] || post_process=sentencepiece detokenize=(cat)

rm -rf "$out.log" "$out.parts"
logged "$out.log" fairseq-generate "$RUN/data-bin/0000" --user-dir "$PLUGIN" --path "$model" "${engine[@]}" \
  --gen-subset "$split" --source-lang "$SRC" --target-lang "$TGT" --beam 5 --post-process "$post_process" \
  --max-len-a 1 --max-len-b 200 \
  --max-tokens 4000 --required-batch-size-multiple 1 --results-path "$out.parts" "$@"
grep '^D-' "$out.parts/generate-$split.txt" | sed 's/^D-//' | sort -n | cut -f3 | "${detokenize[@]}" > "$out.part"

# From Python 3.11 on, fairseq drops sentences in silence if --required-batch-size-multiple is not 1.
translated=$(lines "$out.part") sentences=$(lines "$RUN/raw/$split.$TGT")
[ "$translated" -eq "$sentences" ] || fail "$translated translations of $sentences sentences (see $out.log)"
mv "$out.part" "$out"
cat "$out.parts/generate-$split.txt" >> "$out.log"
rm -r "$out.parts"
