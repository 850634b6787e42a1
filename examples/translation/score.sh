#!/usr/bin/env bash
# Scores translations of a split, as generate.sh writes them: bash score.sh HYPOTHESES SPLIT
#
# BLEU and chrF of detokenised text with sacreBLEU's own tokens: its JSON with the signatures, printed, and written
# to HYPOTHESES.json.
set -euo pipefail

# shellcheck source=settings.sh source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[ "${1:-}" != --help ] || show_help
[ $# -eq 2 ] || fail "wants hypotheses and a split, see --help"
need sacrebleu
take_run_folder
[ -f "$1" ] || fail "$1 is not there"
[ -f "$RUN/raw/$2.$TGT" ] || fail "there is no split $2 in $RUN/raw: valid or test"
case=()
[[ $TOKENS != *--lower* ]] || case=(-lc --chrf-lowercase)
sacrebleu "$RUN/raw/$2.$TGT" -i "$1" -l "$SRC-$TGT" -m bleu chrf -w 2 "${case[@]}" > "$1.json.part"
mv "$1.json.part" "$1.json"
cat "$1.json"
