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

Prediction is ordinary kNN over the features of all training images that are not for validation.  Every epoch
is followed by a validation, and the best epoch is tested.  With ``--tune`` the temperature is the one with the
best validation accuracy in a shorter training with seed 1.  fairseq is not needed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import pickle
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from knn_data import DataError, Images, Splits, load
from knn_losses import COST_SCALES, DEFAULT, GRIDS, LOSSES, knn_loss, nearness
from knn_networks import Autoencoder, ConvNet, ResNet18
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from tqdm import tqdm

UNTRAINED = ("knn", "pca")
CLASSIFIERS = ("pretrained_cnn", "ce_cnn")
NEIGHBOURS = tuple(GRIDS)
METHODS = (*UNTRAINED, "autoencoder", *CLASSIFIERS, *NEIGHBOURS)

# Not one of --seeds: a row keeps its temperature when seeds are added to it.
TUNING_SEED = 1

# Options that do not change what a training does.
NOT_OF_THE_RUN = (
    "data", "method", "seeds", "out", "tune", "tune_epochs", "temperature", "device", "epochs", "patience",
)  # fmt: skip

# What reading a checkpoint raises that is not one, or not a whole one.
BROKEN = (
    OSError, EOFError, pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, AttributeError,
)  # fmt: skip


class Result(NamedTuple):
    """A row of ``results.tsv``; what does not apply is empty."""

    method: str
    temperature: float | None
    seed: int | None
    valid_accuracy: float | None
    test_accuracy: float | None
    epochs: int
    seconds: float


# --------------------------------------------------------------------------------------- what is trained


def build(method: str, data: Splits, name: str, width: int) -> nn.Module:
    """The network that a method trains; its encoder is the attribute ``encoder``."""
    shape = data.train.pixels.shape[1:]
    encoder = ConvNet(shape[0], shape[1]) if name == "conv" else ResNet18(shape[0], width)
    if method == "autoencoder":
        return Autoencoder(encoder, shape)
    network = nn.Sequential()
    network.add_module("encoder", encoder)
    if method in CLASSIFIERS:
        network.add_module("classifier", nn.Linear(encoder.features, len(data.classes)))
    return network


def forward(network: nn.Module, images: Tensor, bf16: bool) -> Tensor:
    """What a network makes of images, in float32 whatever it computes in."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        output: Tensor = network(images)
    return output.float()


def loss_of(
    method: str, temperature: float | None, network: nn.Module, images: Tensor, labels: Tensor, args: Any
) -> Tensor:
    """The loss of a batch; the first ``args.queries`` of the images are queries, the others templates."""
    output = forward(network, images, args.bf16)
    if method == "autoencoder":
        return F.mse_loss(output, images)
    if method in CLASSIFIERS:
        return F.cross_entropy(output, labels)
    queries, templates = output.split((args.queries, len(images) - args.queries))
    distances = torch.cdist(queries, templates).square()
    if not bool(distances.isfinite().all()):
        raise SystemExit(f"knn.py: the features of {method} are not finite: lower --lr")
    same_label = (labels[: args.queries, None] == labels[args.queries :]).to(distances.dtype)
    assert temperature is not None
    near = nearness(distances, method, args.k, temperature, args.cost_scale)
    return knn_loss(near, same_label, args.k, args.loss)


# -------------------------------------------------------------------------------------- how it is trained


def as_batch(images: Images, chosen: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels, on the device."""
    pixels = torch.tensor(images.pixels[chosen]).to(device, torch.float32) / 255
    return pixels, torch.tensor(images.labels[chosen]).to(device)


def augment(pixels: Tensor, shift: int, flip: bool) -> Tensor:
    """Each image moved by up to ``shift`` pixels in both directions, and flipped or not."""
    number, _, height, width = pixels.shape
    windows = F.pad(pixels, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * shift + 1, (2, number))
    moved = windows[torch.arange(number), :, top, left]
    flipped = ((torch.rand(number) < 0.5) & flip)[:, None, None, None].to(pixels.device)
    return torch.where(flipped, moved.flip(-1), moved)


@torch.no_grad()
def features_of(network: nn.Module, images: Images, device: torch.device, bf16: bool = False) -> np.ndarray:
    """Features (n, d) of all images."""
    network.eval()
    size = 200 if device.type == "cpu" else 1000  # what fits into caches is twice as fast
    parts = [
        forward(network, as_batch(images, slice(start, start + size), device)[0], bf16).cpu().numpy()
        for start in range(0, len(images.labels), size)
    ]
    network.train()
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise SystemExit("knn.py: the features are not finite: lower --lr")
    return features


def neighbours_accuracy(
    train_x: np.ndarray, train_y: np.ndarray, x: np.ndarray, y: np.ndarray, k: int
) -> float:
    """Accuracy (%) of ordinary kNN."""
    return 100 * float(KNeighborsClassifier(k, n_jobs=-1).fit(train_x, train_y).score(x, y))


def accuracy(method: str, network: nn.Module, data: Splits, images: Images, args: Any) -> float:
    """Accuracy (%) of a trained network on images."""
    if method == "ce_cnn":
        predicted = features_of(network, images, args.device, args.bf16).argmax(1)
        return 100 * float((predicted == images.labels).mean())
    encoder = network.get_submodule("encoder")
    train_x = features_of(encoder, data.train, args.device, args.bf16)
    x = features_of(encoder, images, args.device, args.bf16)
    return neighbours_accuracy(train_x, data.train.labels, x, images.labels, args.k)


class Training:
    """A network, how far its training is, and the best parameters so far; kept in a folder if there is one."""

    def __init__(self, method: str, temperature: float | None, data: Splits, seed: int, args: Any) -> None:
        torch.manual_seed(seed)
        self.network = build(method, data, args.network, args.width)
        self.network.to(args.device, memory_format=torch.channels_last)  # 1.4 times as fast on a CPU
        if args.optimizer == "sgd":
            self.optimizer: Any = torch.optim.SGD(
                self.network.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
            )
        else:
            self.optimizer = torch.optim.Adam(
                self.network.parameters(), args.lr, weight_decay=args.weight_decay
            )
        self.options = options_of_the_run(data, args)
        self.device = args.device
        self.curve: list[tuple[int, float, float, float]] = []  # epoch, loss, validation accuracy, seconds
        self.best = (-1.0, 0)  # validation accuracy, epoch
        self.best_parameters = self.network.state_dict()
        self.folder = None if args.out is None else args.out / run_name(method, temperature) / f"seed{seed}"
        if self.folder is not None and (self.folder / "last.pt").exists():
            self.resume(self.folder / "last.pt", args.epochs)

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.curve)

    @property
    def seconds(self) -> float:
        """How long they took, with their validation."""
        return self.curve[-1][-1] if self.curve else 0.0

    def resume(self, path: Path, epochs: int) -> None:
        """Goes on where the checkpoint is, if there is something to go on to."""
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            if other := difference(saved["options"], self.options):
                raise SystemExit(f"knn.py: {path.parent} was trained with {other}: remove it")
            self.network.load_state_dict(saved["best_parameters"])  # whether they fit
            self.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"].cpu())
            if self.device.type != "cpu" and "device_rng" in saved:
                torch.get_device_module(self.device).set_rng_state(saved["device_rng"].cpu(), self.device)
            self.curve, self.best = saved["curve"], saved["best"]
            self.best_parameters = saved["best_parameters"]
        except BROKEN as error:
            raise SystemExit(f"knn.py: {path} is broken, remove it ({type(error).__name__})") from error
        if self.epoch > epochs:
            raise SystemExit(
                f"knn.py: {path.parent} was trained for {self.epoch} epochs, not {epochs}: remove it"
            )

    def finish_epoch(self, loss: float, valid: float, seconds: float) -> None:
        """Takes note of an epoch, and writes the checkpoint and the curve."""
        self.curve.append((self.epoch + 1, loss, valid, self.seconds + seconds))
        if valid >= self.best[0]:  # of equals, the one trained longer
            self.best = valid, self.epoch
            self.best_parameters = {name: value.clone() for name, value in self.network.state_dict().items()}
        if self.folder is None:
            return
        saved = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "curve": self.curve,
            "best": self.best,
            "best_parameters": self.best_parameters,
            "options": self.options,
        }
        if self.device.type != "cpu":
            saved["device_rng"] = torch.get_device_module(self.device).get_rng_state(self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(saved, self.folder / "last.part")
        (self.folder / "last.part").replace(self.folder / "last.pt")
        with (self.folder / "curve.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("epoch", "loss", "valid_accuracy", "seconds"))
            table.writerows(
                (epoch, f"{loss:.6f}", f"{valid:.3f}", f"{seconds:.1f}")
                for epoch, loss, valid, seconds in self.curve
            )


def train(
    method: str, temperature: float | None, data: Splits, seed: int, args: Any, test: bool = True
) -> Result:
    """Trains until the validation accuracy has been below its best for a while, and tests the best network."""
    run = Training(method, temperature, data, seed, args)
    while run.epoch < args.epochs and run.epoch - run.best[1] < args.patience:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.epoch, args)
        started = time.perf_counter()
        loss = train_epoch(method, temperature, run.network, run.optimizer, data, run.epoch + 1, args)
        valid = accuracy(method, run.network, data, data.valid, args)
        run.finish_epoch(loss, valid, time.perf_counter() - started)
    run.network.load_state_dict(run.best_parameters)
    tested = accuracy(method, run.network, data, data.test, args) if test else None
    return Result(method, temperature, seed, run.best[0], tested, run.epoch, run.seconds)


def run_name(method: str, temperature: float | None) -> str:
    """The folder of a row."""
    return method if temperature is None else f"{method}_{temperature:g}"


def options_of_the_run(data: Splits, args: Any) -> dict[str, str]:
    """What a training that goes on must agree with."""
    return {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in vars(args).items()
        if name not in NOT_OF_THE_RUN
    } | {
        "--data": str(data),
        **({"--epochs": str(args.epochs)} if args.cosine else {}),
    }


def difference(saved: dict[str, str], options: dict[str, str]) -> str | None:
    """The first option that is not what it was."""
    for name, value in options.items():
        if saved.get(name) != value:
            return f"{name} {saved.get(name)}, not {value}"
    return None


def claim(folder: Path, options: dict[str, str]) -> None:
    """Sees to it that a folder holds results of the same options only."""
    path = folder / "options.json"
    empty = not (folder / "results.tsv").exists() and not any(folder.rglob("last.pt"))
    if empty or not path.exists():
        path.with_suffix(".part").write_text(json.dumps(options, indent=2) + "\n")
        path.with_suffix(".part").replace(path)
        return
    try:
        saved = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"knn.py: {path}, of the results beside it, cannot be read: {error}") from error
    if other := difference(saved, options):
        raise SystemExit(f"knn.py: the results in {folder} are with {other}: choose another --out")


def learning_rate(epoch: int, args: Any) -> float:
    """``--lr``, with ``--cosine`` falling to 0 along half a cosine."""
    share = (1 + math.cos(math.pi * epoch / args.epochs)) / 2 if args.cosine else 1.0
    return float(args.lr) * share


def train_epoch(
    method: str,
    temperature: float | None,
    network: nn.Module,
    optimizer: Any,
    data: Splits,
    epoch: int,
    args: Any,
) -> float:
    """Every training image once as a query, each batch with templates drawn from the others; the mean loss.

    Less than a batch of queries, which may be left at the end, is not taken.
    """
    number, title = len(data.train.labels), f"{method} epoch {epoch}"
    order, losses = torch.randperm(number), []
    starts = range(0, number - args.queries + 1, args.queries)
    for start in tqdm(starts, desc=title, leave=False, disable=not sys.stderr.isatty()):
        queries = order[start : start + args.queries]
        others = torch.cat((order[:start], order[start + args.queries :]))
        templates = others[torch.randperm(len(others))[: args.templates]]
        images, labels = as_batch(data.train, torch.cat((queries, templates)).numpy(), args.device)
        images = augment(images, args.shift, args.flip)
        loss = loss_of(method, temperature, network, images, labels, args)
        if not bool(loss.isfinite()):
            cure = "--lr, or raise --temperature" if method in NEIGHBOURS else "--lr"
            raise SystemExit(f"knn.py: the loss of {title} is {loss.item()}: lower {cure}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return mean(losses)


def untrained(method: str, data: Splits, args: Any) -> Result:
    """Accuracy of kNN on pixels, or on their principal components."""
    train_x, valid_x, test_x = (
        images.pixels.reshape(len(images.labels), -1).astype(np.float32) / 255
        for images in (data.train, data.valid, data.test)
    )
    if method == "pca":
        components = PCA(min(50, *train_x.shape), random_state=0).fit(train_x)
        train_x, valid_x, test_x = map(components.transform, (train_x, valid_x, test_x))
    valid, tested = (
        neighbours_accuracy(train_x, data.train.labels, x, labels, args.k)
        for x, labels in ((valid_x, data.valid.labels), (test_x, data.test.labels))
    )
    return Result(method, None, None, valid, tested, 0, 0.0)


def run(method: str, data: Splits, args: Any) -> list[list[Result]]:
    """Trains a method with every seed: a row for each temperature, or for the one that is tuned."""
    if method in UNTRAINED:
        return [[untrained(method, data, args)]]
    temperatures: tuple[float | None, ...] = (None,)
    if method in NEIGHBOURS and args.tune and args.temperature is None:
        temperatures = (tune(method, data, args),)
    elif method in NEIGHBOURS:
        temperatures = tuple(args.temperature or (DEFAULT[method],))
    return [
        [train(method, temperature, data, seed, args) for seed in args.seeds] for temperature in temperatures
    ]


def tune(method: str, data: Splits, args: Any) -> float | None:
    """The temperature with the best validation accuracy; all of them are in ``OUT/tune/results.tsv``."""
    shorter = argparse.Namespace(**vars(args))
    shorter.epochs = args.tune_epochs
    shorter.out = None if args.out is None else args.out / "tune"
    tried = [
        train(method, temperature, data, TUNING_SEED, shorter, test=False) for temperature in GRIDS[method]
    ]
    if shorter.out is not None:
        write_results(tried, shorter.out / "results.tsv")
    return max(tried, key=lambda result: result.valid_accuracy or 0.0).temperature


# ------------------------------------------------------------------------------------------ command line


def device(name: str) -> torch.device:
    """A device that is there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {str(error).splitlines()[0]}") from error


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with MNIST, CIFAR-10 or pictures (default: scikit-learn's digits)")
    add("--method", nargs="+", default=["knn", "soft_topk"], metavar="NAME", help="rows, see above, or all")
    add("--seeds", type=int, nargs="+", default=[1], help="of networks and batches, one run each (default: 1)")
    add("--out", type=Path, help="folder for curves and checkpoints; a run that is there goes on")
    add("--k", type=int, default=9, help="neighbours (default: 9)")
    add(
        "--temperature",
        type=float,
        nargs="+",
        help="or epsilon, of the relaxation, a row for each (default: one for each method)",
    )
    add(
        "--tune",
        action="store_true",
        help="without --temperature: try four with seed 1, keep that with the best validation accuracy",
    )
    add("--tune-epochs", type=int, help="of each of them, at most (default: a third of --epochs)")
    add(
        "--loss",
        choices=LOSSES,
        default="share",
        help="of the share p of right neighbours: 1 - p, or -ln p (default: share)",
    )
    add(
        "--cost-scale",
        choices=COST_SCALES,
        default="mean",
        help="what squared distances are divided by: the mean of a query, or, as in the paper, the largest in "
        "the batch, for soft_topk and soft_topk_200 (default: mean)",
    )
    add("--queries", type=int, default=100, help="per step (default: 100)")
    add("--templates", type=int, default=100, help="per step (default: 100)")
    add("--network", choices=("conv", "resnet18"), default="conv")
    add("--width", type=int, default=64, help="channels of ResNet-18's first stage (default: 64)")
    add("--optimizer", choices=("adam", "sgd"), default="adam")
    add("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    add("--cosine", action="store_true", help="let it fall to 0 over --epochs")
    add("--momentum", type=float, default=0.9, help="of SGD (default: 0.9)")
    add("--weight-decay", type=float, default=0.0, help="(default: 0)")
    add("--shift", type=int, default=0, help="move training images by up to so many pixels (default: 0)")
    add("--flip", action="store_true", help="flip every other training image")
    add("--epochs", type=int, default=40, help="at most (default: 40)")
    add(
        "--patience",
        type=int,
        default=10,
        help="epochs in a row that are worse on validation than the best before them (default: 10)",
    )
    add("--valid", type=int, default=200, help="training images for validation (default: 200)")
    add("--limit", type=int, default=0, help="training images, drawn at random (default: 0, all of them)")
    add("--bf16", action="store_true", help="the networks compute in bfloat16 (autocast)")
    add("--device", type=device, default="cpu", help="such as cuda (default: cpu)")
    args = parser.parse_args()
    if args.tune_epochs is None:
        args.tune_epochs = -(-args.epochs // 3)
    if args.method == ["all"]:
        args.method = list(METHODS)
    for method in args.method:
        if method not in METHODS:
            parser.error(f"--method must be of {', '.join(METHODS)}, or all, got {method}")
    for lowest, names in (
        (1, ("queries", "templates", "epochs", "tune_epochs", "patience", "valid", "width")),
        (0, ("limit", "shift", "weight_decay", "momentum")),
    ):
        for name in names:
            if not lowest <= getattr(args, name) < math.inf:
                parser.error(f"--{name.replace('_', '-')} must be at least {lowest}, got {getattr(args, name)}")
    trained = [method for method in args.method if method not in UNTRAINED]
    if args.k < 1:
        parser.error(f"--k must be at least 1, got {args.k}")
    if trained and args.k > args.templates:
        parser.error(f"--k must lie in [1, {args.templates}], the templates of a step, got {args.k}")
    for method in args.method if args.cost_scale == "batch_max" else ():
        if method in NEIGHBOURS and not method.startswith("soft_topk"):
            parser.error(f"--cost-scale batch_max is for soft_topk and soft_topk_200, got --method {method}")
        if method in NEIGHBOURS and args.temperature is None:
            parser.error("--cost-scale batch_max wants --temperature: what is tried otherwise is for its scale")
    if not all(0 <= seed < 2**63 for seed in args.seeds):
        parser.error(f"--seeds must lie in [0, 2^63), got {' '.join(map(str, args.seeds))}")
    for name in ("method", "seeds", "temperature"):
        names = [f"{value:g}" if name == "temperature" else value for value in getattr(args, name) or []]
        if len(set(names)) < len(names):
            parser.error(f"--{name} must differ, in the first six digits, got {' '.join(map(str, names))}")
    for name, values in (("temperature", args.temperature or []), ("lr", [args.lr])):
        for value in values:
            if not 0 < value < math.inf:
                parser.error(f"--{name} must be positive and finite, got {value}")
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out must be a folder: {error}")
    return args


def check_sizes(data: Splits, args: Any) -> None:
    """Raises ``DataError`` if there are too few images, or images that the network does not take."""
    height, width = data.train.pixels.shape[2:]
    number = len(data.train.labels)
    if args.k > number:
        raise DataError(f"--k must be at most {number}, the training images, got {args.k}")
    if set(args.method) <= set(UNTRAINED):
        return
    if args.network == "conv" and (height != width or height % 4):
        raise DataError(
            f"--network conv wants squares with a side that 4 divides, got images of {height} x {width}"
        )
    if args.queries + args.templates > number:
        raise DataError(
            f"--queries and --templates must be at most {number} together, the training images, "
            f"got {args.queries} and {args.templates}"
        )


def table_row(results: list[Result]) -> str:
    """The row of a method in the Markdown table."""
    one = results[0]
    epochs = sum(result.epochs for result in results)
    cells = [
        one.method,
        "" if one.temperature is None else f"{one.temperature:g}",
        spread([result.test_accuracy for result in results]),
        spread([result.valid_accuracy for result in results]),
        " ".join(str(result.seed) for result in results if result.seed is not None),
        " ".join(str(result.epochs) for result in results if epochs),
        f"{sum(result.seconds for result in results) / epochs:.1f}" if epochs else "",
    ]
    return "| " + " | ".join(cells) + " |"


def spread(values: list[float | None]) -> str:
    """Mean, lowest and highest of what is known."""
    known = [value for value in values if value is not None]
    return f"{mean(known):.2f}" + (f" ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else "")


def main() -> None:
    """Trains, evaluates, prints a table."""
    args = parse_args()
    try:
        data = load(args.data, args.valid, seed=1, limit=args.limit)
        check_sizes(data, args)
    except DataError as error:
        raise SystemExit(f"knn.py: {error}") from error
    if args.out is not None:
        claim(args.out, options_of_the_run(data, args))
    header = (
        "method", "temperature", "test accuracy, %", "validation", "seeds", "epochs", "seconds per epoch"
    )  # fmt: skip
    print(
        f"{len(data.train.labels)} training, {len(data.valid.labels)} validation, "
        f"{len(data.test.labels)} test images\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}",
        flush=True,
    )
    for method in args.method:
        for results in run(method, data, args):
            print(table_row(results), flush=True)
            if args.out is not None:
                write_results(results, args.out / "results.tsv")


def write_results(results: list[Result], path: Path) -> None:
    """Adds a line for each result, in the place of an earlier one of the same training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, *lines = path.read_text().split("\n") if path.exists() else ["\t".join(Result._fields)]
    if header.split("\t") != [*Result._fields]:
        raise SystemExit(f"knn.py: {path} does not hold results of knn.py: remove it")
    rows = {tuple(line.split("\t")[:3]): line.split("\t") for line in lines if line}
    for result in results:
        line = [
            "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
            for value in result
        ]
        rows[tuple(line[:3])] = line
    part = path.with_suffix(".part")
    part.write_text("\n".join("\t".join(line) for line in (Result._fields, *rows.values())) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
