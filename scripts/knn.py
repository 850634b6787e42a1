"""Trains features for a k-nearest-neighbour classifier through its own choice of neighbours.

``python scripts/knn.py`` compares kNN on the pixels of scikit-learn's digits with kNN on features that were
trained through ``soft_topk`` (paper, Appendix C); ``--data FOLDER`` takes MNIST, CIFAR-10 or pictures (see
``knn_data.py``), and ``--method`` any rows of the paper's Table 1:

- ``knn``, ``pca``: kNN on the pixels, and on their 50 principal components;
- ``autoencoder``, ``pretrained_cnn``: kNN on features that were trained to draw the image, or for a classifier;
- ``ce_cnn``: that classifier;
- ``softmax_k``, ``relax_subset``, ``neuralsort``, ``neuralsort_sampled``, ``sinkhorn_sort``, ``soft_topk``,
  ``soft_topk_200``: kNN on features that were trained through a relaxed choice of the k nearest templates, the
  last with the paper's solver of 200 Sinkhorn steps.

Prediction is ordinary kNN over the features of all training images.  fairseq is not needed.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from knn_data import DataError, Images, Splits, load
from knn_networks import Autoencoder, ConvNet, ResNet18
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from tqdm import tqdm

from fairseq_softtopk.ops import neuralsort, relax_subset, sinkhorn_sort, soft_topk, softmax_k

UNTRAINED = ("knn", "pca")
CLASSIFIERS = ("pretrained_cnn", "ce_cnn")
NEIGHBOURS = (
    "softmax_k",
    "relax_subset",
    "neuralsort",
    "neuralsort_sampled",
    "sinkhorn_sort",
    "soft_topk",
    "soft_topk_200",
)
METHODS = (*UNTRAINED, "autoencoder", *CLASSIFIERS, *NEIGHBOURS)

# Of distances in units of the largest of a query; that of soft_topk is the paper's, the others are guesses.
TEMPERATURES = {
    "softmax_k": 0.03,
    "relax_subset": 0.03,
    "neuralsort": 1.0,
    "neuralsort_sampled": 1.0,
    "sinkhorn_sort": 0.01,
    "soft_topk": 1e-3,
    "soft_topk_200": 1e-3,
}


class Result(NamedTuple):
    """What a training gave."""

    accuracy: float
    epochs: int
    seconds: float


# --------------------------------------------------------------------------------------- what is trained


def nearness(distances: Tensor, method: str, k: int, temperature: float) -> Tensor:
    """How much each template is one of the k nearest, (q, t), rows summing to k.

    Args:
        distances: (q, t), squared distances; they have no scale, so they are divided by a query's largest.
        method: one of ``NEIGHBOURS``.
        k: how many neighbours.
        temperature: of the relaxation, or its entropic weight.
    """
    if method == "soft_topk":
        return soft_topk(distances, k, epsilon=temperature, largest=False, cost_scale="max")
    if method == "soft_topk_200":
        with warnings.catch_warnings():  # that is the point
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            return soft_topk(
                distances, k, epsilon=temperature, largest=False, cost_scale="max", solver="sinkhorn_log"
            )
    scaled = distances / distances.detach().amax(1, keepdim=True).clamp(min=1e-12)
    if method == "sinkhorn_sort":
        with warnings.catch_warnings():  # 200 steps are what its users take
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            ranks = sinkhorn_sort(scaled, k, epsilon=temperature, largest=False, solver="sinkhorn_log")
        return ranks.sum(-1)
    relaxations = {
        "softmax_k": softmax_k,
        "relax_subset": partial(relax_subset, sample=True),
        "neuralsort": neuralsort,
        "neuralsort_sampled": partial(neuralsort, sample=True),
    }
    weights: Tensor = relaxations[method](scaled, k, temperature=temperature, largest=False)
    return weights if method == "relax_subset" else weights.sum(-1)


def knn_loss(distances: Tensor, same_label: Tensor, method: str, k: int, temperature: float) -> Tensor:
    """Expected share of the k nearest templates that has another label than the query.

    Args:
        distances: (q, t), squared.
        same_label: (q, t), 1 where query and template have the same label.
        method: see :func:`nearness`.
        k: likewise.
        temperature: likewise.
    """
    return 1 - (nearness(distances, method, k, temperature) * same_label).sum(1).mean() / k


def build(method: str, data: Splits, name: str) -> nn.Module:
    """The network that a method trains; its encoder is the attribute ``encoder``."""
    shape = data.train.pixels.shape[1:]
    encoder = ConvNet(shape[0], shape[1]) if name == "conv" else ResNet18(shape[0])
    if method == "autoencoder":
        return Autoencoder(encoder, shape)
    network = nn.Sequential()
    network.add_module("encoder", encoder)
    if method in CLASSIFIERS:
        network.add_module("classifier", nn.Linear(encoder.features, len(data.classes)))
    return network


def loss_of(method: str, network: nn.Module, images: Tensor, labels: Tensor, args: Any) -> Tensor:
    """The loss of a batch; the first ``args.queries`` of the images are queries, the others templates."""
    if method == "autoencoder":
        return F.mse_loss(network(images), images)
    if method in CLASSIFIERS:
        return F.cross_entropy(network(images), labels)
    queries, templates = network(images).split((args.queries, len(images) - args.queries))
    distances = torch.cdist(queries, templates).square()
    same_label = (labels[: args.queries, None] == labels[args.queries :]).to(distances.dtype)
    temperature = TEMPERATURES[method] if args.temperature is None else args.temperature
    return knn_loss(distances, same_label, method, args.k, temperature)


# -------------------------------------------------------------------------------------- how it is trained


def as_batch(images: Images, chosen: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels, on the device."""
    pixels = torch.from_numpy(images.pixels[chosen]).to(device, torch.float32) / 255
    return pixels, torch.from_numpy(images.labels[chosen]).to(device)


def augment(pixels: Tensor, shift: int, flip: bool) -> Tensor:
    """Each image moved by up to ``shift`` pixels in both directions, and flipped or not."""
    size, padded, moved = pixels.size(-1), F.pad(pixels, (shift,) * 4), torch.empty_like(pixels)
    top, left = torch.randint(2 * shift + 1, (2, len(pixels)))
    flipped = (torch.rand(len(pixels)) < 0.5) & flip
    for i in range(len(pixels)):
        image = padded[i, :, top[i] : top[i] + size, left[i] : left[i] + size]
        moved[i] = image.flip(-1) if flipped[i] else image
    return moved


@torch.no_grad()
def features_of(network: nn.Module, images: Images, device: torch.device) -> np.ndarray:
    """Features (n, d) of all images."""
    network.eval()
    parts = [
        network(as_batch(images, slice(start, start + 1000), device)[0]).cpu().numpy()
        for start in range(0, len(images.labels), 1000)
    ]
    network.train()
    return np.concatenate(parts)


def neighbours_accuracy(
    train_x: np.ndarray, train_y: np.ndarray, x: np.ndarray, y: np.ndarray, k: int
) -> float:
    """Accuracy (%) of ordinary kNN."""
    return 100 * float(KNeighborsClassifier(k, n_jobs=-1).fit(train_x, train_y).score(x, y))


def accuracy(method: str, network: nn.Module, data: Splits, images: Images, args: Any) -> float:
    """Accuracy (%) of a trained network on images."""
    if method == "ce_cnn":
        predicted = features_of(network, images, args.device).argmax(1)
        return 100 * float((predicted == images.labels).mean())
    encoder = network.get_submodule("encoder")
    train_x = features_of(encoder, data.train, args.device)
    x = features_of(encoder, images, args.device)
    return neighbours_accuracy(train_x, data.train.labels, x, images.labels, args.k)


def train(method: str, data: Splits, seed: int, args: Any) -> Result:
    """Trains until the validation accuracy has not risen for a while; the best network is tested."""
    torch.manual_seed(seed)
    network = build(method, data, args.network).to(args.device)
    if args.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(
            network.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
    else:
        optimizer = torch.optim.Adam(network.parameters(), args.lr, weight_decay=args.weight_decay)
    folder = None if args.out is None else args.out / method / f"seed{seed}"
    state = {"epoch": 0, "best": -1.0, "best_epoch": 0, "seconds": 0.0}
    best_parameters = network.state_dict()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "last.pt").exists():
            saved = torch.load(folder / "last.pt", map_location=args.device, weights_only=True)
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"].cpu())
            state, best_parameters = saved["state"], saved["best_parameters"]

    while state["epoch"] < args.epochs and state["epoch"] - state["best_epoch"] < args.patience:
        started = time.perf_counter()
        loss = train_epoch(
            method, network, optimizer, data, f"{method} seed {seed} epoch {state['epoch'] + 1}", args
        )
        state["epoch"] += 1
        state["seconds"] += time.perf_counter() - started
        valid = accuracy(method, network, data, data.valid, args)
        if valid >= state["best"]:  # of equals, the one trained longer
            state |= {"best": valid, "best_epoch": state["epoch"]}
            best_parameters = {name: value.clone() for name, value in network.state_dict().items()}
        if folder is not None:
            with (folder / "curve.csv").open("a", newline="") as file:
                csv.writer(file).writerow(
                    [state["epoch"], f"{loss:.6f}", f"{valid:.3f}", f"{state['seconds']:.1f}"]
                )
            saved = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "state": state,
                "best_parameters": best_parameters,
            }
            torch.save(saved, folder / "last.part")
            (folder / "last.part").replace(folder / "last.pt")
    network.load_state_dict(best_parameters)
    return Result(accuracy(method, network, data, data.test, args), int(state["epoch"]), state["seconds"])


def train_epoch(method: str, network: nn.Module, optimizer: Any, data: Splits, title: str, args: Any) -> float:
    """Every training image once as a query, each batch with templates drawn at random; the mean loss."""
    number = len(data.train.labels)
    order, losses = torch.randperm(number), []
    starts = range(0, number - args.queries + 1, args.queries)
    for start in tqdm(starts, desc=title, leave=False, disable=not sys.stderr.isatty()):
        queries = order[start : start + args.queries]
        templates = torch.randint(number, (args.templates,))
        images, labels = as_batch(data.train, torch.cat((queries, templates)).numpy(), args.device)
        loss = loss_of(method, network, augment(images, args.shift, args.flip), labels, args)
        if not bool(loss.isfinite()):
            raise SystemExit(f"knn.py: the loss of {title} is {loss.item()}: lower --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return mean(losses)


def untrained(method: str, data: Splits, args: Any) -> Result:
    """Accuracy of kNN on pixels, or on their principal components."""
    train_x, test_x = (
        images.pixels.reshape(len(images.labels), -1).astype(np.float32) / 255
        for images in (data.train, data.test)
    )
    if method == "pca":
        components = PCA(min(50, train_x.shape[1]), random_state=0).fit(train_x)
        train_x, test_x = components.transform(train_x), components.transform(test_x)
    return Result(neighbours_accuracy(train_x, data.train.labels, test_x, data.test.labels, args.k), 0, 0.0)


# ------------------------------------------------------------------------------------------ command line


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with MNIST, CIFAR-10 or pictures (default: scikit-learn's digits)")
    add("--method", nargs="+", default=["knn", "soft_topk"], metavar="NAME", help="rows, see above, or all")
    add("--seeds", type=int, nargs="+", default=[1], help="of networks and batches, one run each (default: 1)")
    add("--out", type=Path, help="folder for curves and checkpoints; a run that is there goes on")
    add("--k", type=int, default=9, help="neighbours (default: 9)")
    add("--temperature", type=float, help="or epsilon, of the relaxation (default: one for each method)")
    add("--queries", type=int, default=100, help="per step (default: 100)")
    add("--templates", type=int, default=100, help="per step (default: 100)")
    add("--network", choices=("conv", "resnet18"), default="conv")
    add("--optimizer", choices=("adam", "sgd"), default="adam")
    add("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    add("--momentum", type=float, default=0.9, help="of SGD (default: 0.9)")
    add("--weight-decay", type=float, default=0.0, help="(default: 0)")
    add("--shift", type=int, default=0, help="move training images by up to so many pixels (default: 0)")
    add("--flip", action="store_true", help="flip every other training image")
    add("--epochs", type=int, default=40, help="at most (default: 40)")
    add("--patience", type=int, default=10, help="epochs without a better validation accuracy (default: 10)")
    add("--valid", type=int, default=200, help="training images for validation (default: 200)")
    add("--device", type=torch.device, default="cpu", help="such as cuda (default: cpu)")
    args = parser.parse_args()
    if args.method == ["all"]:
        args.method = list(METHODS)
    for method in args.method:
        if method not in METHODS:
            parser.error(f"--method must be of {', '.join(METHODS)}, got {method}")
    for name in ("queries", "templates", "epochs", "patience", "valid"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 1 <= args.k <= args.templates:
        parser.error(f"--k must lie in [1, {args.templates}], the templates of a step, got {args.k}")
    for name in ("temperature", "lr"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be positive, got {value}")
    try:
        args.splits = load(args.data, args.valid, seed=1)
    except DataError as error:
        parser.error(str(error))
    size = args.splits.train.pixels.shape[2:]
    if args.network == "conv" and (size[0] != size[1] or size[0] % 4):
        parser.error(
            f"--network conv wants squares with a side that 4 divides, got images of {size[0]} x {size[1]}"
        )
    number = len(args.splits.train.labels)
    if args.queries > number:
        parser.error(f"--queries must be at most {number}, the training images, got {args.queries}")
    return args


def main() -> None:
    """Trains, evaluates, prints a table."""
    args = parse_args()
    data = args.splits
    print(
        f"{len(data.train.labels)} training, {len(data.valid.labels)} validation, "
        f"{len(data.test.labels)} test images\n\n"
        f"| method | test accuracy, % | seeds | epochs | seconds per epoch |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    for method in args.method:
        seeds = args.seeds[:1] if method in UNTRAINED else args.seeds
        results = [
            untrained(method, data, args) if method in UNTRAINED else train(method, data, seed, args)
            for seed in seeds
        ]
        scores = [result.accuracy for result in results]
        spread = f" ({min(scores):.2f} to {max(scores):.2f})" if len(scores) > 1 else ""
        epochs = sum(result.epochs for result in results)
        seconds = f"{sum(result.seconds for result in results) / epochs:.1f}" if epochs else ""
        print(
            f"| {method} | {mean(scores):.2f}{spread} | {'' if method in UNTRAINED else len(scores)} | "
            f"{' '.join(str(result.epochs) for result in results) if epochs else ''} | {seconds} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
