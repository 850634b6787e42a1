import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from knn import augment
from knn_losses import DEFAULT, GRIDS, knn_loss, nearness

SCRIPT = Path(__file__).parents[2] / "scripts" / "knn.py"
PLOT = SCRIPT.with_name("plot_knn.py")


def knn(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)


def table(done: subprocess.CompletedProcess) -> dict[str, list[str]]:
    """The cells after the first, by the first."""
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def read(path: Path) -> list[dict[str, str]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open() as file:
        return list(csv.DictReader(file, delimiter=delimiter))


@pytest.mark.parametrize("method", GRIDS)
def test_right_neighbours_have_a_small_loss_whose_gradient_does_not_lengthen_features(method):
    torch.manual_seed(0)
    right = (torch.arange(100) < 10).expand(20, 100)
    distances = (7 * (torch.where(right, 0.0, 1.0) + torch.rand(20, 100) / 10)).requires_grad_()
    loss = knn_loss(nearness(distances, method, 9, DEFAULT[method]), right.float(), 9, "share")
    assert loss < 0.05
    (gradient,) = torch.autograd.grad(loss, distances)
    along_the_scale = (gradient * distances).sum(1).abs()
    assert (along_the_scale <= 1e-4 * (gradient * distances).abs().sum(1) + 1e-6).all()


def test_trained_features_are_better_neighbours_than_pixels():
    # With all images both are right 98 times of 100, and ten of the 500 test images decide.
    rows = table(knn("--shift", "1", "--cosine", "--limit", "300", "--seeds", "1", "2", "3"))
    assert float(rows["soft_topk"][1].split()[0]) > float(rows["knn"][1]) > 90


def test_bfloat16_learns_nearly_the_same(tmp_path):
    losses, accuracies = [], []
    for option in ([], ["--bf16"]):
        out = tmp_path / "-".join(["run", *option])
        rows = table(
            knn("--limit", "300", "--epochs", "10", "--method", "soft_topk", "--out", str(out), *option)
        )
        accuracies.append(float(rows["soft_topk"][1]))
        losses.append(float(read(out / "soft_topk_0.03" / "seed1" / "curve.csv")[0]["loss"]))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    assert min(accuracies) > 90


def test_several_seeds_have_a_mean_and_a_spread():
    rows = table(knn("--epochs", "1", "--seeds", "1", "2", "--method", "soft_topk"))
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", rows["soft_topk"][1]) and rows["soft_topk"][3] == "1 2"


def test_every_other_row_trains():
    methods = [
        "pca", "autoencoder", "pretrained_cnn", "ce_cnn", "softmax_k", "relax_subset", "neuralsort",
        "neuralsort_sampled",
    ]  # fmt: skip
    rows = table(knn("--epochs", "3", "--method", *methods))
    assert list(rows) == methods
    for method, (_, accuracy, *_) in rows.items():
        assert float(accuracy) > (40 if method == "autoencoder" else 80), method


def test_the_rows_with_200_sinkhorn_steps_train():
    rows = table(knn("--epochs", "1", "--queries", "400", "--templates", "20", "--method", "soft_topk_200"))
    assert float(rows["soft_topk_200"][1]) > 50
    rows = table(knn("--epochs", "1", "--queries", "500", "--templates", "20", "--method", "sinkhorn_sort"))
    assert float(rows["sinkhorn_sort"][1]) > 50


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    options = ["--method", "neuralsort_sampled", "--shift", "1", "--flip"]
    whole = table(knn(*options, "--epochs", "3", "--out", str(tmp_path / "whole")))
    table(knn(*options, "--epochs", "1", "--out", str(tmp_path / "parts")))
    parts = table(knn(*options, "--epochs", "3", "--out", str(tmp_path / "parts")))
    assert parts["neuralsort_sampled"][:5] == whole["neuralsort_sampled"][:5]
    one, other = (
        [(line["epoch"], line["loss"], line["valid_accuracy"]) for line in read(path)]
        for path in tmp_path.glob("*/neuralsort_sampled_3/seed1/curve.csv")
    )
    assert one == other and len(one) == 3


def test_a_run_does_not_go_on_under_other_options(tmp_path):
    options = ["--method", "softmax_k", "--epochs", "1", "--out", str(tmp_path)]
    table(knn(*options))
    other = knn(*options, "--loss", "cross_entropy")
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1].endswith("with --loss share, not cross_entropy: choose another --out")
    before = (tmp_path / "results.tsv").read_text()
    assert knn(*options, "--method", "knn", "--k", "1").returncode == 1
    assert (tmp_path / "results.tsv").read_text() == before
    (tmp_path / "options.json").unlink()
    other = knn(*options, "--loss", "cross_entropy")
    assert other.stderr.splitlines()[-1].endswith("trained with --loss share, not cross_entropy: remove it")


def test_a_run_that_failed_before_its_first_epoch_may_be_repeated_otherwise(tmp_path):
    options = ["--method", "softmax_k", "--epochs", "1", "--limit", "300", "--out", str(tmp_path)]
    assert "lower --lr" in knn(*options, "--optimizer", "sgd", "--lr", "1e9").stderr
    table(knn(*options))


def test_broken_files_of_a_run_are_named(tmp_path):
    options = ["--method", "softmax_k", "--epochs", "1", "--limit", "300", "--out", str(tmp_path)]
    table(knn(*options))
    run = tmp_path / "softmax_k_0.1" / "seed1"
    checkpoint = (run / "last.pt").read_bytes()
    saved = torch.load(run / "last.pt", weights_only=True)
    no_network = saved | {"best_parameters": {}}
    for contents in (b"", checkpoint[:5000], {"a": 1}, no_network):
        if isinstance(contents, bytes):
            (run / "last.pt").write_bytes(contents)
        else:
            torch.save(contents, run / "last.pt")
        assert_one_line(knn(*options), f"knn.py: {run / 'last.pt'} is broken, remove it (")
        assert_one_line(plot("neighbours", run, tmp_path), f"plot_knn.py: {run} holds no training of knn.py (")
    (run / "last.pt").write_bytes(checkpoint)
    options_file, results = tmp_path / "options.json", tmp_path / "results.tsv"
    kept = options_file.read_text()
    for text in ("", "[1]"):
        options_file.write_text(text)
        assert_one_line(knn(*options), f"{options_file}, of the results beside it, cannot be read: ")
    options_file.write_text(kept)
    for text in ("", "garbage\nx\n"):
        results.write_text(text)
        assert_one_line(knn(*options), f"knn.py: {results} does not hold results of knn.py: remove it")
    assert_one_line(
        plot("accuracy", tmp_path, tmp_path), f"plot_knn.py: {results} does not hold results of knn.py"
    )


def plot(kind, what, folder):
    command = [sys.executable, str(PLOT), kind, str(what), "--out", str(folder / "x.png")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def assert_one_line(done, message):
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_the_rows_with_200_sinkhorn_steps_do_not_wait_for_an_error_of_an_accelerator(monkeypatch):
    distances = torch.rand(5, 100) + 1
    distances[:, :10] *= 1e-3
    kept = nearness(distances, "sinkhorn_sort", 9, 0.001)
    for module in ("fairseq_softtopk.ops.problem", "fairseq_softtopk.ops.transport", "knn_losses"):
        monkeypatch.setattr(f"{module}.watched", lambda tensor: False)
    torch.testing.assert_close(nearness(distances, "sinkhorn_sort", 9, 0.001), kept)


def test_the_papers_scale_of_the_cost_is_that_of_the_batch():
    distances = torch.rand(5, 100)
    near = nearness(distances, "soft_topk", 9, 0.1, "batch_max")
    rows = torch.cat((distances, 100 * torch.rand(1, 100)))
    assert not near.allclose(nearness(rows, "soft_topk", 9, 0.1, "batch_max")[:5])
    assert near.allclose(nearness(distances, "soft_topk_200", 9, 0.1, "batch_max"), atol=1e-3)
    rows = table(knn("--cost-scale", "batch_max", "--temperature", "0.01", "--tune", "--epochs", "2"))
    assert rows["soft_topk"][0] == "0.01" and float(rows["soft_topk"][1]) > 80


def test_pictures_need_not_be_square():
    torch.manual_seed(0)
    pixels = torch.rand(4, 3, 6, 10)
    assert augment(pixels, 0, flip=False).equal(pixels)
    assert augment(pixels, 2, flip=True).shape == pixels.shape


def test_tune_keeps_the_temperature_with_the_best_validation_accuracy(tmp_path):
    options = ["--epochs", "2", "--tune-epochs", "1", "--limit", "400", "--method", "neuralsort"]
    rows = table(knn(*options, "--tune", "--seeds", "1", "2", "--out", str(tmp_path)))
    tuning = read(tmp_path / "tune" / "results.tsv")
    assert [(line["seed"], line["epochs"], line["test_accuracy"]) for line in tuning] == [("1", "1", "")] * 4
    tried = {line["temperature"]: float(line["valid_accuracy"]) for line in tuning}
    best = rows["neuralsort"][0]
    assert len(tried) == 4 and tried[best] == max(tried.values())
    results = read(tmp_path / "results.tsv")
    assert [(line["temperature"], line["seed"], line["epochs"]) for line in results] == [
        (best, "1", "2"),
        (best, "2", "2"),
    ]
    rows = table(knn(*options, "--tune", "--seeds", "3", "--out", str(tmp_path)))  # with the same tuning
    assert rows["neuralsort"][0] == best and read(tmp_path / "tune" / "results.tsv") == tuning
    done = knn(*options, "--epochs", "1", "--temperature", best, "--seeds", "3", "--out", str(tmp_path))
    assert done.returncode != 0 and "was trained for 2 epochs, not 1: remove it" in done.stderr


def test_several_temperatures_are_rows_and_a_picture(tmp_path):
    done = knn(
        "--method", "softmax_k", "soft_topk", "--temperature", "0.01", "0.1", "--epochs", "1", "--out",
        str(tmp_path),
    )  # fmt: skip
    assert [line.split(" | ")[1] for line in done.stdout.splitlines()[4:]] == ["0.01", "0.1"] * 2
    run = str(tmp_path / "soft_topk_0.01" / "seed1")
    for options in (
        ["accuracy", str(tmp_path)],
        ["neighbours", run, "--number", "5"],
        ["features", run, run, "--number", "60"],
    ):
        picture = tmp_path / f"{options[0]}.png"
        subprocess.run([sys.executable, str(PLOT), *options, "--out", str(picture)], check=True, timeout=300)
        with Image.open(picture) as image:
            assert min(image.size) > 400 and len(image.getcolors(image.width * image.height)) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["features", "nowhere"], "nowhere holds no training of knn.py"),
        (["neighbours", "nowhere"], "nowhere holds no training of knn.py"),
        (["accuracy", "nowhere"], "nowhere/results.tsv does not exist"),
        (["features", "nowhere", "--number", "3"], "--number must be at least 4, got 3"),
        (["features", "nowhere", "--out", "nowhere/x.png"], "--out: there is no folder "),
        (["features", "nowhere", "--out", "x.txt"], "--out must end in .png, .pdf or .svg, got x.txt"),
    ],
)
def test_plots_of_nothing_say_so(options, message, tmp_path):
    command = [sys.executable, str(PLOT), options[0], "--out", str(tmp_path / "x.png"), *options[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "0"], "--k must be at least 1, got 0"),
        (["--k", "101"], "--k must lie in [1, 100], the templates of a step, got 101"),
        (["--method", "knn", "--k", "1098"], "--k must be at most 1097, the training images, got 1098"),
        (["--cost-scale", "batch_max", "--tune"], "--cost-scale batch_max wants --temperature"),
        (["--temperature", "0"], "--temperature must be positive and finite, got 0.0"),
        (["--temperature", "0.1", "inf"], "--temperature must be positive and finite, got inf"),
        (["--cost-scale", "batch_max", "--method", "neuralsort"], "is for soft_topk and soft_topk_200, got"),
        (["--limit", "-1"], "--limit must be at least 0, got -1"),
        (["--shift", "-1"], "--shift must be at least 0, got -1"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0, got -1.0"),
        (["--queries", "1050"], "must be at most 1097 together, the training images, got 1050 and 100"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--tune-epochs", "0"], "--tune-epochs must be at least 1, got 0"),
        (["--device", "abacus"], "argument --device: abacus: Expected one of cpu, cuda"),
        (["--out", str(SCRIPT)], "--out must be a folder: "),
        (["--out", str(SCRIPT / "x")], "--out must be a folder: "),
        (["--method", "knnn"], "--method must be of knn, pca, autoencoder"),
        (["--method", "knn", "all"], "or all, got all"),
        (["--seeds", "1", "1"], "--seeds must differ, in the first six digits, got 1 1"),
        (["--seeds", "99999999999999999999"], "--seeds must lie in [0, 2^63), got 9999"),
        (
            ["--temperature", "0.1234567", "0.12345671"],
            "--temperature must differ, in the first six digits, got",
        ),
        (["--valid", "2000"], "2000 validation images of 1297 training images"),
        (["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_options_name_the_value(options, message):
    done = knn(*options)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_features_that_are_not_finite_end_training_with_a_message():
    done = knn("--method", "neuralsort", "--optimizer", "sgd", "--lr", "1e9", "--epochs", "1")
    assert done.returncode == 1 and "lower --lr" in done.stderr.splitlines()[-1]
    done = knn("--method", "relax_subset", "--temperature", "1e-40", "--epochs", "1")
    assert done.returncode == 1 and "or raise --temperature" in done.stderr.splitlines()[-1]
