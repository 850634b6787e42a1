"""The script is run as a user runs it; what it measured is read off its files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmark_ops.py"
CASES = [("8", "100", "0.1"), ("8", "100", "0.001"), ("4", "1000", "0.1"), ("4", "1000", "0.001")]
OURS = ("soft_topk", "sorted_soft_topk", "sinkhorn", "sorted sinkhorn")


def benchmark(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def read(folder: Path) -> tuple[list[dict[str, str]], dict]:
    with (folder / "ratios.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / "benchmark.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[str, list[dict[str, str]], dict, Path]:
    out = tmp_path_factory.mktemp("quick")
    done = benchmark(
        "--quick", "--out", out, "--methods", "softmax", "torch.topk", *OURS, "torchsort soft_rank"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, *read(out), out


def test_every_method_is_measured_in_every_case(quick):
    _, rows, _, _ = quick
    for method in ("softmax", "torch.topk", *OURS):
        found = [row for row in rows if row["method"] == method]
        assert [(row["batch"], row["n"], row["epsilon"]) for row in found] == CASES
        for row in found:
            assert row["status"] == "ok" or method == "sorted sinkhorn", row
            figures = ("forward", "both", "memory") if row["status"] == "ok" else ("forward",)
            assert all(float(row[figure]) > 0 for figure in figures), row
            ratio = float(row["forward_us"]) / float(row["softmax_forward_us"])
            assert float(row["forward"]) == pytest.approx(ratio)


def test_memory_counts_result_and_both_gradients(quick):
    _, rows, _, _ = quick
    assert {float(row["memory"]) for row in rows if row["method"] == "softmax"} == {3.0}
    assert all(float(row["memory"]) >= 3 for row in rows if row["method"] == "soft_topk")


def test_newton_is_exact_and_sinkhorn_is_not_at_small_epsilon(quick):
    _, rows, _, _ = quick
    error = {(row["method"], row["n"], row["epsilon"]): row["error"] for row in rows}
    for _, n, epsilon in CASES:
        assert max(float(error[method, n, epsilon]) for method in OURS[:2]) < 1e-6
        assert error["softmax", n, epsilon] == ""
    assert float(error["sinkhorn", "1000", "0.1"]) < 1e-3 < 0.1 < float(error["sinkhorn", "1000", "0.001"])


def test_targets_are_judged_by_their_worst_case(quick):
    stdout, rows, description, _ = quick
    targets = {target["target"]: target for target in description["targets"]}
    assert len(targets) == 6
    forward = targets["soft_topk forward / softmax <= 8"]
    large = [float(row["forward"]) for row in rows if row["method"] == "soft_topk" and row["n"] == "1000"]
    assert forward["worst"] == pytest.approx(max(large), abs=0.01)
    assert forward["verdict"] == ("reached" if max(large) <= 8 else "missed")
    pairs = zip(
        *([row for row in rows if row["method"] == name] for name in ("sinkhorn", "soft_topk")), strict=True
    )
    speedup = min(float(slow[key]) / float(fast[key]) for slow, fast in pairs for key in ("forward", "both"))
    assert targets["Sinkhorn / soft_topk >= 200"]["worst"] == pytest.approx(speedup, abs=0.01)
    for target in targets.values():
        assert f"{target['verdict']}: {target['target']}, worst {target['worst']} ({target['case']})" in stdout


def test_json_says_where_the_figures_come_from(quick):
    _, rows, description, out = quick
    assert description["command"].startswith(f"{SCRIPT} --quick --out {out}")
    assert (description["threads"], description["device"], description["repeats"]) == (1, "cpu", 2)
    assert description["torch"] and description["python"] and "cores" in description["machine"]
    assert set(description["peers"]) == {"softtorch", "difftopk", "torchsort", "entmax", "pot"}
    version = description["peers"]["torchsort"]
    if not version[0].isdigit():
        assert {row["status"] for row in rows if row["method"] == "torchsort soft_rank"} == {version}
    assert (out / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_named(tmp_path):
    options = ("--shapes", "4,50,3", "--epsilons", 0.1, "--methods", "soft_topk", "sinkhorn", "--repeats", 1)
    done = benchmark(*options, "--memory-limit", 1e-6, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows, description = read(tmp_path)
    status = {(row["scores"], row["method"]): row["status"] for row in rows}
    for scores in ("normal", "uniform"):
        assert status[scores, "soft_topk"] == "ok"
        assert status[scores, "sinkhorn"] == "skipped: it needs about 1.5e-05 GiB, --memory-limit is 1e-06"
    assert done.stdout.count("skipped: it needs about") == 2
    verdicts = [target["verdict"] for target in description["targets"]]
    assert verdicts.count("not measured") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "4,5,5"], "--shapes must be BATCH,N,K with 0 < K < N, got 4,5,5"),
        (["--shapes", "4,5"], "got 4,5"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--epsilons", "0"], "--epsilons must be positive, got [0.0]"),
    ],
)
def test_bad_options_name_the_value(options, message):
    done = benchmark(*options)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
