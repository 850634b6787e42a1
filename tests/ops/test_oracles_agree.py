"""The operators against other people's solvers, over the whole range of epsilon."""

import math

import numpy as np
import pytest
import torch
from oracles import bisected_indicator, cost_of, linear_program, pot_plan, precise_indicator

from fairseq_softtopk.ops import soft_topk, solve_transport, sorted_soft_topk

# POT is asked where Sinkhorn's local rate says that it needs fewer steps x rows; below epsilon = 0.1 its way
# to the neighbourhood where that rate holds is longer than any patience.
PATIENCE = 2_000_000

GRID = sorted({(n, k) for n in (2, 5, 100, 5000) for k in (1, 3, n - 1) if k < n})
EPSILONS = [10.0, 1.0, 0.1, 1e-2, 1e-3]


def sinkhorn_steps(weights: torch.Tensor, k: int) -> float:
    """How many steps reduce the error to 1e-16; its factor is ``1 - sum A (1 - A) / (k (1 - k/n))``."""
    rate = 1 - float((weights * (1 - weights)).sum()) / (k * (1 - k / len(weights)))
    return 20 + math.log(1e-16) / math.log(max(rate, 1e-16)) if rate < 1 else math.inf


@pytest.mark.parametrize("n, k", GRID)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_indicator_to_twelve_digits(n, k, epsilon):
    scores = torch.rand(n, dtype=torch.float64) * 2 - 0.5
    expected = bisected_indicator(scores, k, epsilon)
    torch.testing.assert_close(soft_topk(scores, k, epsilon=epsilon), expected, atol=1e-12, rtol=0)
    if n <= 100:
        precise = torch.tensor(precise_indicator(scores.tolist(), k, epsilon), dtype=torch.float64)
        torch.testing.assert_close(expected, precise, atol=1e-15, rtol=0)
    steps = sinkhorn_steps(expected, k)
    if epsilon >= 0.1 and steps * n < PATIENCE:
        cost, masses = cost_of(scores, [1, 0]), np.array([k, n - k], dtype=float)
        by_pot = pot_plan(cost, np.ones(n), masses, epsilon, math.ceil(steps), 0.0)[:, 0]
        torch.testing.assert_close(by_pot, expected, atol=1e-12, rtol=0)


def test_sinkhorn_can_be_asked_at_large_epsilon():
    """So that the comparison with POT above is not empty."""
    for n, k in GRID:
        scores = torch.rand(n, dtype=torch.float64) * 2 - 0.5
        for epsilon in (10.0, 1.0):
            assert sinkhorn_steps(bisected_indicator(scores, k, epsilon), k) * n < PATIENCE


@pytest.mark.parametrize("n, k", [(2, 1), (5, 1), (5, 3), (5, 4), (100, 1), (100, 3), (1000, 3)])
@pytest.mark.parametrize("epsilon", [10.0, 1.0, 0.3])
def test_the_sorted_indicator_to_eleven_digits(n, k, epsilon):
    scores = torch.rand(n, dtype=torch.float64) * 2 - 0.5
    masses = np.array([1.0] * k + [n - k])
    expected = pot_plan(cost_of(scores, list(range(k, -1, -1))), np.ones(n), masses, epsilon, 2000, 0.0)
    got = sorted_soft_topk(scores, k, epsilon=epsilon, tol=1e-12)
    torch.testing.assert_close(got, expected[:, :k], atol=1e-11, rtol=0)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 4), (4, 1), (3, 2), (6, 6), (40, 3), (5, 20)])
@pytest.mark.parametrize("epsilon", [10.0, 1.0, 0.1])
def test_transport_of_any_cost_and_marginals(n, m, epsilon):
    cost = torch.rand(n, m, dtype=torch.float64)
    rows, cols = torch.rand(n, dtype=torch.float64) + 0.1, torch.rand(m, dtype=torch.float64) + 0.1
    cols = cols * rows.sum() / cols.sum()
    expected = pot_plan(cost.numpy(), rows.numpy(), cols.numpy(), epsilon, 5000, 1e-15)
    got = solve_transport(cost, rows, cols, epsilon, tol=1e-12)
    torch.testing.assert_close(got.plan, expected, atol=1e-11, rtol=0)
    potentials = (got.row_potentials.unsqueeze(-1) + got.col_potentials - cost) / epsilon
    torch.testing.assert_close(rows.unsqueeze(-1) * potentials.exp(), got.plan, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n, k", [(4, 1), (6, 3), (9, 8)])
def test_the_limit_is_the_linear_program(n, k):
    """At epsilon = 1e-6 what is left of the entropy is exp(-gap / epsilon), with gaps of 0.01 and more."""
    scores = (torch.randperm(n).double() + torch.rand(n).double() * 0.5) / n
    rows = np.ones(n)
    exact = linear_program(cost_of(scores, [1, 0]), rows, np.array([k, n - k], dtype=float))[:, 0]
    torch.testing.assert_close(soft_topk(scores, k, epsilon=1e-6), exact, atol=1e-9, rtol=0)
    exact = linear_program(cost_of(scores, list(range(k, -1, -1))), rows, np.array([1.0] * k + [n - k]))
    torch.testing.assert_close(sorted_soft_topk(scores, k, epsilon=1e-6), exact[:, :k], atol=1e-9, rtol=0)


@pytest.mark.parametrize("n, m", [(6, 2), (7, 3), (5, 5)])
def test_the_limit_of_transport_is_the_linear_program(n, m):
    cost = torch.rand(n, m, dtype=torch.float64)
    rows, cols = torch.rand(n, dtype=torch.float64) + 0.1, torch.rand(m, dtype=torch.float64) + 0.1
    cols = cols * rows.sum() / cols.sum()
    exact = linear_program(cost.numpy(), rows.numpy(), cols.numpy())
    got = solve_transport(cost, rows, cols, 1e-6)
    assert got.converged
    torch.testing.assert_close(got.plan, exact, atol=1e-8, rtol=0)


# What the authors' notebook prints (google-research, soft_topk/demo.ipynb): the three smallest of 5 2 3 4 1 6,
# epsilon 0.05 of the largest cost, 100 Sinkhorn steps in float32; and the gradient of A_1 + A_2 + A_3.
DEMO = torch.tensor([5.0, 2.0, 3.0, 4.0, 1.0, 6.0], dtype=torch.float64)
DEMO_WEIGHTS = [0.15886909, 0.84113085, 0.63542354, 0.36457655, 0.9414631, 0.05853688]
DEMO_GRADIENT = [0.10541585, -0.04306151, -0.07465184, -0.07465144, 0.04347444, 0.04347456]


@pytest.mark.parametrize("solver", ["newton", "sinkhorn", "sinkhorn_log"])
def test_the_example_of_the_paper(solver):
    scores = DEMO.clone().requires_grad_()
    options = {"epsilon": 0.05, "largest": False, "cost_scale": "max", "solver": solver}
    weights = soft_topk(scores, 3, **options)
    weights[1:4].sum().backward()
    # Printed in float32, whose rounding 100 steps multiply; the symmetric pairs differ by 1e-7 and 4e-7.
    torch.testing.assert_close(weights.detach(), torch.tensor(DEMO_WEIGHTS).double(), atol=5e-7, rtol=0)
    torch.testing.assert_close(scores.grad, torch.tensor(DEMO_GRADIENT).double(), atol=2e-6, rtol=0)
    cost = cost_of(DEMO, [0, 1])
    by_pot = pot_plan(cost / cost.max(), np.ones(6), np.array([3.0, 3.0]), 0.05, 1000, 0.0)[:, 0]
    torch.testing.assert_close(weights.detach(), by_pot, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n, k", [(6, 3), (100, 5), (1000, 5)])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 1e-2, 1e-3])
def test_the_sorted_plan_carries_its_own_certificate(n, k, epsilon):
    """A plan with the right marginals is the optimum if and only if ln P + C / epsilon = alpha_i + beta_j.

    So the differences between two ranks must be the same for every element, whoever computed them.
    """
    scores = torch.randn(n, dtype=torch.float64)
    weights = sorted_soft_topk(scores, k, epsilon=epsilon, tol=1e-12)
    torch.testing.assert_close(weights.sum(0), torch.ones(k).double(), atol=1e-11, rtol=0)
    exponents = weights.log() + torch.from_numpy(cost_of(scores, list(range(k, 0, -1)))) / epsilon
    compared = 0
    for above, below in zip(range(k - 1), range(1, k), strict=True):
        seen = (weights[:, [above, below]] > 1e-200).all(1)
        differences = (exponents[:, above] - exponents[:, below])[seen]
        compared += len(differences)
        # C / epsilon is about 25 / epsilon, of which 2e-16 is rounding, a few times over.
        assert differences.max() - differences.min() < 25 / epsilon * 2e-15
    assert compared > k
