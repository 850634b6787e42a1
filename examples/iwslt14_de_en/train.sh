#!/usr/bin/env bash
# ../translation/train.sh with the settings of this recipe; --help says what they are
set -euo pipefail
unset CDPATH
RECIPE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export RECIPE
exec bash "$RECIPE/../translation/train.sh" "$@"
