"""Draws what ``knn.py --out FOLDER`` has trained.

- ``python scripts/plot_knn.py features RUN... --out PNG``: the features of test images, drawn at random, in two
  dimensions (t-SNE, the paper's Figure 5), a panel for each training, coloured by label;
- ``python scripts/plot_knn.py neighbours RUN --out PNG``: test images, drawn at random, and the training images
  nearest to them; those that kNN gets wrong come first;
- ``python scripts/plot_knn.py accuracy FOLDER --out PNG``: test accuracy against epsilon, and against the
  temperature, a line for each method in ``results.tsv``.

A RUN is a folder such as ``FOLDER/soft_topk_0.001/seed1``; ``--data`` is that of its training.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from knn import BROKEN, features_of
from knn_data import DataError, Splits, load
from knn_networks import ConvNet, ResNet18
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BY_EPSILON = ("soft_topk", "soft_topk_200", "sinkhorn_sort")  # the others have a temperature


class Run:
    """A training: its best encoder, and the data that it saw."""

    def __init__(self, folder: Path, data: Path | None) -> None:
        try:
            self.open(folder, data)
        except DataError:
            raise
        except BROKEN as error:
            name = type(error).__name__
            raise SystemExit(f"plot_knn.py: {folder} holds no training of knn.py ({name})") from error

    def open(self, folder: Path, data: Path | None) -> None:
        """Reads the checkpoint and the data."""
        saved = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
        options = saved["options"]
        self.title = "/".join(folder.resolve().parts[-2:])
        self.k = int(options["--k"])
        self.splits: Splits = load(data, int(options["--valid"]), seed=1, limit=int(options["--limit"]))
        shape = self.splits.train.pixels.shape
        if str(self.splits) != options["--data"]:
            raise SystemExit(
                f"plot_knn.py: {folder} was trained on other images, {options['--data']}, not {self.splits}"
            )
        self.encoder: nn.Module = (
            ConvNet(shape[1], shape[2])
            if options["--network"] == "conv"
            else ResNet18(shape[1], int(options["--width"]))
        )
        self.encoder.load_state_dict(
            {
                name.removeprefix("encoder."): value
                for name, value in saved["best_parameters"].items()
                if name.startswith("encoder.")
            }
        )

    def features(self, split: str) -> np.ndarray:
        """Features (n, d) of the images of a split."""
        return features_of(self.encoder, getattr(self.splits, split), torch.device("cpu"))


def draw_features(runs: list[Run], number: int) -> Any:
    """A panel for each training: t-SNE of the features of some test images."""
    figure, axes = plt.subplots(
        1, len(runs), figsize=(1 + 4.5 * len(runs), 4.5), squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("tab10")
    for axis, run in zip(axes[0], runs, strict=True):
        chosen = np.random.default_rng(0).permutation(len(run.splits.test.labels))[:number]
        labels = run.splits.test.labels[chosen]
        perplexity = min(30, (len(chosen) - 1) / 3)  # scikit-learn's default, or what so few points allow
        points = TSNE(random_state=0, perplexity=perplexity).fit_transform(run.features("test")[chosen])
        for label, name in enumerate(run.splits.classes):
            axis.scatter(*points[labels == label].T, s=6, color=colours(label % 10), label=name)
        axis.set(title=run.title, xticks=[], yticks=[])
    handles, names = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", markerscale=3)
    return figure


def draw_neighbours(run: Run, number: int) -> Any:
    """A row for each query: the test image, and its nearest training images."""
    train, test = run.splits.train, run.splits.test
    classifier = KNeighborsClassifier(run.k).fit(run.features("train"), train.labels)
    features = run.features("test")
    wrong = classifier.predict(features) != test.labels
    shuffled = np.random.default_rng(0).permutation(len(wrong))
    queries = shuffled[np.argsort(~wrong[shuffled], kind="stable")][:number]
    nearest = classifier.kneighbors(features[queries], return_distance=False)
    rows = len(queries)
    figure, axes = plt.subplots(
        rows, 1 + run.k, figsize=(1 + run.k, 0.5 + 1.25 * rows), squeeze=False, layout="constrained"
    )
    figure.suptitle(f"{run.title}: kNN has {wrong.sum()} of {len(wrong)} test images wrong")
    for row, query, templates in zip(axes, queries, nearest, strict=True):
        pictures = [(test, query), *((train, template) for template in templates)]
        for axis, (images, i) in zip(row, pictures, strict=True):
            axis.imshow(images.pixels[i].transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255)
            right = images.labels[i] == test.labels[query]
            axis.set_title(
                run.splits.classes[images.labels[i]], size=8, pad=2, color="black" if right else "red"
            )
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel("query", size=8)
    return figure


def draw_accuracy(path: Path) -> Any:
    """A line for each method that was trained with several temperatures."""
    points: dict[str, dict[float, list[float]]] = {}
    try:
        with path.open() as file:
            for row in csv.DictReader(file, delimiter="\t"):
                if row["temperature"] and row["test_accuracy"]:
                    accuracies = points.setdefault(row["method"], {})
                    accuracies.setdefault(float(row["temperature"]), []).append(float(row["test_accuracy"]))
    except (KeyError, ValueError) as error:
        raise SystemExit(f"plot_knn.py: {path} does not hold results of knn.py ({error})") from error
    if not points:
        raise SystemExit(f"plot_knn.py: {path} has no test accuracy of a method with a temperature")
    units = {method: "epsilon" if method in BY_EPSILON else "temperature" for method in points}
    names = sorted(set(units.values()))
    figure, axes = plt.subplots(
        1, len(names), figsize=(1 + 5.5 * len(names), 4.5), squeeze=False, sharey=True, layout="constrained"
    )
    for method, accuracies in points.items():
        axis = axes[0][names.index(units[method])]
        temperatures = sorted(accuracies)
        means = [float(np.mean(accuracies[temperature])) for temperature in temperatures]
        ends = [
            [mean - min(accuracies[x]), max(accuracies[x]) - mean]
            for x, mean in zip(temperatures, means, strict=True)
        ]
        axis.errorbar(temperatures, means, np.transpose(ends), marker="o", capsize=3, label=method)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set(xscale="log", xlabel=name)
        axis.legend()
    axes[0][0].set(ylabel="test accuracy, % (mean, lowest, highest seed)")
    return figure


def main() -> None:
    """Draws one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("features", "neighbours", "accuracy"):
        command = kinds.add_parser(kind)
        if kind == "accuracy":
            command.add_argument("folder", type=Path, help="what --out of knn.py was")
        else:
            several = "+" if kind == "features" else 1
            command.add_argument("runs", type=Path, nargs=several, metavar="RUN")
            command.add_argument("--data", type=Path, help="of the training (default: scikit-learn's digits)")
            default = 2000 if kind == "features" else 8
            command.add_argument("--number", type=int, default=default, help=f"of images (default: {default})")
        command.add_argument("--out", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    if not args.out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.resolve().parent}")
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        parser.error(f"--out must end in .png, .pdf or .svg, got {args.out}")
    if args.kind == "accuracy":
        if not (args.folder / "results.tsv").is_file():
            parser.error(f"{args.folder / 'results.tsv'} does not exist")
        figure = draw_accuracy(args.folder / "results.tsv")
    else:
        lowest = 4 if args.kind == "features" else 1
        if args.number < lowest:
            parser.error(f"--number must be at least {lowest}, got {args.number}")
        try:
            runs = [Run(folder, args.data) for folder in args.runs]
        except DataError as error:
            parser.error(str(error))
        figure = (
            draw_features(runs, args.number)
            if args.kind == "features"
            else draw_neighbours(runs[0], args.number)
        )
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
