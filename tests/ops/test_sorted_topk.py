import math

import pytest
import torch
from oracles import sorted_plan
from score_kinds import KINDS, make_scores
from torch.autograd import gradcheck, gradgradcheck

from fairseq_softtopk.ops import soft_topk, sorted_soft_topk

EPSILONS = [10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


@pytest.mark.parametrize("n, k", [(2, 1), (5, 1), (5, 3), (5, 4), (60, 3)])
@pytest.mark.parametrize("epsilon", [10.0, 1.0, 0.3])
@pytest.mark.parametrize("largest, scale", [(True, "none"), (False, "none"), (True, "max"), (False, "max")])
def test_equals_sinkhorn_run_to_convergence(n, k, epsilon, largest, scale):
    scores = torch.rand(n, dtype=torch.float64) * 2 - 0.5
    expected = sorted_plan(scores, k, epsilon, largest, scale)
    got = sorted_soft_topk(scores, k, epsilon=epsilon, largest=largest, cost_scale=scale)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("n", [6, 64, 1000, 20_000])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_marginals_hold_at_every_epsilon(n, epsilon, kind):
    scores = make_scores(kind, 4, n).double()
    weights = sorted_soft_topk(scores, 5, epsilon=epsilon)
    torch.testing.assert_close(weights.sum(1), torch.ones(4, 5).double(), atol=1e-8, rtol=0)
    assert weights.min() >= 0 and weights.sum(2).max() <= 1 + 1e-12


@pytest.mark.parametrize("k", [14, 32, 40])
@pytest.mark.parametrize("epsilon", [1e4, 10.0, 1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("kind", ["normal", "constant", "ties"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_many_ranks_of_scores_that_hardly_differ(k, epsilon, kind):
    scores = make_scores(kind, 2, 100).double()
    weights = sorted_soft_topk(scores, k, epsilon=epsilon)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, k).double(), atol=1e-8, rtol=0)
    if kind == "constant":
        torch.testing.assert_close(weights, torch.full_like(weights, 0.01), atol=1e-10, rtol=0)


def test_limit_is_the_permutation_matrix_of_topk():
    scores = torch.randn(3, 40)
    hard = torch.nn.functional.one_hot(scores.topk(6).indices, 40).transpose(1, 2).float()
    torch.testing.assert_close(sorted_soft_topk(scores, 6, epsilon=1e-6), hard)
    hard = torch.nn.functional.one_hot(scores.topk(6, largest=False).indices, 40).transpose(1, 2)
    torch.testing.assert_close(sorted_soft_topk(scores, 6, epsilon=1e-6, largest=False), hard.float())


def test_one_rank_is_the_unsorted_operator():
    scores = torch.randn(3, 15, dtype=torch.float64)
    torch.testing.assert_close(
        sorted_soft_topk(scores, 1, epsilon=0.4)[..., 0], soft_topk(scores, 1, epsilon=0.4), atol=1e-9, rtol=0
    )


def test_is_invariant_to_a_shift_and_equivariant_to_a_permutation():
    scores, order = torch.randn(2, 20, dtype=torch.float64), torch.randperm(20)
    weights = sorted_soft_topk(scores, 5, epsilon=0.3)
    torch.testing.assert_close(sorted_soft_topk(scores - 1000, 5, epsilon=0.3), weights, atol=1e-9, rtol=0)
    torch.testing.assert_close(sorted_soft_topk(scores[:, order], 5, epsilon=0.3), weights[:, order])


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 1e-4])
def test_a_masked_element_changes_nothing(epsilon):
    scores = torch.randn(8, dtype=torch.float64)
    padded = torch.cat([torch.tensor([-math.inf]).double(), scores]).requires_grad_()
    weights = sorted_soft_topk(padded, 3, epsilon=epsilon)
    (weights * torch.randn(9, 3)).sum().backward()
    torch.testing.assert_close(weights[1:], sorted_soft_topk(scores, 3, epsilon=epsilon), atol=1e-12, rtol=0)
    assert weights[0].eq(0).all() and padded.grad[0] == 0 and padded.grad.isfinite().all()


@pytest.mark.parametrize("masked", [0, 3])
def test_as_many_ranks_as_elements(masked):
    scores = torch.tensor([3.0, 1.0, 2.0] + [-math.inf] * masked, requires_grad=True)
    weights = sorted_soft_topk(scores, 3, epsilon=0.5)
    torch.testing.assert_close(weights.sum(0), torch.ones(3))
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0] * 3 + [0.0] * masked))
    (weights * torch.randn_like(weights)).sum().backward()
    assert scores.grad.isfinite().all() and scores.grad[:3].abs().min() > 0


@pytest.mark.parametrize("dim", [-2, -1, 0, 1])
def test_dim_is_moved_last(dim):
    scores = torch.randn(4, 5)
    expected = sorted_soft_topk(scores.movedim(dim, -1).contiguous(), 2)
    got = sorted_soft_topk(scores, 2, dim=dim)
    assert got.shape == (*scores.movedim(dim, -1).shape, 2)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_in_the_same_out(dtype):
    assert sorted_soft_topk(torch.randn(2, 10).to(dtype), 3).dtype == dtype


def test_no_rank_and_no_problem():
    assert sorted_soft_topk(torch.randn(3, 4), 0).shape == (3, 4, 0)
    assert sorted_soft_topk(torch.randn(0, 4), 2).shape == (0, 4, 2)


@pytest.mark.parametrize("n, k, epsilon", [(3, 1, 0.5), (6, 3, 0.3), (6, 6, 1.0), (20, 4, 0.1)])
def test_first_and_second_derivatives(n, k, epsilon):
    scores = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: sorted_soft_topk(x, k, epsilon=epsilon), scores, atol=1e-5)
    assert gradgradcheck(lambda x: sorted_soft_topk(x, k, epsilon=epsilon), scores, atol=1e-4)


def test_gradient_equals_the_one_through_a_long_unrolled_sinkhorn():
    """Independent of the implicit function theorem: autograd through 3000 plain log-domain steps."""
    n, k, epsilon = 7, 3, 0.5
    scores = torch.rand(n, dtype=torch.float64, requires_grad=True)
    target = torch.randn(n, k, dtype=torch.float64)

    log_kernel = -((scores[:, None] - torch.arange(k, -1, -1)) ** 2) / epsilon
    log_mass = torch.tensor([1.0] * k + [n - k], dtype=torch.float64).log()
    zeta = torch.zeros(k + 1, dtype=torch.float64)
    for _ in range(3000):
        rows = log_kernel + zeta
        zeta = zeta + log_mass - (rows - rows.logsumexp(1, keepdim=True)).logsumexp(0)
    unrolled = torch.softmax(log_kernel + zeta, dim=1)[:, :k]
    (expected,) = torch.autograd.grad((unrolled * target).sum(), scores)

    (got,) = torch.autograd.grad((sorted_soft_topk(scores, k, epsilon=epsilon) * target).sum(), scores)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("epsilon", [1e3, 0.1, 1e-5, 1e-30])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_nothing_but_numbers_whatever_the_magnitude(scale, epsilon):
    scores = (torch.randn(3, 50) * scale).requires_grad_()
    weights = sorted_soft_topk(scores, 4, epsilon=epsilon)
    (weights * torch.randn(50, 4)).sum().backward()
    assert weights.isfinite().all() and scores.grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": -1}, "k must lie in .0, 4., .* got -1"),
        ({"k": 5}, "k must lie in .0, 4., .* got 5"),
        ({"k": 1.5}, "k must be an integer, got 1.5"),
        ({"epsilon": -1.0}, "epsilon must be a positive finite number, got -1.0"),
        ({"epsilon": torch.ones(3)}, r"epsilon must be one number or one per problem, \(\), got \(3,\)"),
        ({"cost_scale": "x"}, "cost_scale must be one of"),
        ({"scores": torch.tensor([1.0, math.nan, 0.0])}, "scores contain NaN"),
        ({"scores": torch.tensor([1.0, math.inf, 0.0])}, "infinity"),
        ({"scores": torch.tensor([-math.inf, 1.0, -math.inf])}, "k = 2 .* leaves only 1"),
    ],
)
def test_bad_input_names_the_value(arguments, message):
    arguments = {"scores": torch.randn(4), "k": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        sorted_soft_topk(arguments.pop("scores"), arguments.pop("k"), **arguments)
