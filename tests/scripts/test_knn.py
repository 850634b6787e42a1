import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "knn.py"


def knn(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)


def table(done: subprocess.CompletedProcess) -> dict[str, list[str]]:
    """The cells after the first, by the first."""
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def test_trained_features_are_better_neighbours_than_pixels():
    rows = table(knn("--shift", "1"))
    assert float(rows["soft_topk"][0]) > float(rows["knn"][0]) > 90


def test_several_seeds_have_a_mean_and_a_spread():
    rows = table(knn("--epochs", "1", "--seeds", "1", "2", "--method", "soft_topk"))
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", rows["soft_topk"][0]) and rows["soft_topk"][1] == "2"


def test_every_other_row_trains():
    methods = [
        "pca", "autoencoder", "pretrained_cnn", "ce_cnn", "softmax_k", "relax_subset", "neuralsort",
        "neuralsort_sampled",
    ]  # fmt: skip
    rows = table(knn("--epochs", "2", "--method", *methods))
    assert list(rows) == methods
    for method, (accuracy, *_) in rows.items():
        assert float(accuracy) > (40 if method == "autoencoder" else 80), method


def test_the_rows_with_200_sinkhorn_steps_train():
    rows = table(knn("--epochs", "1", "--queries", "400", "--templates", "20", "--method", "soft_topk_200"))
    assert float(rows["soft_topk_200"][0]) > 50
    rows = table(knn("--epochs", "1", "--queries", "500", "--templates", "20", "--method", "sinkhorn_sort"))
    assert float(rows["sinkhorn_sort"][0]) > 50


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    options = ["--method", "neuralsort_sampled", "--shift", "1", "--flip"]
    whole = table(knn(*options, "--epochs", "3", "--out", str(tmp_path / "whole")))
    table(knn(*options, "--epochs", "1", "--out", str(tmp_path / "parts")))
    parts = table(knn(*options, "--epochs", "3", "--out", str(tmp_path / "parts")))
    assert parts["neuralsort_sampled"][:3] == whole["neuralsort_sampled"][:3]
    curves = [
        [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.glob("*/neuralsort_sampled/seed1/curve.csv"))
    ]
    assert len(curves) == 2 and curves[0] == curves[1] and len(curves[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "0"], "--k must lie in [1, 100], the templates of a step, got 0"),
        (["--k", "101"], "got 101"),
        (["--temperature", "0"], "--temperature must be positive, got 0.0"),
        (["--queries", "1200"], "--queries must be at most 1097, the training images, got 1200"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--method", "knnn"], "--method must be of knn, pca, autoencoder"),
        (["--valid", "2000"], "2000 validation images of 1297 training images"),
        (["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_options_name_the_value(options, message):
    done = knn(*options)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
