#!/usr/bin/env bash
# Translates a split by beam search: bash generate.sh CHECKPOINT SPLIT OUT [fairseq-generate options...]
#
#   bash generate.sh runs/multi30k_en_de/models/finetuning/control/seed1/model.pt test out.txt --lenpen 1.5
#
# SPLIT is valid or test.  OUT gets a line for each sentence: lower-cased tokens, without BPE.
#
#   RUN=folder          where prepare.sh has put the data
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -ge 3 ] || fail "wants a checkpoint, a split and a file to write, see --help"
need fairseq-generate
take_run_folder
checkpoint=$1 split=$2 out=$3
shift 3
[ -f "$checkpoint" ] || fail "$checkpoint is not there"
[ -f "$RUN/text/$split.tok.de" ] || fail "there is no split $split in $RUN/text: valid or test"

rm -rf "$out.log" "$out.parts"
logged "$out.log" fairseq-generate "$RUN/data-bin" --user-dir "$PLUGIN" --path "$checkpoint" \
  --gen-subset "$split" --source-lang en --target-lang de \
  --beam 5 --max-len-a 2 --max-len-b 10 --post-process subword_nmt \
  --max-tokens 4000 --required-batch-size-multiple 1 --num-workers 0 \
  --results-path "$out.parts" "$@"
{ grep '^D-' "$out.parts/generate-$split.txt" || true; } | sed 's/^D-//' | sort -n | cut -f3 > "$out.part"

# From Python 3.11 on, fairseq drops sentences in silence if --required-batch-size-multiple is not 1.
translated=$(grep -c '' "$out.part") sentences=$(grep -c '' "$RUN/text/$split.tok.de")
[ "$translated" -eq "$sentences" ] || fail "$translated translations of $sentences sentences (see $out.log)"
mv "$out.part" "$out"
cat "$out.parts/generate-$split.txt" >> "$out.log"
rm -r "$out.parts"
