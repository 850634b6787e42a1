# download SITE FOLDER MD5 FILE: puts SITE/FILE into the folder, unless it is there
# shellcheck shell=bash
set -euo pipefail

download() {
  local site=$1 folder=$2 md5=$3 file=$4
  [ ! -e "$folder/$file" ] || return 0
  echo "-- download $file"
  mkdir -p "$folder"
  curl --fail --location --retry 3 --silent --show-error --output "$folder/$file.part" "$site/$file"
  echo "$md5  $folder/$file.part" | md5sum --check --status || {
    echo "$site/$file does not have the MD5 sum $md5" >&2
    return 1
  }
  mv "$folder/$file.part" "$folder/$file"
}
