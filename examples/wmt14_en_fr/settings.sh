# WMT'14 English to French, the paper's Table 2: an LSTM of the sizes of RNNsearch, sentences of up to 50 tokens.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
SRC=en TGT=fr VALID_SET=${VALID_SET:-wmt13} TEST_SET=${TEST_SET:-wmt14}/full
TOKENS=--aggressive MAX_TOKENS=${MAX_TOKENS:-50}
ARCH=(--arch topk_attention_bahdanau --attention-relaxation softmax)
# shellcheck source=../translation/wmt.sh source-path=SCRIPTDIR
source "$RECIPE/../translation/wmt.sh"
