"""Trains features for a k-nearest-neighbour classifier through its own choice of neighbours.

``python scripts/knn.py`` trains a small convolutional network on scikit-learn's handwritten digits and
prints its accuracy beside that of plain kNN on the pixels (paper, Appendix C).  fairseq is not needed.

A query is compared with a batch of templates; ``soft_topk`` of the squared distances says how much each
template is one of its k nearest, and the loss is the share of them that has another label.  Prediction is
ordinary kNN over the features of all training images.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from fairseq_softtopk.ops import soft_topk


def knn_loss(queries: Tensor, templates: Tensor, same_label: Tensor, k: int, epsilon: float) -> Tensor:
    """Expected share of the k nearest templates that has another label than the query.

    Args:
        queries: (q, d) features.
        templates: (t, d) features.
        same_label: (q, t), 1 where query and template have the same label.
        k: how many neighbours.
        epsilon: entropic weight; the cost is divided by its maximum per query, as distances have no scale.
    """
    distances = torch.cdist(queries, templates).square()
    nearest = soft_topk(distances, k, epsilon=epsilon, largest=False, cost_scale="max")
    return 1 - (nearest * same_label).sum(1).mean() / k


def make_network() -> nn.Module:
    """Two convolutions and a linear layer, 8 x 8 pixels to 32 features."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 32),
    )


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> nn.Module:
    """Trains on random pairs of a query batch and a template batch."""
    network = make_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(1, args.steps + 1):
        chosen = torch.randperm(len(images))[: 2 * args.batch]
        query, template = chosen.chunk(2)
        features = network(images[chosen])
        same_label = (labels[query].unsqueeze(1) == labels[template]).to(features.dtype)
        loss = knn_loss(*features.chunk(2), same_label, args.k, args.epsilon)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(args.steps // 10, 1) == 0:
            print(f"step {step}/{args.steps}: loss {loss.item():.4f}", flush=True)
    return network


def accuracy(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, k: int) -> float:
    """Accuracy (%) of ordinary kNN."""
    classifier = KNeighborsClassifier(k).fit(train_x, train_y)
    return 100 * float(classifier.score(test_x, test_y))


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=9, help="neighbours (default: 9)")
    parser.add_argument("--epsilon", type=float, default=1e-3, help="entropic weight (default: 1e-3)")
    parser.add_argument(
        "--batch", type=int, default=100, help="queries, and templates, per step (default: 100)"
    )
    parser.add_argument("--steps", type=int, default=500, help="updates (default: 500)")
    parser.add_argument("--seed", type=int, default=1, help="of the split, the network and the batches")
    args = parser.parse_args()
    if not 1 <= args.batch <= 600:
        parser.error(f"--batch must lie in [1, 600], got {args.batch}")
    if not 1 <= args.k <= args.batch:
        parser.error(f"--k must lie in [1, {args.batch}], the templates of a batch, got {args.k}")
    if not args.epsilon > 0:
        parser.error(f"--epsilon must be positive, got {args.epsilon}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    return args


def main() -> None:
    """Trains, evaluates, prints a table."""
    args = parse_args()
    torch.manual_seed(args.seed)
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels.astype(np.float32) / 16, labels, test_size=500, stratify=labels, random_state=args.seed
    )
    network = train(torch.from_numpy(train_x).view(-1, 1, 8, 8), torch.from_numpy(train_y), args)
    with torch.no_grad():
        train_f, test_f = (network(torch.from_numpy(x).view(-1, 1, 8, 8)).numpy() for x in (train_x, test_x))
    print(f"\n| {args.k} nearest neighbours of | accuracy on {len(test_y)} digits |\n| --- | --- |")
    print(f"| pixels | {accuracy(train_x, train_y, test_x, test_y, args.k):.1f} % |")
    print(f"| trained features | {accuracy(train_f, train_y, test_f, test_y, args.k):.1f} % |")


if __name__ == "__main__":
    main()
