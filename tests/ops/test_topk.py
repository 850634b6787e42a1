import math

import pytest
import torch
from oracles import topk_plan
from score_kinds import KINDS, make_scores
from torch.autograd import gradcheck, gradgradcheck

from fairseq_softtopk.ops import log_soft_topk, soft_topk

EPSILONS = [10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


@pytest.mark.parametrize("n, k", [(2, 1), (5, 1), (5, 3), (100, 3), (100, 99), (1000, 10)])
@pytest.mark.parametrize("epsilon", [10.0, 1.0, 0.1])
@pytest.mark.parametrize("largest, scale", [(True, "none"), (False, "none"), (True, "max"), (False, "max")])
def test_equals_sinkhorn_run_to_convergence(n, k, epsilon, largest, scale):
    scores = torch.rand(n, dtype=torch.float64) * 2 - 0.5
    expected = topk_plan(scores, k, epsilon, largest, scale)
    got = soft_topk(scores, k, epsilon=epsilon, largest=largest, cost_scale=scale)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("n", [5, 1000, 50_000])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_to_k_and_agrees_with_float64(n, epsilon, kind):
    scores = make_scores(kind, 3, n)
    single, double = soft_topk(scores, 3, epsilon=epsilon), soft_topk(scores.double(), 3, epsilon=epsilon)
    torch.testing.assert_close(double.sum(-1), torch.full((3,), 3.0).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(single.double(), double, atol=2e-6, rtol=0)


def test_limits_are_the_hard_indicator_and_k_over_n():
    scores = torch.randn(4, 30)
    hard = torch.zeros_like(scores).scatter(-1, scores.topk(7).indices, 1.0)
    torch.testing.assert_close(soft_topk(scores, 7, epsilon=1e-6), hard)
    flat = soft_topk(scores, 7, epsilon=1e7)
    torch.testing.assert_close(flat, torch.full_like(flat, 7 / 30), atol=1e-6, rtol=0)


def test_tied_scores_share_equally():
    weights = soft_topk(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), 2, epsilon=1e-3)
    torch.testing.assert_close(weights, torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 0]))


def test_is_invariant_to_a_shift_and_equivariant_to_a_permutation():
    scores, order = torch.randn(2, 20, dtype=torch.float64), torch.randperm(20)
    weights = soft_topk(scores, 5, epsilon=0.3)
    torch.testing.assert_close(soft_topk(scores + 1000, 5, epsilon=0.3), weights, atol=1e-11, rtol=0)
    torch.testing.assert_close(soft_topk(scores[:, order], 5, epsilon=0.3), weights[:, order])


def test_rows_do_not_depend_on_each_other_unless_asked():
    scores = torch.randn(4, 9, dtype=torch.float64) * torch.tensor([[1.0], [10.0], [0.1], [3.0]])
    for scale in ("none", "max"):
        alone = torch.stack([soft_topk(row, 2, cost_scale=scale) for row in scores])
        torch.testing.assert_close(soft_topk(scores, 2, cost_scale=scale), alone)
    together = soft_topk(scores, 2, cost_scale="batch_max")
    assert (together - soft_topk(scores, 2, cost_scale="max")).abs().max() > 0.1


def test_one_k_and_one_epsilon_per_problem():
    scores = torch.randn(3, 8, dtype=torch.float64)
    k, epsilon = torch.tensor([0, 3, 8]), torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    weights = soft_topk(scores, k, epsilon=epsilon)
    for row in range(3):
        alone = soft_topk(scores[row], int(k[row]), epsilon=float(epsilon[row]))
        torch.testing.assert_close(weights[row], alone)
    assert weights[0].eq(0).all() and weights[2].eq(1).all()


@pytest.mark.parametrize("largest, never", [(True, -math.inf), (False, math.inf)])
def test_a_masked_element_changes_nothing(largest, never):
    scores = torch.randn(6, dtype=torch.float64)
    padded = torch.cat([scores[:2], torch.tensor([never]).double(), scores[2:]]).requires_grad_()
    weights = soft_topk(padded, 3, largest=largest)
    weights.square().sum().backward()
    alone = soft_topk(scores, 3, largest=largest)
    torch.testing.assert_close(torch.cat([weights[:2], weights[3:]]), alone)
    assert weights[2] == 0 and padded.grad[2] == 0 and padded.grad.isfinite().all()


def test_a_mask_that_leaves_exactly_k_selects_them():
    scores = torch.tensor([0.3, -math.inf, 5.0, -math.inf], requires_grad=True)
    weights = soft_topk(scores, 2)
    weights.sum().backward()
    assert weights.tolist() == [1, 0, 1, 0] and scores.grad.eq(0).all()


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
def test_any_dim(dim):
    scores = torch.randn(4, 5, 6)
    expected = soft_topk(scores.movedim(dim, -1).contiguous(), 2).movedim(-1, dim)
    torch.testing.assert_close(soft_topk(scores, 2, dim=dim), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_in_the_same_out(dtype):
    scores = torch.randn(2, 10).to(dtype)
    weights = soft_topk(scores, 3)
    assert weights.dtype == dtype
    expected = soft_topk(scores.double(), 3)
    torch.testing.assert_close(weights.double(), expected, atol=torch.finfo(dtype).eps + 1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_problems(shape):
    assert soft_topk(torch.zeros(shape), 0).shape == shape


@pytest.mark.parametrize("n, k, epsilon", [(2, 1, 0.5), (7, 3, 0.1), (7, 6, 1.0), (40, 5, 0.05)])
@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk])
def test_first_and_second_derivatives(n, k, epsilon, operator):
    scores = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: operator(x, k, epsilon=epsilon), scores)
    assert gradgradcheck(lambda x: operator(x, k, epsilon=epsilon), scores)


def test_jacobian_is_the_formula_of_the_implicit_function_theorem():
    scores, k, epsilon = torch.randn(12, dtype=torch.float64), 4, 0.2
    jacobian = torch.autograd.functional.jacobian(lambda x: soft_topk(x, k, epsilon=epsilon), scores)
    weights = soft_topk(scores, k, epsilon=epsilon)
    s = weights * (1 - weights)
    expected = 2 / epsilon * (torch.diag(s) - torch.outer(s, s) / s.sum())
    torch.testing.assert_close(jacobian, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("epsilon", [1e3, 0.1, 1e-5, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_but_numbers_whatever_the_magnitude(scale, epsilon, dtype):
    scores = (torch.randn(3, 50) * scale).to(dtype).requires_grad_()
    weights = soft_topk(scores, 4, epsilon=epsilon)
    (weights * torch.randn(50).to(dtype)).sum().backward()
    assert weights.isfinite().all() and scores.grad.isfinite().all()
    assert log_soft_topk(scores, 4, epsilon=epsilon).isnan().sum() == 0


def test_log_is_accurate_where_the_weight_underflows():
    scores = torch.tensor([0.0, 0.0, -200.0])
    # The first two share k = 1 at t = 0, so that ln A of the third is 2 x / epsilon.
    torch.testing.assert_close(log_soft_topk(scores, 1, epsilon=1.0)[2].item(), -400.0, atol=1e-3, rtol=0)
    assert soft_topk(scores, 1, epsilon=1.0)[2] == 0


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk])
def test_all_or_nothing_cannot_move(k, operator):
    scores = torch.randn(3, requires_grad=True)
    operator(scores, k).clamp(min=-1e30).sum().backward()
    assert scores.grad.eq(0).all()


def test_the_largest_floats_with_a_scaled_cost():
    weights = soft_topk(torch.tensor([3e38, -3e38, 0.0]), 1, cost_scale="max")
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_inputs_are_not_modified_and_may_be_expanded():
    scores = torch.randn(1, 6).expand(3, 6)
    before = scores.clone()
    soft_topk(scores, 2)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": -1}, "k must lie in .0, 4., .* got -1"),
        ({"k": 5}, "k must lie in .0, 4., .* got 5"),
        ({"k": 1.5}, "k must be an integer, got 1.5"),
        ({"k": torch.tensor([1.0])}, "k must be an integer"),
        ({"epsilon": 0.0}, "epsilon must be a positive finite number, got 0.0"),
        ({"epsilon": math.nan}, "epsilon must be a positive finite number, got nan"),
        ({"epsilon": torch.tensor(-1.0)}, "epsilon must be positive and finite, got -1.0"),
        ({"epsilon": torch.ones(3)}, r"epsilon must be one number or one per problem, \(\), got \(3,\)"),
        ({"k": torch.tensor([1, 2, 3])}, r"k must be one number or one per problem, \(\), got \(3,\)"),
        ({"scores": torch.tensor([1.0, math.nan]), "k": 0}, "scores contain NaN"),
        ({"scores": torch.tensor([[1.0, math.nan], [1, 2]]), "k": torch.tensor([0, 1])}, "scores contain NaN"),
        ({"cost_scale": "mean"}, "cost_scale must be one of none, max, batch_max, got 'mean'"),
        ({"scores": torch.tensor([1.0, math.nan, 0.0])}, "scores contain NaN"),
        ({"scores": torch.tensor([1.0, math.inf, 0.0])}, "infinity"),
        ({"scores": torch.tensor([-math.inf, 1.0, -math.inf])}, "k = 2 .* leaves only 1"),
        ({"scores": torch.tensor([-math.inf] * 3)}, "k = 2 .* leaves only 0"),
        ({"scores": torch.tensor([1, 2, 3])}, "scores must be floating point"),
        ({"scores": torch.tensor(1.0)}, "at least one dimension"),
    ],
)
def test_bad_input_names_the_value(arguments, message):
    arguments = {"scores": torch.randn(4), "k": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        soft_topk(arguments.pop("scores"), arguments.pop("k"), **arguments)
