"""Every argument out of range is a ValueError that quotes it."""

import math

import pytest
import torch

from fairseq_softtopk.ops import log_soft_topk, soft_topk, solve_transport, sorted_soft_topk

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"solver": "simplex"}, "solver must be one of newton, sinkhorn, sinkhorn_log, got 'simplex'"),
        ({"epsilon": 0.0}, "epsilon must be positive and finite, got 0.0"),
        ({"epsilon": -1.0}, "epsilon must be positive and finite, got -1.0"),
        ({"epsilon": NAN}, "epsilon must be positive and finite, got nan"),
        ({"epsilon": torch.tensor(INF)}, "epsilon must be positive and finite, got inf"),
        ({"row_marginals": torch.tensor([-1.0, 3, 1, 1])}, r"row marginals must not be negative, got -1\.0"),
        ({"col_marginals": torch.tensor([5.0, -1.0])}, r"column marginals must not be negative, got -1\.0"),
        ({"row_marginals": torch.tensor([NAN, 1, 1, 1])}, "row marginals must .* got nan"),
        ({"col_marginals": torch.tensor([1.0, 2.0])}, "same sum, got 4.0 .* 3.0"),
        ({"cost": torch.full((4, 2), NAN)}, "cost must be finite"),
        ({"cost": torch.full((4, 2), INF)}, "cost must be finite"),
        ({"cost": torch.ones(4, 2).long()}, "cost must be floating point, got torch.int64"),
        ({"cost": torch.ones(4)}, r"cost must be \(..., n, m\).* got \(4,\), \(4,\), \(2,\)"),
        ({"row_marginals": torch.ones(5)}, r"cost must be .* got \(4, 2\), \(5,\), \(2,\)"),
        ({"row_marginals": torch.ones(3, 4), "cost": torch.ones(2, 4, 2)}, r"\(2, 4, 2\), \(3, 4\), \(2,\)"),
        ({"epsilon": torch.ones(3), "cost": torch.ones(2, 4, 2)}, r"epsilon .* got \(3,\)"),
        ({"max_iter": -1}, "max_iter must be .* got -1"),
        ({"max_iter": 0}, "max_iter must be .* got 0"),
        ({"tol": -1.0}, "tol must be .* got -1.0"),
        ({"tol": NAN}, "tol must be .* got nan"),
    ],
)
@pytest.mark.parametrize("solver", ["newton", "sinkhorn", "sinkhorn_log"])
def test_transport(changed, message, solver):
    given = {
        "cost": torch.rand(4, 2),
        "row_marginals": torch.ones(4),
        "col_marginals": torch.tensor([1.0, 3.0]),
        "epsilon": 0.5,
        "solver": solver,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        solve_transport(**given)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"solver": "simplex"}, "solver must be one of newton, sinkhorn, sinkhorn_log, got 'simplex'"),
        ({"k": NAN}, "k must be an integer, got nan"),
        ({"k": INF}, "k must be an integer, got inf"),
        ({"k": 1.5}, "k must be an integer, got 1.5"),
        ({"k": None}, "k must be an integer, got None"),
        ({"k": "2"}, "k must be an integer, got 2"),
        ({"epsilon": torch.tensor(NAN)}, "epsilon must be positive and finite, got nan"),
        ({"epsilon": torch.tensor([0.1, 0.0])}, "epsilon must be positive and finite, got 0.0"),
        ({"epsilon": torch.tensor(1j)}, "epsilon .* got .*complex"),
        ({"max_iter": 0}, "max_iter must be .* got 0"),
        ({"max_iter": -1}, "max_iter must be .* got -1"),
        ({"tol": -1.0}, "tol must be .* got -1.0"),
        ({"tol": NAN}, "tol must be .* got nan"),
        ({"k": 0, "epsilon": torch.tensor(NAN)}, "epsilon must be positive and finite, got nan"),
        ({"k": 0, "scores": torch.full((2, 5), NAN)}, "scores contain NaN"),
    ],
)
@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk, log_soft_topk])
def test_operators(operator, changed, message):
    if operator is log_soft_topk and "solver" in changed:
        pytest.skip("log_soft_topk has one solver")
    given = {"scores": torch.randn(2, 5), "k": 2, **changed}
    with pytest.raises(ValueError, match=message):
        operator(given.pop("scores"), given.pop("k"), **given)


@pytest.mark.parametrize("solver", ["newton", "sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize(
    "k, message",
    [
        ([1, -1], r"k must lie in \[0, 5\], the number of scores, got -1"),
        ([6, 1], r"k must lie in \[0, 5\], the number of scores, got 6"),
        ([5, 1], "k = 5 elements to select, but the mask leaves only 4"),
    ],
)
def test_a_tensor_of_k(solver, k, message):
    scores = torch.randn(2, 5)
    scores[0, 3] = -INF
    with pytest.raises(ValueError, match=message):
        soft_topk(scores, torch.tensor(k), solver=solver)


@pytest.mark.parametrize("solver", ["newton", "sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
@pytest.mark.parametrize(
    "scores, message",
    [
        ([1.0, NAN, 0.0], "scores contain NaN"),
        ([1.0, INF, 0.0], "infinity"),
        ([-INF, 1.0, -INF], "k = 2 .* leaves only 1"),
    ],
)
def test_scores_in_every_solver(operator, solver, scores, message):
    with pytest.raises(ValueError, match=message):
        operator(torch.tensor(scores), 2, epsilon=2.0, solver=solver)


def test_sorted_takes_no_tensor_of_k():
    with pytest.raises(ValueError, match=r"k must be an int here, .* got a tensor: 2"):
        sorted_soft_topk(torch.randn(5), torch.tensor(2))


def test_a_k_that_no_empty_problem_can_have():
    with pytest.raises(ValueError, match=r"k must lie in \[0, 0\], the number of scores, got 1"):
        soft_topk(torch.zeros(2, 0), torch.tensor(1))
