"""The script is run as a user runs it; how it splits an update is also held against a trace made by hand."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmark_training.py"
PARTS = ("teacher forcing", "decoder step", "output layer", "candidates", "operator", "mixing", "rest")


def benchmark(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[str, dict]:
    out = tmp_path_factory.mktemp("quick") / "figures.json"
    done = benchmark("--quick", "--arch", "topk_attention_tiny", "lstm", "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_case_is_in_every_table(quick):
    stdout, description = quick
    for row in description["rows"]:
        case = f"{row['arch']:32}{row['vocabulary']:7}{row['k']:4}"
        assert sum(line.startswith(case) for line in stdout.splitlines()) == 3
        assert row["ratio"] == pytest.approx(row["c_s"] / (row["a_s"] + row["b_s"]))
        assert row["memory_ratio"] == pytest.approx(row["c_mib"] / (row["a_mib"] + row["b_mib"]))
    assert [row["arch"] for row in description["rows"]] == ["topk_attention_tiny", "lstm"]
    assert description["command"].startswith(f"{SCRIPT} --quick") and description["threads"] == 1


def test_parts_sum_to_the_whole_and_every_part_runs_both_ways(quick):
    for row in quick[1]["rows"]:
        times = [row[f"{part}, {way}"] for part in PARTS for way in ("forward", "backward")]
        assert all(time > 0 for time in times), row
        assert sum(times) == pytest.approx(row["profiled_s"]) and sum(
            row[part] for part in PARTS
        ) == pytest.approx(1)
        assert row["c_s"] / 3 < row["profiled_s"] < 20 * row["c_s"]  # one update, which the profiler slows down


def test_targets_are_judged_by_their_worst_case(quick):
    stdout, description = quick
    keys = ("ratio", "memory_ratio", "memory_ratio_recomputed", "operator")
    for target, key in zip(description["targets"], keys, strict=True):
        worst = max(row[key] for row in description["rows"])
        assert target["worst"] == pytest.approx(worst, abs=1e-3)
        assert target["verdict"] == ("reached" if worst <= float(target["target"].split()[-1]) else "missed")
        assert f"{target['verdict']}: {target['target']}, worst {target['worst']}" in stdout


def test_memory_of_the_repeated_batch_is_that_of_its_log_probabilities(tmp_path):
    """At the peak it holds them, their gradient and that of the logits, and little else."""
    size = ("--sentences", 6, "--lengths", 20, 20, "--vocabularies", 20000, "--sizes", 3)
    done = benchmark(*size, "--repeats", 1, "--profiles", 1, "--out", tmp_path / "figures.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "figures.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    expected = 3 * (3 * 6 * 20 * 20000 * 4) / 2**20
    assert 1 <= float(row["b_mib"]) / expected < 1.15
    # The search keeps the log-probabilities of all steps once; recomputing, those of one step.
    assert float(row["d_mib"]) < float(row["c_mib"])


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("benchmark_training")


def event(name: str, start: float, end: float, node: int | None = None, **more) -> dict:
    args = {} if node is None else {"Sequence number": node}
    category = "user_annotation" if name.startswith("part: ") else "cpu_op"
    return {
        "name": name,
        "cat": category,
        "ts": start,
        "dur": end - start,
        "tid": 1,
        "args": {**args, "External id": start},
        **more,
    }


TRACE = [
    event("part: update", 0, 100e6),
    event("part: decoder step", 10e6, 30e6),
    event("aten::mm", 11e6, 12e6, node=0),
    event("aten::add", 13e6, 14e6, node=1),  # makes no node: the number is that of the next one
    event("part: output layer", 20e6, 25e6),
    event("aten::mm", 21e6, 22e6, node=1),
    event("part: backward", 40e6, 90e6),
    event("autograd::engine::evaluate_function: MmBackward0", 45e6, 60e6, node=1),
    event("aten::mm", 46e6, 50e6),
    event("part: operator", 51e6, 53e6),  # recomputed
    event("autograd::engine::evaluate_function: MmBackward0", 60e6, 80e6, node=0),
    event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 80e6, 85e6),
]


def test_backward_time_belongs_to_who_made_the_node(script):
    parts = script.attribute(TRACE)
    expected = {"decoder step": (15, 20), "output layer": (5, 13), "operator": (0, 2), "rest": (30, 15)}
    for part in PARTS:
        assert parts[part] == pytest.approx(expected.get(part, (0, 0)))


def test_on_an_accelerator_the_time_of_the_kernels_counts(script):
    kernels = [
        event("gemm", 300e6, 302e6, cat="kernel", tid=7) | {"args": {"External id": 21e6}},
        event("gemm", 303e6, 307e6, cat="kernel", tid=7) | {"args": {"External id": 46e6}},
    ]
    parts = script.attribute(TRACE + kernels)
    assert parts["output layer"] == pytest.approx((2.0, 4.0)) and parts["rest"] == pytest.approx((94.0, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--lengths", "5", "3"], "--lengths must be 1 <= SHORTEST <= LONGEST, got [5, 3]"),
        (["--sizes", "0"], "--sizes must lie in [1, V - 4], got 0 for a vocabulary of 2000"),
        (["--spread", "0"], "--spread must be positive, got 0.0"),
        (["--out", "figures"], "--out must end with .csv or .json, got figures"),
        (
            ["--quick", "--arch", "no_such"],
            "--arch must be an architecture of fairseq or of this package, got no_such",
        ),
    ],
)
def test_bad_options_name_the_value(options, message):
    done = benchmark(*options)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
