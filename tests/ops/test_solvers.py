"""hard=True, the paper's Sinkhorn, and what a solver says of its own result."""

import inspect
import math
import warnings

import pytest
import torch
from oracles import algorithm_1, cost_of

from fairseq_softtopk.ops import (
    SoftTopK,
    log_soft_topk,
    soft_topk,
    solve_transport,
    sorted_soft_topk,
)

SOLVERS = ["newton", "sinkhorn", "sinkhorn_log"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_hard_is_torch_topk_with_its_ties(dtype, largest, solver):
    scores = torch.randint(0, 4, (5, 12)).to(dtype)
    where = scores.topk(4, largest=largest).indices
    options = {"epsilon": 5.0, "hard": True, "largest": largest, "solver": solver}
    assert torch.equal(soft_topk(scores, 4, **options), torch.zeros_like(scores).scatter(-1, where, 1.0))
    ranks = torch.nn.functional.one_hot(where, 12).transpose(-1, -2).to(dtype)
    assert torch.equal(sorted_soft_topk(scores, 4, **options), ranks)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_hard_along_any_dim(dim):
    scores = torch.randn(5, 6, 7)
    expected = torch.zeros_like(scores).scatter(dim, scores.topk(3, dim=dim).indices, 1.0)
    assert torch.equal(soft_topk(scores, 3, dim=dim, hard=True), expected)


def test_hard_with_one_k_per_problem():
    scores, k = torch.randint(0, 3, (4, 6)).float(), torch.tensor([0, 2, 5, 6])
    got = soft_topk(scores, k, hard=True)
    for row, count in enumerate(k.tolist()):
        expected = torch.zeros(6).scatter(-1, scores[row].topk(6).indices[:count], 1.0)
        assert torch.equal(got[row], expected)


@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
@pytest.mark.parametrize("solver", SOLVERS)
def test_hard_has_the_gradient_of_soft(operator, solver):
    scores = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(operator(scores, 3))
    grads = [
        torch.autograd.grad(
            (operator(scores, 3, epsilon=3.0, hard=hard, solver=solver) * weight).sum(), scores
        )[0]
        for hard in (True, False)
    ]
    assert torch.equal(*grads) and grads[0].abs().max() > 0


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("epsilon", [5.0, 0.5])
@pytest.mark.parametrize("solver", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.filterwarnings("ignore:the transport problem is not solved")
def test_sinkhorn_is_algorithm_1_step_by_step(steps, epsilon, solver):
    scores = torch.randn(6, dtype=torch.float64)
    options = {"epsilon": epsilon, "solver": solver, "max_iter": steps}
    cost, masses = torch.from_numpy(cost_of(scores, [1, 0])), torch.tensor([2.0, 4.0])
    expected = algorithm_1(cost, torch.ones(6), masses, epsilon, steps)
    torch.testing.assert_close(soft_topk(scores, 2, **options), expected[:, 0], atol=1e-12, rtol=0)
    cost, masses = torch.from_numpy(cost_of(scores, [2, 1, 0])), torch.tensor([1.0, 1.0, 4.0])
    expected = algorithm_1(cost, torch.ones(6), masses, epsilon, steps)
    torch.testing.assert_close(sorted_soft_topk(scores, 2, **options), expected[:, :2], atol=1e-12, rtol=0)
    cost = torch.rand(6, 3, dtype=torch.float64)
    expected = algorithm_1(cost, torch.ones(6), masses, epsilon, steps)
    options = {"solver": solver, "max_iter": steps}
    got = solve_transport(cost, torch.ones(6), masses, epsilon, **options)
    torch.testing.assert_close(got.plan, expected, atol=1e-12, rtol=0)
    assert got.iterations == steps


@pytest.mark.parametrize(
    "operator, anchors, masses", [(soft_topk, [1, 0], [4, 36]), (sorted_soft_topk, [2, 1, 0], [1, 1, 38])]
)
def test_two_hundred_steps_are_the_default_and_far_from_the_solution(operator, anchors, masses):
    scores = torch.linspace(-1.5, 1.5, 40, dtype=torch.float64)
    k = int(sum(masses[:-1]))
    with pytest.warns(RuntimeWarning, match="after 200 steps"):
        got = operator(scores, k, epsilon=0.02, solver="sinkhorn")
    plan = algorithm_1(
        torch.from_numpy(cost_of(scores, anchors)), torch.ones(40), torch.tensor(masses), 0.02, 200
    )
    plan = plan[:, :-1].squeeze(-1)
    torch.testing.assert_close(got, plan, atol=1e-11, rtol=0)
    assert (got - operator(scores, k, epsilon=0.02)).abs().max() > 5e-3
    torch.testing.assert_close(got.sum(), torch.tensor(float(k)).double(), atol=1e-11, rtol=0)


# Every way into a solver that stops too early.
TOO_EARLY = {
    "soft_topk": lambda x: soft_topk(x, 5, epsilon=0.3, max_iter=1),
    "log_soft_topk": lambda x: log_soft_topk(x, 5, epsilon=0.3, max_iter=1),
    "sorted_soft_topk": lambda x: sorted_soft_topk(x, 5, epsilon=0.3, max_iter=1),
    "sinkhorn": lambda x: soft_topk(x, 5, epsilon=0.5, solver="sinkhorn", max_iter=1),
    "sinkhorn_log": lambda x: soft_topk(x, 5, epsilon=0.01, solver="sinkhorn_log"),
    "sorted sinkhorn_log": lambda x: sorted_soft_topk(x, 5, epsilon=0.01, solver="sinkhorn_log"),
    "transport": lambda x: solve_transport(
        x.view(10, 5), torch.ones(10), torch.full((5,), 2.0), 0.1, max_iter=1
    ),
    "transport sinkhorn": lambda x: solve_transport(
        x.view(10, 5), torch.ones(10), torch.full((5,), 2.0), 0.1, max_iter=1, solver="sinkhorn_log"
    ),
}


@pytest.mark.parametrize("name", TOO_EARLY)
def test_a_solver_that_stopped_too_early_says_so_where_it_was_called(name):
    scores = torch.randn(50, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"not solved: after \d+ steps a marginal is off by \d") as caught:
        TOO_EARLY[name](scores)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    lines, first = inspect.getsourcelines(TOO_EARLY[name])
    assert first <= caught[0].lineno < first + len(lines)


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_says_so_once_per_place_and_order_of_the_residual(solver):
    """Not again where the residual is a little different at every call, but where it is ten times as large."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        scores = torch.linspace(-2, 2, 50).double()
        for epsilon in (1.0, 1.0001, 0.9999, 1000.0, 1000.1):
            soft_topk(scores, 5, epsilon=epsilon, solver=solver, max_iter=1)
        assert len(caught) == 2
        soft_topk(scores, 5, epsilon=1.0, solver=solver, max_iter=1)
        assert len(caught) == 3


@pytest.mark.parametrize("many", [2, 5000])
def test_the_error_of_a_problem_is_relative_to_its_own_k(many):
    scores = torch.randn(2, 10_000)
    alone = soft_topk(scores[0], 1, epsilon=1.0)
    with pytest.warns(RuntimeWarning, match="not solved") as caught:
        weights = soft_topk(scores, torch.tensor([1, many]), epsilon=1.0, max_iter=1)
    error = float(weights[0].sum() - 1)
    assert abs(error) > 0.1 and float((weights[0] - alone).abs().max()) > 0
    assert float(str(caught[0].message).split()[-1]) == pytest.approx(abs(error), rel=0.1)


def paper_gradient(plan, rows, cols, grad):
    """Theorem 3 with the marginals for the sums of the plan: the bordered system, as it stands."""
    n = len(plan)
    border = torch.cat(
        [
            torch.cat([rows.diag(), plan[:, :-1]], 1),
            torch.cat([plan[:, :-1].T, cols[:-1].diag()], 1),
        ]
    )
    inner = plan * grad
    both = torch.linalg.solve(border, torch.cat([inner.sum(1), inner.sum(0)[:-1]]))
    return plan * (grad - both[:n, None] - torch.nn.functional.pad(both[n:], (0, 1)))


@pytest.mark.parametrize("solver", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("steps", [1, 5, 200])
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.filterwarnings("ignore:the transport problem is not solved")
def test_sinkhorn_has_the_gradient_of_algorithm_4_also_where_it_has_not_converged(solver, steps, m):
    cost, grad = torch.rand(2, 12, m, dtype=torch.float64)
    rows, cols = torch.ones(12).double(), torch.rand(m).double().softmax(0) * 12
    cost.requires_grad_()
    got = solve_transport(cost, rows, cols, 0.05, solver=solver, max_iter=steps)
    want = -paper_gradient(got.plan.detach(), rows, cols, grad) / 0.05
    torch.testing.assert_close(torch.autograd.grad(got.plan, cost, grad)[0], want)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_marginals_in_float32_are_solved_for():
    for n, m in ((7, 3), (50, 4), (1000, 6)):
        rows, cols = torch.randn(n).softmax(0), torch.randn(m).softmax(0)
        got = solve_transport(torch.rand(n, m), rows, cols, 0.1)
        assert bool(got.converged) and int(got.iterations) < 30
        torch.testing.assert_close(got.plan.sum(0), cols, rtol=2e-5, atol=0)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
def test_nobody_complains_of_a_solution(operator):
    """The first number of steps that gives the solution gives no warning."""
    scores = torch.randn(50, dtype=torch.float64)
    exact = operator(scores, 5, epsilon=0.3)
    for steps in range(1, 20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = (operator(scores, 5, epsilon=0.3, max_iter=steps) - exact).abs().max()
        if error < 1e-14:
            operator(scores, 5, epsilon=0.3, max_iter=steps)
            return
    pytest.fail("not solved in 20 steps")


def test_a_tolerance_that_is_met_is_not_complained_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        scores = torch.randn(50, dtype=torch.float64)
        loose = sorted_soft_topk(scores, 5, epsilon=0.3, tol=1e-2)
        got = soft_topk(scores, 5, epsilon=1.0, solver="sinkhorn_log", tol=1e-2, max_iter=5000)
    assert 1e-9 < (loose - sorted_soft_topk(scores, 5, epsilon=0.3)).abs().max() < 1e-1
    assert 1e-9 < (got - soft_topk(scores, 5, epsilon=1.0)).abs().max() < 1e-1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_iter, tol", [(1, None), (None, None), (2000, 1e-11)])
@pytest.mark.filterwarnings("ignore:the transport problem is not solved")
def test_transport_is_honest(solver, max_iter, tol):
    cost = torch.rand(4, 9, 3, dtype=torch.float64)
    rows, cols = torch.rand(4, 9).double() + 0.1, torch.rand(4, 3).double() + 0.1
    cols = cols * rows.sum(-1, keepdim=True) / cols.sum(-1, keepdim=True)
    got = solve_transport(cost, rows, cols, 0.05, solver=solver, max_iter=max_iter, tol=tol)
    by_row, by_col = (got.plan.sum(-1) - rows).abs() / rows, (got.plan.sum(-2) - cols).abs() / cols
    residual = torch.maximum(by_row.amax(-1), by_col.amax(-1))
    torch.testing.assert_close(got.residual, residual, atol=1e-14, rtol=1e-6)
    accepted = tol or (1e-9 if solver == "newton" else 1e-3)
    assert torch.equal(got.converged, got.residual <= accepted)
    assert got.converged.all() == (max_iter != 1)
    assert got.iterations >= 1


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("total", [1e-12, 1.0, 1e12])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_transport_of_probabilities_that_are_small(share, total):
    """The tolerance is relative to a marginal, whatever its size: scaled marginals have the scaled plan."""
    cost = torch.rand(50, 3, dtype=torch.float64)
    rows, cols = torch.full((50,), 0.02).double(), torch.tensor([share, 1.0, 2.0]).double()
    cols = cols / cols.sum()
    rows = rows / rows.sum()
    got = solve_transport(cost, rows * total, cols * total, 0.1)
    assert got.converged
    expected = solve_transport(cost, rows / cols.min(), cols / cols.min(), 0.1).plan * cols.min() * total
    torch.testing.assert_close(got.plan, expected, atol=0, rtol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_empty_rows_and_columns_of_transport(solver):
    cost = torch.rand(5, 4, dtype=torch.float64)
    rows, cols = torch.tensor([1.0, 0, 2, 1, 1]).double(), torch.tensor([0.0, 2, 2, 1]).double()
    got = solve_transport(cost, rows, cols, 1.0, solver=solver)
    assert got.plan[1].eq(0).all() and got.plan[:, 0].eq(0).all() and got.converged
    alone = solve_transport(cost[[0, 2, 3, 4], 1:], rows[[0, 2, 3, 4]], cols[1:], 1.0, solver=solver).plan
    torch.testing.assert_close(got.plan[[0, 2, 3, 4]][:, 1:], alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
def test_plain_sinkhorn_that_underflows_is_an_error(operator):
    scores = torch.randn(20)
    with pytest.raises(ValueError, match=r'exp\(-cost / epsilon\) underflows: use solver="sinkhorn_log"'):
        operator(scores, 3, epsilon=1e-4, solver="sinkhorn")
    with pytest.raises(ValueError, match="underflows"):
        solve_transport(torch.rand(5, 2) + 1, torch.ones(5), torch.tensor([2.0, 3.0]), 1e-3, solver="sinkhorn")


def test_log_is_minus_infinity_where_nothing_is_selected():
    logs = log_soft_topk(torch.tensor([[1.0, -math.inf, 0.0]]), 0)
    assert (logs == -math.inf).all()


@pytest.mark.filterwarnings("ignore:the transport problem is not solved")
def test_a_module_passes_all_options_on():
    scores = torch.randn(30)
    options = {"epsilon": 0.5, "solver": "sinkhorn_log", "max_iter": 3, "hard": False}
    assert torch.equal(SoftTopK(4, **options)(scores), soft_topk(scores, 4, **options))
