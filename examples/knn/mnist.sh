#!/usr/bin/env bash
# Table 1 of the paper on MNIST, all rows: bash mnist.sh [--small] [options of knn.py...]
#
# Trains every row with every seed, the temperature of each relaxation chosen on 5,000 validation images, and
# prints the table.  Run again after an interruption: what is finished is skipped, a training goes on.
# Options of scripts/knn.py come last and override, such as --device cuda, --method soft_topk, --seeds 1.
#
#   --small             1,000 images and two epochs, to see that everything runs
#   MNIST=folder        its four files, plain or .gz; else they are downloaded
#   RUN=folder          where curves, checkpoints and results go (default: runs/knn_mnist in this project)
set -euo pipefail
unset CDPATH

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../functions.sh source-path=SCRIPTDIR
source "$recipe/../functions.sh"
[ "${1:-}" != --help ] || show_help

settings=(--valid 5000 --shift 2 --epochs 20 --patience 20 --tune-epochs 4 --cosine)
small='' seeds=(1 2 3)
if [ "${1:-}" = --small ]; then
  shift
  small=_small settings+=(--limit 1000 --epochs 2 --tune-epochs 1) seeds=(1)
fi
RUN=${RUN:-$recipe/../../runs/knn_mnist$small}

if [ -z "${MNIST:-}" ]; then
  MNIST=$recipe/../../runs/mnist
  site=https://ossci-datasets.s3.amazonaws.com/mnist
  while read -r md5 file; do download "$site/$file" "$md5" "$MNIST/$file"; done << END
f68b3c2dcbeaaa9fbdd348bbdeb94873 train-images-idx3-ubyte.gz
d53e105ee54ea40749a09fcbcd1e9432 train-labels-idx1-ubyte.gz
9fb629c4189551a2d022fa330f9573f3 t10k-images-idx3-ubyte.gz
ec29112dd5afa0611ce80d1b7f02629c t10k-labels-idx1-ubyte.gz
END
fi

python "$recipe/../../scripts/knn.py" --data "$MNIST" --out "$RUN" --method all --tune --seeds "${seeds[@]}" \
  "${settings[@]}" "$@"
