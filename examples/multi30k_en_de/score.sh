#!/usr/bin/env bash
# Scores translations of a split, as generate.sh writes them: bash score.sh HYPOTHESES SPLIT
#
# Two BLEU scores, sacreBLEU's JSON with the signature, printed and written beside the hypotheses:
#
#   HYPOTHESES.bleu.json       of lower-cased tokens, which is what Moses' multi-bleu.perl computes
#   HYPOTHESES.detok.json      of detokenised text, case-insensitive, with sacreBLEU's own tokens
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -eq 2 ] || fail "wants hypotheses and a split, see --help"
need python sacrebleu
take_run_folder
hypotheses=$1 split=$2
[ -f "$hypotheses" ] || fail "$hypotheses is not there"
[ -f "$RUN/text/$split.tok.de" ] || fail "there is no split $split in $RUN/text: valid or test"

python "$recipe/moses.py" detokenize de < "$hypotheses" > "$hypotheses.detok"
sacrebleu "$RUN/text/$split.de" -i "$hypotheses.detok" -lc -w 2 > "$hypotheses.part"
mv "$hypotheses.part" "$hypotheses.detok.json"
sacrebleu "$RUN/text/$split.tok.de" -i "$hypotheses" --tokenize none -lc --force -w 2 > "$hypotheses.part"
mv "$hypotheses.part" "$hypotheses.bleu.json"
cat "$hypotheses.bleu.json" "$hypotheses.detok.json"
