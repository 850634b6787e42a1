#!/usr/bin/env bash
# Table 1 of the paper on CIFAR-10, all rows: bash cifar10.sh [--reduced | --small] [options of knn.py...]
#
# As mnist.sh, with ResNet-18.  The whole table wants a GPU: --device cuda.
#
#   --reduced           10,000 images, a quarter of the channels, 15 epochs, one seed: for CPUs
#   --small             500 images, an eighth of the channels, one epoch, to see that everything runs
#   CIFAR10=folder      the files of its Python or binary version, or pictures in train/CLASS and test/CLASS, or
#                       one archive of these; else it is downloaded
#   RUN=folder          where curves, checkpoints and results go (default: runs/knn_cifar10 in this project)
set -euo pipefail
unset CDPATH

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../functions.sh source-path=SCRIPTDIR
source "$recipe/../functions.sh"
[ "${1:-}" != --help ] || show_help

settings=(
  --network resnet18 --valid 5000 --shift 4 --flip
  --optimizer sgd --lr 0.1 --weight-decay 5e-4 --epochs 200 --patience 200 --tune-epochs 20 --cosine
)
kind='' seeds=(1 2 3)
case ${1:-} in
  --reduced) kind=_reduced settings+=(--limit 10000 --width 16 --epochs 15 --tune-epochs 3) seeds=(1) && shift ;;
  --small) kind=_small settings+=(--limit 500 --valid 500 --width 8 --epochs 1 --tune-epochs 1) seeds=(1) && shift ;;
esac
RUN=${RUN:-$recipe/../../runs/knn_cifar10$kind}

if [ -z "${CIFAR10:-}" ]; then
  CIFAR10=$recipe/../../runs/cifar10
  archive=cifar-10-python.tar.gz
  download "https://www.cs.toronto.edu/~kriz/$archive" c58f30108f718f92721af3b95e74349a "$CIFAR10/$archive"
  if [ ! -e "$CIFAR10/cifar-10-batches-py" ]; then
    mkdir -p "$CIFAR10/part"
    tar -xzf "$CIFAR10/$archive" -C "$CIFAR10/part"
    mv "$CIFAR10/part/cifar-10-batches-py" "$CIFAR10"
  fi
fi

python "$recipe/../../scripts/knn.py" --data "$CIFAR10" --out "$RUN" --method all --tune --seeds "${seeds[@]}" \
  "${settings[@]}" "$@"
