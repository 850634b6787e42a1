"""What goes into the figures is checked; that they are drawn, by drawing them small."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_softtopk.ops import soft_topk, sorted_soft_topk

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_ops.py"


@pytest.fixture
def plot_ops():
    spec = importlib.util.spec_from_file_location("plot_ops", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("operator", "k"), [(soft_topk, 5), (sorted_soft_topk, 3)])
def test_plans_have_their_marginals_and_a_hard_limit(plot_ops, operator, k):
    scores = torch.tensor(plot_ops.PLAN_SCORES, dtype=torch.float64)
    columns = [5, 2] if operator is soft_topk else [1, 1, 1, 4]
    for epsilon in plot_ops.PLAN_EPSILONS.values():
        plan = plot_ops.plan(operator, scores, k, epsilon=epsilon)
        torch.testing.assert_close(plan.sum(1), torch.ones_like(scores))
        torch.testing.assert_close(plan.sum(0), torch.tensor(columns, dtype=torch.float64))
        assert plan.min() > -1e-9
    hard = plot_ops.plan(operator, scores, k, epsilon=1e-6)
    torch.testing.assert_close(hard, hard.round())
    best = scores.topk(k).indices
    if operator is soft_topk:
        assert set(hard[:, 0].nonzero().flatten().tolist()) == set(best.tolist())
    else:
        assert hard[:, :k].argmax(0).tolist() == best.tolist()


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("elements", [[6], [4, 5, 6]])
def test_a_gradient_raises_what_it_should_at_the_expense_of_the_others(plot_ops, elements, epsilon):
    scores = torch.arange(10, dtype=torch.float64)
    weights, gradient = plot_ops.push(scores, 3, elements, epsilon)
    assert abs(gradient.sum()) < 1e-9
    assert sorted((gradient > 0).nonzero().flatten().tolist()) == elements
    moved, _ = plot_ops.push(scores + 1e-3 * gradient, 3, elements, epsilon)
    gain = (moved - weights)[elements].sum()
    torch.testing.assert_close(gain, 1e-3 * gradient.square().sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
def test_the_error_grows_for_sinkhorn_but_not_for_newton(plot_ops, operator, recwarn):
    scores = torch.randn(2, 200)
    soft, middle, hard = (plot_ops.measure(operator, scores, 5, epsilon, 1) for epsilon in (1.0, 1e-3, 1e-5))
    errors = [found["sinkhorn_log"][0] for found in (soft, middle, hard)]
    assert errors[0] < 1e-5 < 1e-2 < errors[1] < errors[2]
    assert all(found["newton"][0] < 1e-5 for found in (soft, middle, hard))
    assert soft["sinkhorn"][0] < 1e-5
    assert "sinkhorn" not in hard  # it underflows
    assert all(time > 0 for found in (soft, middle, hard) for _, time in found.values())
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def test_draws_every_figure(plot_ops, monkeypatch, tmp_path):
    for name, value in {"BATCH": 1, "N": 100, "ROUNDS": 1, "ERROR_EPSILONS": [1.0, 1e-2, 1e-4]}.items():
        monkeypatch.setattr(plot_ops, name, value)
    monkeypatch.setattr(sys, "argv", ["plot_ops.py", "--out", str(tmp_path / "new")])
    plot_ops.main()
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["epsilon.png", "error.png", "gradients.png", "plans.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in files)


def test_draws_only_what_is_asked_for(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "plans", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'plans.png'}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["plans.png"]


def test_refuses_an_unknown_figure(plot_ops, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_ops.py", "plan"])
    with pytest.raises(SystemExit, match="2"):
        plot_ops.main()
    assert "FIGURE must be one of plans, epsilon, gradients, error, got 'plan'" in capsys.readouterr().err


def test_says_how_to_get_matplotlib(plot_ops, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_ops.py"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        plot_ops.main()
    assert 'matplotlib is missing: pip install "fairseq-softtopk[plots]"' in capsys.readouterr().err
