# Downloads WMT's corpora: those in the recipe's corpora.txt, and sacreBLEU's validation and test sets.
# shellcheck shell=bash

CORPORA=${CORPORA:-$RECIPE/corpora.txt}

download_raw() { # download_raw OUT
  local out=$1 checksum url source target archive split set language side
  while read -r checksum url source target; do
    [ -n "$url" ] || continue
    archive=$RUN/downloads/$(basename "$url")
    download "$url" "$checksum" "$archive"
    tar -xf "$archive" -C "$out" "$source" "$target"
    append "$out/$source" "$out/train.$SRC"
    append "$out/$target" "$out/train.$TGT"
  done < <(grep -v '^#' "$CORPORA")
  for split in valid:"$VALID_SET" test:"$TEST_SET"; do
    set=${split#*:}
    for side in src:"$SRC" ref:"$TGT"; do
      language=${side#*:}
      sacrebleu -t "$set" -l "$SRC-$TGT" --echo "${side%:*}" > "$out/${split%%:*}.$language" ||
        fail "sacrebleu cannot get its set $set"
    done
  done
}

append() { # append FILE TO
  case $1 in
    *.gz) gunzip -c "$1" >> "$2" ;;
    *) cat "$1" >> "$2" ;;
  esac
  rm "$1"
}
