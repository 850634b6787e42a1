"""Corners in which an operator was once wrong."""

import math
import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch.library import opcheck

from fairseq_softtopk.ops import (
    SoftTopK,
    SortedSoftTopK,
    log_soft_topk,
    ranks,
    soft_topk,
    solve_transport,
    sorted_soft_topk,
    threshold,
    transport,
)

INF = math.inf


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"epsilon": 1e-5}, {"solver": "sinkhorn_log"}])
def test_a_row_without_elements_selects_nothing_and_moves_nothing(options):
    scores = torch.tensor([[1.0, 2.0, 3.0], [-INF] * 3], dtype=torch.float64, requires_grad=True)
    weights = soft_topk(scores, torch.tensor([1, 0]), **{"epsilon": 5.0, **options})
    assert weights[1].eq(0).all()
    (grad,) = torch.autograd.grad(weights.square().sum(), scores, create_graph=True)
    assert grad[1].eq(0).all() and grad.isfinite().all()
    (second,) = torch.autograd.grad(grad.sum(), scores)
    assert second.isfinite().all() and second[1].eq(0).all()


def test_no_rank_of_a_masked_row():
    scores = torch.full((2, 3), -INF, requires_grad=True)
    weights = sorted_soft_topk(scores, 0)
    assert weights.shape == (2, 3, 0)
    weights.sum().backward()
    assert scores.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "scores, epsilon",
    [
        ([1e30, 0.0, -1.0], 0.1),
        ([3.0, 2.0, 1.0], 1e-31),
        ([3e38, 2e38, -3e38], 0.1),
        ([3e38, 0.0, -3e38], 1e-38),
    ],
)
def test_the_logarithm_belongs_to_the_weight_at_any_magnitude(scores, epsilon, dtype):
    scores = torch.tensor(scores, dtype=dtype, requires_grad=True)
    logs = log_soft_topk(scores, 1, epsilon=epsilon)
    assert not logs.isnan().any() and torch.equal(logs.exp(), soft_topk(scores, 1, epsilon=epsilon))
    assert torch.equal(logs.exp(), torch.tensor([1.0, 0.0, 0.0], dtype=dtype))
    logs.clamp(min=-1e30).sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("epsilon", [1e-39, 1e-45, 1e-50, 1e39, 1e300])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk, sorted_soft_topk])
def test_an_epsilon_beyond_float32_is_as_good_as_its_limit(operator, epsilon, as_tensor):
    scores = torch.tensor([0.3, 0.1, 0.2, 0.0], requires_grad=True)
    given = torch.tensor(epsilon, dtype=torch.float64) if as_tensor else epsilon
    weights = operator(scores, 2, epsilon=given)
    limit = operator(scores, 2, epsilon=1e-30 if epsilon < 1 else 1e30)
    torch.testing.assert_close(weights.exp(), limit.exp(), atol=1e-6, rtol=0)
    # the logarithm's gradient is 2 / epsilon times this
    (weights * torch.rand_like(weights) / 50).sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("epsilon", [0.1, 10.0])
@pytest.mark.parametrize("solver", ["newton", "sinkhorn_log"])
def test_a_scaled_cost_near_the_largest_float(epsilon, solver):
    """C / max C is at most 1, but its slope 2 x / max C vanishes: nothing tells the scores apart."""
    scores = torch.tensor([3e38, 2e38, -3e38])
    weights = soft_topk(scores, 1, epsilon=epsilon, cost_scale="max", solver=solver)
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3), atol=1e-5, rtol=0)


def test_nothing_to_transport_is_an_empty_plan():
    for solver in ("newton", "sinkhorn", "sinkhorn_log"):
        solved = solve_transport(torch.rand(6, 3), torch.zeros(6), torch.zeros(3), 0.5, solver=solver)
        assert solved.plan.eq(0).all() and solved.converged and solved.residual == 0


def test_a_learned_epsilon_is_a_parameter_of_the_module():
    module = SoftTopK(3, epsilon=nn.Parameter(torch.tensor(0.5)))
    scores = torch.randn(2, 7)
    assert [name for name, _ in module.named_parameters()] == ["epsilon"]
    torch.testing.assert_close(module(scores), soft_topk(scores, 3, epsilon=0.5))
    module(scores).square().sum().backward()
    assert module.epsilon.grad.abs() > 0
    ragged = SoftTopK(torch.tensor([1, 2])).double()
    assert list(ragged.state_dict()) == ["k"] and ragged(scores).sum(-1).tolist() == pytest.approx([1, 2])


@pytest.mark.parametrize("module", [SoftTopK, SortedSoftTopK])
def test_a_module_refuses_an_option_that_does_not_exist(module):
    with pytest.raises(TypeError, match="epsilonn"):
        module(3, epsilonn=1.0)


def test_nothing_is_in_the_graph_of_an_empty_batch_and_so_is_epsilon():
    epsilon = torch.tensor(0.1, requires_grad=True)
    for operator in (soft_topk, log_soft_topk, sorted_soft_topk):
        scores = torch.zeros(0, 5, requires_grad=True)
        grads = torch.autograd.grad(operator(scores, 2, epsilon=epsilon).sum(), (scores, epsilon))
        assert grads[0].shape == (0, 5) and grads[1] == 0


def test_the_residual_of_an_unsolved_selection_is_the_error_of_its_sum():
    scores = torch.tensor([3.0, 2.0, 1.9, 1.8, -4.0], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="off by") as caught:
        weights = soft_topk(scores, 1, epsilon=1.0, max_iter=1)
    said = float(str(caught[0].message).split()[-1])
    assert said == pytest.approx(abs(float(weights.sum()) - 1), rel=0.06)  # it is printed with two digits


def layouts(scores: torch.Tensor):
    """The same scores in memory that is contiguous, and that is not."""
    return [scores, scores.t().contiguous().t(), scores.repeat(1, 2)[:, ::2]]


def test_what_a_compiler_is_told_of_the_operators_is_true():
    """Shapes, strides and offsets of what comes back; that nothing is modified or aliased."""
    checks = ("test_schema", "test_faketensor")
    epsilon = torch.full((1, 1), 0.3)
    for scores in layouts(torch.randn(4, 30)):
        for counts in (None, torch.tensor([[1], [3], [0], [30]])):
            arguments = (scores, epsilon, counts, -1 if counts is not None else 3, 50, 1e-6, True)
            opcheck(threshold._solve_opaque, arguments, test_utils=checks)
        opcheck(
            ranks._solve_opaque,
            (scores.double(), epsilon.double(), 3, torch.float32, 50, 1e-9, True),
            test_utils=checks,
        )
        masses = torch.full((4,), 1 / 4), torch.full((30,), 1 / 30)
        for solver in ("newton", "sinkhorn_log"):
            arguments = (scores, *masses, torch.ones(1, 1), solver, 50, 0.0, 10.0, False)
            opcheck(transport._solve_opaque, arguments, test_utils=checks)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["soft_topk", "log_soft_topk", "sorted_soft_topk"])
def test_compiles_with_the_default_backend(name):
    operators = {
        "soft_topk": lambda x: soft_topk(x, 3, epsilon=0.3, dim=0),
        "log_soft_topk": lambda x: log_soft_topk(x, 3, epsilon=0.3),
        "sorted_soft_topk": lambda x: sorted_soft_topk(x, 3, epsilon=0.3),
    }
    operator, scores = operators[name], torch.randn(20, 20, requires_grad=True)
    expected = operator(scores)
    grad = torch.randn_like(expected)
    got = torch.compile(operator, fullgraph=True)(scores)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    of_expected, of_got = (torch.autograd.grad(value, scores, grad)[0] for value in (expected, got))
    torch.testing.assert_close(of_got, of_expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("scale", ["max", "batch_max"])
def test_scaling_the_cost_costs_no_digits(epsilon, scale):
    """Once float32 scores were divided by their largest before they were subtracted: errors of 5e-6."""
    for scores in (torch.randn(16, 1000), torch.rand(16, 1000) + 10, torch.randn(16, 1000) * 1e3):
        exact = soft_topk(scores.double(), 5, epsilon=epsilon, cost_scale=scale)
        got = soft_topk(scores, 5, epsilon=epsilon, cost_scale=scale)
        torch.testing.assert_close(got.double(), exact, atol=5e-7, rtol=0)


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 2, -2, -1])
@pytest.mark.parametrize("n", [1000, 100_000])
def test_small_weights_and_their_gradients_have_all_their_digits(n, k, epsilon):
    """Relative to each of them; of A near 1 that is true of 1 - A as far as A itself can tell it."""
    k %= n
    scores = torch.zeros(n)
    scores[0], scores[-1] = 1.0, -1.0

    def solve(scores):
        scores = scores.clone().requires_grad_()
        weights = soft_topk(scores, k, epsilon=epsilon)
        return weights.detach(), *torch.autograd.grad(weights[[0, 1, -1]], scores, torch.tensor([1.0, 2, 3]))

    for got, want in zip(solve(scores), solve(scores.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("n, k", [(1_000_000, 1), (30_000, 2), (100_000, 1), (300_000, 2)])
def test_of_many_scores_the_largest_has_the_largest_weight_and_ties_share(n, k):
    scores = torch.zeros(n)
    assert [*map(float, soft_topk(scores, k).aminmax())] == pytest.approx([k / n] * 2, rel=1e-6)
    scores[0] = 1e-4
    weights = soft_topk(scores, k, epsilon=1.0)
    assert weights[0] > weights[1:].max()


@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk])
def test_a_number_of_elements_reads_nothing_from_a_device(operator):
    scores = torch.rand(2, 5, device="meta")
    for k in (0, 2, 5):
        assert operator(scores, k).shape == (2, 5)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="compiles for every number anew")
@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk, sorted_soft_topk])
def test_one_graph_serves_every_epsilon_and_k(operator):
    torch._dynamo.reset()
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    scores = torch.randn(2, 16)
    for step in range(12):
        epsilon, k = 0.3 * 0.9**step, 3 + step if operator is not sorted_soft_topk else 3
        expected = operator(scores, k, epsilon=epsilon)
        torch.testing.assert_close(compiled(scores, k, epsilon=epsilon), expected)


class Selecting(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.linear, self.operator = nn.Linear(6, 6), operator

    def forward(self, x):
        return self.operator(self.linear(x), 3)


@pytest.mark.parametrize(
    "operator",
    [soft_topk, log_soft_topk, sorted_soft_topk, partial(soft_topk, solver="sinkhorn_log", epsilon=5.0)],
)
def test_an_exported_program_has_the_gradient(operator):
    x, module = torch.randn(2, 6), Selecting(operator)
    exported = torch.export.export(module, (x,), strict=False).module()
    for program in (module, exported):
        program(x).square().sum().backward()
    torch.testing.assert_close(
        dict(exported.named_parameters())["linear.weight"].grad, module.linear.weight.grad
    )


def test_an_error_names_numbers_of_one_problem():
    scores = torch.tensor([[1.0, 2.0, 3.0, -math.inf], [-math.inf, -math.inf, -math.inf, 1.0]])
    with pytest.raises(ValueError, match="k = 4 elements to select, but the mask leaves only 3"):
        soft_topk(scores, torch.tensor([4, 2]))


@pytest.mark.parametrize("k", [[1, 2], None, 1.5])
def test_a_k_that_is_not_a_number_of_elements(k):
    with pytest.raises(ValueError, match="k must be an integer, got"):
        soft_topk(torch.rand(2, 3), k)


@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
def test_an_epsilon_in_half_precision_is_the_number_that_it_holds(operator):
    """Also where it is smaller than the smallest normal number of its dtype."""
    narrow = torch.tensor(1e-5, dtype=torch.float16, requires_grad=True)
    wide = narrow.detach().float().requires_grad_()
    scores = torch.tensor([1.0, 0.99998, 0.5])
    weights = [operator(scores, 1, epsilon=epsilon) for epsilon in (narrow, wide)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    slopes = [
        torch.autograd.grad(value[0].sum(), epsilon)[0]
        for value, epsilon in zip(weights, (narrow, wide), strict=True)
    ]
    assert slopes[0] == slopes[1].half() != 0


@pytest.mark.parametrize("cost_scale", ["none", "max", "batch_max"])
@pytest.mark.parametrize("largest", [True, False])
def test_the_hard_choice_is_that_of_the_scores_whatever_their_cost_is_divided_by(cost_scale, largest):
    scores = torch.tensor([[1e30, 1e-30, 2e-30, 3e-30]]) * (1 if largest else -1)
    options = {"largest": largest, "hard": True, "cost_scale": cost_scale}
    best = scores.topk(2, largest=largest).indices
    expected = torch.zeros_like(scores).scatter(-1, best, 1.0)
    assert torch.equal(soft_topk(scores, 2, **options), expected)
    assert torch.equal(soft_topk(scores, torch.tensor([2]), **options), expected)
    assert torch.equal(sorted_soft_topk(scores, 2, **options).argmax(-2), best)


def test_what_is_never_selected_has_no_gradient_of_its_logarithm():
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    logs = log_soft_topk(scores, torch.tensor([0, 1]))
    assert logs[0].eq(-INF).all()
    (grad,) = torch.autograd.grad(logs, scores, torch.ones_like(logs))
    assert grad[0].eq(0).all() and grad[1].ne(0).any()


def test_a_mask_beside_ties_has_no_gradient_at_the_smallest_epsilon():
    scores = torch.tensor([0.0, 0.0, 0.0, -INF], requires_grad=True)
    (grad,) = torch.autograd.grad(
        (soft_topk(scores, 2, epsilon=1e-38) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), scores
    )
    assert grad[3] == 0 and not grad.isnan().any()


def test_a_cost_whose_differences_overflow_is_refused():
    cost = torch.tensor([[1e308, -1e308], [0.0, 1e308]], dtype=torch.float64)
    with pytest.raises(ValueError, match="so must the differences of cost / epsilon"):
        solve_transport(cost, torch.full((2,), 0.5), torch.full((2,), 0.5), 1.0)


@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk, sorted_soft_topk])
def test_an_error_names_numbers_also_where_new_tensors_are_made_elsewhere(operator):
    scores = torch.tensor([[1.0, -INF, -INF]])
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="k = 2 elements to select, but the mask leaves only 1"),
    ):
        operator(scores, 2)
