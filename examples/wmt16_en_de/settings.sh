# WMT'16 English to German news, with top-k attention.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
SRC=en TGT=de VALID_SET=${VALID_SET:-wmt15} TEST_SET=${TEST_SET:-wmt16}
TOKENS=--aggressive MAX_TOKENS=${MAX_TOKENS:-50}
ARCH=(--arch topk_attention_opennmt --share-all-embeddings)
# shellcheck source=../translation/wmt.sh source-path=SCRIPTDIR
source "$RECIPE/../translation/wmt.sh"
