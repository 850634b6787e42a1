# What the recipes' scripts share.
# shellcheck shell=bash
set -euo pipefail

fail() { echo "$(basename "$0"): $*" >&2 && exit 1; }

show_help() { sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//' && exit; } # the comment on its top

need() { # need COMMAND...
  local command
  for command in "$@"; do
    type -P "$command" > /dev/null ||
      fail "$command is not on the PATH: make and activate an environment first, see README.md"
  done
}

logged() { # logged FILE COMMAND...: what it prints goes into the file; if it fails, its last error is shown
  local log=$1 error='^(\[rank[0-9]+\]: |[^ ]+: )?[A-Za-z_.]*([Ee]rror|Exception): .' # or, without one, its last line of words
  local before=0 said
  shift
  [ ! -e "$log" ] || before=$(wc -c < "$log")
  "$@" >> "$log" 2>&1 || {
    said=$(tail -c "+$((before + 1))" "$log")
    fail "$1: $({ grep -E "$error" <<< "$said" || grep '[[:alnum:]]' <<< "$said"; } | tail -n 1) (see $log)"
  }
}

lock() { # lock FOLDER: while another process works in it, this one must not; a child that is left keeps the lock
  if type -P flock > /dev/null; then
    exec 9> "$1/lock"
    flock --nonblock 9 || fail "$1 is being worked on by another process"
  fi
}

learn_bpe() { # learn_bpe MERGES CODES LOG: from standard input; subword-nmt's --output does not notice a full disk
  subword-nmt learn-bpe -s "$1" > "$2" 2>> "$3" || fail "subword-nmt learn-bpe: $(tail -n 1 "$3") (see $3)"
}

step() { # step FOLDER COMMAND: makes RUN/FOLDER, under another name until the command has succeeded
  local folder=$1 command=$2
  [ ! -e "$RUN/$folder" ] || { echo "-- $folder: done before" && return; }
  echo "-- $folder"
  rm -rf "$RUN/$folder.part"
  mkdir "$RUN/$folder.part"
  "$command" "$RUN/$folder.part"
  mv "$RUN/$folder.part" "$RUN/$folder"
}

take() { # take VARIABLE NAME OUT: copies a file, plain or compressed, of the folder that the variable names
  local folder=${!1} name=$2 out=$3
  if [ -f "$folder/$name.gz" ]; then
    gunzip -c "$folder/$name.gz" > "$out/$name" || fail "$folder/$name.gz is broken"
  elif [ -f "$folder/$name" ]; then
    cp "$folder/$name" "$out/$name"
  else
    fail "$1=$folder has neither $name.gz nor $name"
  fi
}

lines() { grep -c '' "$1" || true; }

download() { # download URL CHECKSUM FILE: unless it is there; MD5 or SHA-256, or - where none is known
  local url=$1 checksum=$2 file=$3 sum=sha256sum
  [ ! -e "$file" ] || return 0
  need curl
  echo "-- download $url"
  mkdir -p "$(dirname "$file")"
  curl --fail --location --retry 3 --silent --show-error --continue-at - --output "$file.part" "$url" ||
    fail "cannot download $url: try again, without $file.part if that does not help"
  [ "${#checksum}" -ne 32 ] || sum=md5sum
  if [ "$checksum" = - ]; then
    echo "   no checksum is known of it; it has the SHA-256 $(sha256sum < "$file.part" | cut -d ' ' -f 1)"
  elif ! echo "$checksum  $file.part" | "$sum" --check --status; then
    fail "$url does not have the checksum $checksum: remove $file.part and try again"
  fi
  mv "$file.part" "$file"
}
