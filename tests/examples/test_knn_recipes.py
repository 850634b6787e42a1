"""The recipes of Table 1, on little data in the formats of theirs."""

import os
import pickle
import struct
import subprocess
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

RECIPE = Path(__file__).parents[2] / "examples" / "knn"


def recipe(name: str, *options: str, **settings: str) -> list[list[str]]:
    """The cells of the table that it prints."""
    done = subprocess.run(
        ["bash", str(RECIPE / name), *options],
        env=os.environ | settings, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def tuned_for(run: Path) -> set[str]:
    """How many epochs the trainings took that chose the temperature."""
    return {line.split("\t")[5] for line in (run / "tune" / "results.tsv").read_text().splitlines()[1:]}


def test_mnist(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    arrays = [np.uint8(pixels * 15).reshape(-1, 8, 8), np.uint8(labels)]
    for kind, part in (("train", slice(0, 1200)), ("t10k", slice(1200, None))):
        for name, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array[part].shape)
            (tmp_path / f"{kind}-{name}-ubyte").write_bytes(header + array[part].tobytes())
    settings = {"MNIST": str(tmp_path), "RUN": str(tmp_path / "run")}
    rows = recipe("mnist.sh", "--small", "--valid", "200", "--method", "pca", "softmax_k", **settings)
    assert [row[0] for row in rows] == ["pca", "softmax_k"]
    assert all(float(row[2]) > 80 for row in rows)
    assert (tmp_path / "run" / "results.tsv").is_file()
    assert tuned_for(tmp_path / "run") == {"1"}


def test_cifar10(tmp_path):
    rng = np.random.default_rng(1)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        labels = rng.integers(10, size=60)
        pixels = np.uint8(25 * labels[:, None] + rng.integers(20, size=(60, 3072)))  # brighter by class
        (tmp_path / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}))
    options = ["--small", "--valid", "50", "--limit", "0", "--method", "pretrained_cnn", "softmax_k"]
    rows = recipe("cifar10.sh", *options, CIFAR10=str(tmp_path), RUN=str(tmp_path / "run"))
    assert [row[0] for row in rows] == ["pretrained_cnn", "softmax_k"]
    assert all(row[4:6] == ["1", "1"] for row in rows)
    assert tuned_for(tmp_path / "run") == {"1"}
