"""Derivatives of every argument: by finite differences, by the paper's algorithms, through the solver."""

import math

import pytest
import torch
from oracles import algorithm_4
from torch.autograd import gradcheck, gradgradcheck

from fairseq_softtopk.ops import log_soft_topk, soft_topk, solve_transport, sorted_soft_topk

OPERATORS = [soft_topk, log_soft_topk, sorted_soft_topk]
# Two problems of 6 elements; entries [0, 2] and [1, 0] are masked where a test masks.
MASK = torch.tensor([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    return scores, torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)


def check(function, *arguments):
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


def masked(operator, scores, *arguments, **options):
    """The operator on masked scores; ln A of masked entries, -inf, is left out of what is differentiated."""
    weights = operator(scores.masked_fill(MASK, -math.inf), *arguments, **options)
    return weights.masked_fill(MASK, 0.0) if operator is log_soft_topk else weights


@pytest.mark.parametrize("operator", OPERATORS)
def test_of_masked_scores(operator):
    scores, _ = inputs()
    check(lambda x: masked(operator, x, 3, epsilon=0.3), scores)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("largest", [True, False])
def test_of_scores_and_one_epsilon_per_problem(operator, largest):
    check(lambda x, e: operator(x, 3, epsilon=e, largest=largest), *inputs())


@pytest.mark.parametrize("operator", OPERATORS)
def test_of_one_epsilon_for_all(operator):
    scores, epsilon = inputs()
    check(lambda x, e: operator(x, 3, epsilon=e.mean()), scores, epsilon)


@pytest.mark.parametrize("operator", OPERATORS)
def test_of_masked_scores_and_epsilon(operator):
    check(lambda x, e: masked(operator, x, 3, epsilon=e), *inputs())


@pytest.mark.parametrize("operator", OPERATORS)
def test_of_epsilon_where_the_mask_leaves_k_in_one_problem(operator):
    check(lambda x, e: masked(operator, x, 5, epsilon=e), *inputs())


@pytest.mark.parametrize("operator", OPERATORS)
def test_of_epsilon_where_all_are_selected(operator):
    check(lambda x, e: operator(x, 6, epsilon=e), *inputs())


@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk])
@pytest.mark.parametrize("counts", [[2, 4], [1, 6], [0, 3]])
def test_of_one_k_per_problem(operator, counts):
    k = torch.tensor(counts)

    def finite(x, e):  # ln 0 where k = 0
        return operator(x, k, epsilon=e).clamp(min=-1e6)

    check(finite, *inputs())


@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk])
def test_of_one_k_per_problem_with_a_mask(operator):
    check(lambda x, e: masked(operator, x, torch.tensor([2, 4]), epsilon=e), *inputs())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("scale", ["max", "batch_max"])
def test_the_scale_of_the_cost_is_a_constant(operator, scale):
    """The gradient is that of the un-scaled operator at epsilon times the largest cost."""
    scores, _ = inputs()
    last = 3.0 if operator is sorted_soft_topk else 1.0
    costs = torch.maximum(scores.detach().square(), (scores.detach() - last).square())
    largest = costs.amax() if scale == "batch_max" else costs.amax(-1)
    scaled = operator(scores, 3, epsilon=0.05, cost_scale=scale)
    plain = operator(scores, 3, epsilon=0.05 * largest)
    weight = torch.randn_like(plain)
    (got,) = torch.autograd.grad((scaled * weight).sum(), scores)
    (expected,) = torch.autograd.grad((plain * weight).sum(), scores)
    torch.testing.assert_close(scaled, plain, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("n, k", [(300, 2), (1500, 3)])
def test_of_epsilon_where_only_what_is_near_the_ranks_is_solved_for(n, k):
    scores = torch.randn(n, dtype=torch.float64, requires_grad=True)
    epsilon = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n, k, dtype=torch.float64)

    def loss(e):
        return (sorted_soft_topk(scores, k, epsilon=e) * weight).sum()

    assert gradcheck(loss, epsilon)
    assert gradgradcheck(loss, epsilon)


@pytest.mark.parametrize("solver", ["newton", "sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_of_everything_that_transport_takes(solver, batch):
    cost = torch.rand(*batch, 5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.rand(*batch, 5, dtype=torch.float64).add(0.2).requires_grad_()
    cols = torch.rand(*batch, 3, dtype=torch.float64).add(0.2).requires_grad_()
    epsilon = torch.rand(batch, dtype=torch.float64).add(0.3).requires_grad_()

    def plan(cost, rows, cols, epsilon):
        rows = rows / rows.sum(-1, keepdim=True)
        cols = cols / cols.sum(-1, keepdim=True)
        options = {} if solver == "newton" else {"max_iter": 3000, "tol": 1e-13}
        return solve_transport(cost, rows, cols, epsilon, solver=solver, **options).plan

    check(plan, cost, rows, cols, epsilon)


@pytest.mark.parametrize("solver", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
def test_through_a_sinkhorn_that_has_converged(solver, operator):
    options = {"solver": solver, "max_iter": 20_000, "tol": 1e-13}
    scores, epsilon = inputs()
    assert gradcheck(lambda x, e: operator(x, 3, epsilon=3 * e, **options), (scores, epsilon))
    assert gradcheck(lambda x: masked(operator, x, 3, epsilon=1.0, **options), scores)


@pytest.mark.parametrize("n, k, epsilon", [(5, 2, 0.3), (4, 3, 1.0), (7, 1, 0.1)])
@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
def test_jacobian_is_the_one_of_the_papers_algorithms(n, k, epsilon, operator):
    """Algorithm 3 for the indicator, 4 for the ranks; their plan has mass 1; dC_ij = 2 (x_i - b_j) dx_i."""
    scores = torch.randn(n, dtype=torch.float64)
    ranks = k if operator is sorted_soft_topk else 1
    anchors = torch.arange(ranks, -1, -1, dtype=torch.float64)
    columns = operator(scores, k, epsilon=epsilon).reshape(n, ranks)
    plan = torch.cat([columns, 1 - columns.sum(1, keepdim=True)], dim=1) / n
    by_cost = algorithm_4(plan, epsilon)
    expected = n * (by_cost * 2 * (scores[:, None] - anchors)).sum(-1)[:, :ranks]
    got = torch.autograd.functional.jacobian(lambda x: operator(x, k, epsilon=epsilon), scores)
    # Newton's method stops at a residual of 1e-9, which K^-1 and 1 / epsilon magnify
    torch.testing.assert_close(got.reshape(n, ranks, n), expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
def test_implicit_unrolled_and_finite_differences_agree(operator):
    n, k, epsilon = 6, 2, 0.4
    scores = torch.rand(n, dtype=torch.float64, requires_grad=True)
    ranks = k if operator is sorted_soft_topk else 1
    anchors = torch.arange(ranks, -1, -1, dtype=torch.float64)
    masses = torch.tensor([1.0] * k + [n - k] if ranks > 1 else [k, n - k], dtype=torch.float64)
    weight = torch.randn(n, ranks, dtype=torch.float64)

    def implicit(x):
        return (operator(x, k, epsilon=epsilon).reshape(n, ranks) * weight).sum()

    def unrolled(x):
        logits = -((x[:, None] - anchors) ** 2) / epsilon
        zeta = torch.zeros_like(masses)
        for _ in range(2000):
            rows = -(logits + zeta).logsumexp(1)
            zeta = masses.log() - (logits + rows[:, None]).logsumexp(0)
        return ((logits + rows[:, None] + zeta).exp()[:, :ranks] * weight).sum()

    (got,) = torch.autograd.grad(implicit(scores), scores)
    (through,) = torch.autograd.grad(unrolled(scores), scores)
    torch.testing.assert_close(got, through, atol=1e-9, rtol=0)
    with torch.no_grad():
        h = 1e-5  # the errors: h^2 / 6 of the third derivative, 1 / epsilon^3, and rounding / h
        steps = torch.eye(n, dtype=torch.float64) * h
        differences = torch.stack([(implicit(scores + d) - implicit(scores - d)) / (2 * h) for d in steps])
    torch.testing.assert_close(got, differences, atol=1e-7, rtol=0)
