import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "knn.py"


def knn(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)


def test_trained_features_are_better_neighbours_than_pixels():
    done = knn("--steps", "300", "--seed", "2")
    assert done.returncode == 0, done.stderr
    pixels, features = map(float, re.findall(r"\| ([\d.]+) % \|", done.stdout))
    assert features > pixels > 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "0"], "--k must lie in [1, 100], the templates of a batch, got 0"),
        (["--k", "101"], "got 101"),
        (["--epsilon", "0"], "--epsilon must be positive, got 0.0"),
        (["--batch", "601"], "--batch must lie in [1, 600], got 601"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_bad_options_name_the_value(options, message):
    done = knn(*options)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
