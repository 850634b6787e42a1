"""What must hold for all operators alike: sizes, symmetries, masks, batches."""

import math

import pytest
import torch
from score_kinds import make_scores

from fairseq_softtopk.ops import log_soft_topk, soft_topk, solve_transport, sorted_soft_topk

SOLVERS = ["newton", "sinkhorn", "sinkhorn_log"]
EPSILONS = [10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


def variants() -> list:
    """Every operator with every option that leads through other code."""
    found = [pytest.param(log_soft_topk, {}, id="log")]
    for operator in (soft_topk, sorted_soft_topk):
        for solver in SOLVERS:
            for hard in (False, True):
                options = {"solver": solver, "hard": hard}
                found.append(pytest.param(operator, options, id=f"{operator.__name__}-{solver}-{hard}"))
    return found


@pytest.mark.parametrize("kind", ["normal", "lprobs"])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_marginals_of_many_scores(kind, epsilon):
    scores = make_scores(kind, 1, 200_000)
    # A float32 sum of weights is exact to their own rounding; the solver stops within 4 units of t.
    single, double = soft_topk(scores, 5, epsilon=epsilon), soft_topk(scores.double(), 5, epsilon=epsilon)
    assert abs(float(single.double().sum()) - 5) < 5 * 16 * torch.finfo(torch.float32).eps
    assert abs(float(double.sum()) - 5) < 1e-10
    ranks = sorted_soft_topk(scores, 5, epsilon=epsilon)
    torch.testing.assert_close(ranks.double().sum(1), torch.ones(1, 5).double(), atol=2e-7 * 5, rtol=0)
    assert float(ranks.sum(2).max()) <= 1 + 1e-6 and float(single.max()) <= 1


@pytest.mark.parametrize("operator, options", variants())
def test_a_masked_element_changes_nothing(operator, options):
    scores = torch.randn(2, 6, dtype=torch.float64)
    for largest, never in ((True, -math.inf), (False, math.inf)):
        hole = torch.full((2, 1), never, dtype=torch.float64)
        padded = torch.cat([hole, scores[:, :3], hole, scores[:, 3:]], dim=1).requires_grad_()
        alone = scores.clone().requires_grad_()
        alive = [1, 2, 3, 5, 6, 7]
        weights = operator(padded, 2, epsilon=2.0, largest=largest, **options)
        expected = operator(alone, 2, epsilon=2.0, largest=largest, **options)
        torch.testing.assert_close(weights[:, alive], expected, atol=1e-9, rtol=0)
        nothing = -math.inf if operator is log_soft_topk else 0.0
        assert (weights[:, [0, 4]] == nothing).all()
        coefficients = torch.randn_like(expected)
        (weights[:, alive] * coefficients).sum().backward()
        (expected * coefficients).sum().backward()
        torch.testing.assert_close(padded.grad[:, alive], alone.grad, atol=1e-9, rtol=0)
        assert padded.grad[:, [0, 4]].eq(0).all()


@pytest.mark.parametrize("operator, options", variants())
def test_order_shift_batch_and_dim(operator, options):
    """At epsilon = 2 two hundred Sinkhorn steps are a solution, so that they too are invariant to a shift."""
    scores, order = torch.randn(3, 4, 7, dtype=torch.float64), torch.randperm(7)

    def solve(x, **more):
        return operator(x, 3, epsilon=2.0, **options, **more)

    weights = solve(scores)
    torch.testing.assert_close(solve(scores[..., order]), weights[:, :, order], atol=1e-9, rtol=0)
    # the costs of Sinkhorn grow with the square of the scores, and with them what its rounding is worth
    torch.testing.assert_close(solve(scores + 3), weights, atol=1e-8, rtol=0)
    loop = torch.stack([torch.stack([solve(row) for row in rows]) for rows in scores])
    torch.testing.assert_close(loop, weights, atol=1e-9, rtol=0)
    by_dim = solve(scores.transpose(0, 2), dim=0)
    by_dim = by_dim.transpose(0, 1) if operator is sorted_soft_topk else by_dim.transpose(0, 2)
    torch.testing.assert_close(by_dim, weights, atol=1e-9, rtol=0)


@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk, sorted_soft_topk])
def test_layouts(operator):
    """Strided, expanded and transposed scores, whose memory is left alone."""
    base = torch.randn(8, 6, dtype=torch.float64)
    for scores in (base[::2, ::2], base.T, base[:1].expand(5, 6), base[:, :1].expand(8, 6), base.flip(0)):
        before = scores.clone()
        expected = operator(scores.contiguous(), 2)
        torch.testing.assert_close(operator(scores, 2), expected, atol=1e-12, rtol=0)
        assert torch.equal(scores, before)
    scores = base[:1].clone().requires_grad_()
    weight = torch.randn_like(operator(base[:3], 2))
    (operator(scores.expand(3, 6), 2).exp() * weight).sum().backward()
    alone = base[:1].repeat(3, 1).requires_grad_()
    (operator(alone, 2).exp() * weight).sum().backward()
    torch.testing.assert_close(scores.grad, alone.grad.sum(0, keepdim=True), atol=1e-10, rtol=0)


@pytest.mark.parametrize("n, ties, above, k", [(6, 3, 1, 2), (9, 5, 2, 4), (5, 5, 0, 3)])
@pytest.mark.parametrize("epsilon", [1.0, 1e-2, 1e-5])
def test_ties_share_equally(n, ties, above, k, epsilon):
    scores = torch.cat([torch.ones(above) * 5, torch.zeros(ties), -torch.ones(n - ties - above) * 5]).double()
    weights, ranks = soft_topk(scores, k, epsilon=epsilon), sorted_soft_topk(scores, k, epsilon=epsilon)
    for tied in (weights[above : above + ties], ranks[above : above + ties]):
        torch.testing.assert_close(tied, tied[:1].expand_as(tied), atol=1e-12, rtol=0)
    if epsilon < 1:
        torch.testing.assert_close(weights[above], torch.tensor((k - above) / ties).double(), atol=1e-6, rtol=0)


def test_limits_of_every_operator():
    scores = torch.randn(3, 9, dtype=torch.float64)
    flat = torch.full((3, 9), 4 / 9, dtype=torch.float64)
    torch.testing.assert_close(soft_topk(scores, 4, epsilon=1e9), flat, atol=1e-8, rtol=0)
    torch.testing.assert_close(log_soft_topk(scores, 4, epsilon=1e9), flat.log(), atol=1e-8, rtol=0)
    ranks = sorted_soft_topk(scores, 4, epsilon=1e9)
    torch.testing.assert_close(ranks, torch.full_like(ranks, 1 / 9), atol=1e-8, rtol=0)
    plan = solve_transport(torch.rand(5, 3).double(), torch.ones(5), torch.tensor([1.0, 2, 2]), 1e9).plan
    expected = (torch.ones(5, 1) * torch.tensor([0.2, 0.4, 0.4])).double()
    torch.testing.assert_close(plan, expected, atol=1e-8, rtol=0)
