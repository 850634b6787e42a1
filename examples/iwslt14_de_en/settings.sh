# IWSLT'14 German to English, on which beam training is compared (Wiseman and Rush 2016, Goyal et al. 2018):
# lower-cased TED talks; every 23rd of the cleaned pairs for validation, five years' sets for the test.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
SRC=de TGT=en VALID_SET='' TEST_SET=''
TOKENS=--lower MAX_TOKENS=${MAX_TOKENS:-175} MERGES=${MERGES:-10000}
ARCH=(
  --arch topk_attention_tiny --attention-relaxation softmax --dropout 0.3 --share-all-embeddings
  --encoder-embed-dim 256 --encoder-hidden-size 256
  --decoder-embed-dim 256 --decoder-hidden-size 256 --decoder-out-embed-dim 256
)

if [ "${SCHEDULE:-modern}" = modern ]; then # 40 epochs, then 2
  UPDATES=${UPDATES:-20000} BATCH=${BATCH:-8000} UPDATE_FREQ=${UPDATE_FREQ:-1}
  FINETUNE_UPDATES=${FINETUNE_UPDATES:-4000} FINETUNE_BATCH=${FINETUNE_BATCH:-2000}
fi

ARCHIVE=${ARCHIVE:-http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz}

download_raw() { # download_raw OUT
  local out=$1 archive=$RUN/downloads/de-en.tgz language year
  download "$ARCHIVE" - "$archive"
  tar -xf "$archive" -C "$out"
  for language in de en; do
    # A talk's transcript between lines of XML, of which the two languages have the same.
    grep -v '^<\(url\|talkid\|keywords\|speaker\|reviewer\|translator\|doc\|/doc\)' \
      "$out/de-en/train.tags.de-en.$language" | sed 's/<[^>]*>//g' > "$out/all.$language"
    for year in dev2010 dev2012 tst2010 tst2011 tst2012; do
      grep '<seg' "$out/de-en"/IWSLT14.TED*."$year.de-en.$language.xml" | sed 's/<[^>]*>//g; s/^ *//; s/ *$//'
    done > "$out/test.$language"
  done
  python "$RECIPE/../translation/text.py" tokens "$out/all" "$out/clean" de en --max-tokens 175 --as-they-are > /dev/null
  for language in de en; do
    awk 'NR % 23 != 0' "$out/clean.$language" > "$out/train.$language"
    awk 'NR % 23 == 0' "$out/clean.$language" > "$out/valid.$language"
  done
  rm -r "$out"/{all,clean}.* "$out/de-en"
}
