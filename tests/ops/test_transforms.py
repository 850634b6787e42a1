"""torch.func, torch.compile, autocast, copies: the operators as parts of other people's programs."""

import copy
import pickle

import pytest
import torch
from torch.func import grad, jacrev, vmap

from fairseq_softtopk.ops import (
    SoftTopK,
    SortedSoftTopK,
    log_soft_topk,
    soft_topk,
    solve_transport,
    sorted_soft_topk,
)

OPERATORS = [soft_topk, log_soft_topk, sorted_soft_topk]
SAME = {
    "atol": 1e-9,
    "rtol": 0,
}  # what Newton's method leaves of a rank's sum; one batch may stop one step later


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("n, epsilon", [(7, 0.3), (300, 0.02)])
def test_vmap_over_scores(operator, n, epsilon):
    scores = rows(3, 2, n)
    expected = operator(scores, 2, epsilon=epsilon)

    def one(x):
        return operator(x, 2, epsilon=epsilon)

    torch.testing.assert_close(vmap(one)(scores), expected, **SAME)
    torch.testing.assert_close(vmap(vmap(one))(scores), expected, **SAME)
    torch.testing.assert_close(vmap(one, in_dims=1)(scores.transpose(0, 1)), expected, **SAME)
    torch.testing.assert_close(vmap(one, in_dims=2)(scores.permute(1, 2, 0)), expected, **SAME)
    torch.testing.assert_close(
        vmap(one, in_dims=-1, out_dims=1)(scores.permute(1, 2, 0)), expected.movedim(0, 1), **SAME
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_over_epsilon(operator):
    scores, epsilon = rows(3, 7), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    expected = torch.stack([operator(scores, 2, epsilon=float(e)) for e in epsilon])
    torch.testing.assert_close(vmap(lambda e: operator(scores, 2, epsilon=e))(epsilon), expected, **SAME)
    both = vmap(lambda x, e: operator(x, 2, epsilon=e))(scores, epsilon)
    torch.testing.assert_close(both, operator(scores, 2, epsilon=epsilon), **SAME)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("problems", [2, 3])
def test_vmap_over_every_pair_of_scores_and_epsilon(operator, problems):
    """As many problems as epsilons, where they could be taken for pairs, and another number."""
    scores, epsilon = rows(problems, 7), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    expected = torch.stack([operator(scores, 2, epsilon=float(e)) for e in epsilon])

    def one(x, e):
        return operator(x, 2, epsilon=e)

    torch.testing.assert_close(vmap(vmap(one, (0, None)), (None, 0))(scores, epsilon), expected, **SAME)
    torch.testing.assert_close(
        vmap(vmap(one, (None, 0)), (0, None))(scores, epsilon), expected.transpose(0, 1), **SAME
    )
    weight = torch.randn_like(expected[0, 0])
    slope = vmap(vmap(grad(lambda x, e: (one(x, e) * weight).sum(), argnums=(0, 1)), (0, None)), (None, 0))
    by_scores, by_epsilon = slope(scores, epsilon)
    for i, e in enumerate(epsilon):
        for j, x in enumerate(scores):
            leaf, width = x.clone().requires_grad_(), e.clone().requires_grad_()
            one(leaf, width).mul(weight).sum().backward()
            torch.testing.assert_close(by_scores[i, j], leaf.grad, atol=1e-8, rtol=0)
            torch.testing.assert_close(by_epsilon[i, j], width.grad, atol=1e-8, rtol=0)


@pytest.mark.parametrize("operator", [soft_topk, log_soft_topk])
def test_vmap_over_k(operator):
    scores, k = rows(3, 7), torch.tensor([1, 7, 3])
    expected = torch.stack([operator(scores, int(count)) for count in k])
    torch.testing.assert_close(vmap(lambda count: operator(scores, count))(k), expected, **SAME)
    torch.testing.assert_close(vmap(operator)(scores, k), operator(scores, k), **SAME)
    for problems in (2, 3):
        few = scores[:problems]
        pairs = vmap(vmap(operator, (0, None)), (None, 0))(few, k)
        torch.testing.assert_close(pairs, torch.stack([operator(few, int(count)) for count in k]), **SAME)
    each = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = torch.stack([operator(scores, counts) for counts in each])
    torch.testing.assert_close(vmap(lambda counts: operator(scores, counts))(each), expected, **SAME)


@pytest.mark.parametrize("solver", ["newton", "sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk])
def test_vmap_of_every_solver(operator, solver):
    scores = rows(3, 7)
    got = vmap(lambda x: operator(x, 2, epsilon=2.0, solver=solver))(scores)
    torch.testing.assert_close(got, operator(scores, 2, epsilon=2.0, solver=solver), **SAME)


def test_vmap_of_transport():
    cost, ones = torch.rand(3, 6, 2, dtype=torch.float64), torch.ones(6)
    got = vmap(lambda c: solve_transport(c, ones, torch.tensor([2.0, 4.0]), 0.3).plan)(cost)
    torch.testing.assert_close(got, solve_transport(cost, ones, torch.tensor([2.0, 4.0]), 0.3).plan, **SAME)
    epsilon = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    masses = torch.tensor([[2.0, 4.0], [1.0, 5.0], [3.0, 3.0]])
    got = vmap(lambda c, m, e: solve_transport(c, ones, m, e).plan)(cost, masses, epsilon)
    torch.testing.assert_close(got, solve_transport(cost, ones, masses, epsilon).plan, **SAME)
    pairs = vmap(vmap(lambda c, e: solve_transport(c, ones, masses[0], e).plan, (0, None)), (None, 0))(
        cost, epsilon
    )
    expected = torch.stack([solve_transport(cost, ones, masses[0], e).plan for e in epsilon])
    torch.testing.assert_close(pairs, expected, **SAME)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("n, epsilon", [(6, 0.3), (300, 0.02)])
def test_grad_and_jacrev(operator, n, epsilon):
    scores = rows(2, n)
    weight = torch.randn_like(operator(scores[0], 2))

    def loss(x):
        return (operator(x, 2, epsilon=epsilon) * weight).sum()

    leaf = scores.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(row) for row in leaf), leaf)
    tolerance = {"atol": 1e-9 / epsilon, "rtol": 1e-9}
    torch.testing.assert_close(torch.stack([grad(loss)(row) for row in scores]), expected, **tolerance)
    torch.testing.assert_close(vmap(grad(loss))(scores), expected, **tolerance)
    if n < 10:
        by_row = torch.autograd.functional.jacobian(lambda x: operator(x, 2, epsilon=epsilon), scores[0])
        torch.testing.assert_close(
            jacrev(lambda x: operator(x, 2, epsilon=epsilon))(scores[0]), by_row, **tolerance
        )
        at_once = torch.autograd.functional.jacobian(
            lambda x: operator(x, 2, epsilon=epsilon), scores[0], vectorize=True
        )
        torch.testing.assert_close(at_once, by_row, **tolerance)
        by_hessian = torch.autograd.functional.hessian(loss, scores[0])
        torch.testing.assert_close(jacrev(grad(loss))(scores[0]), by_hessian, **tolerance)


@pytest.mark.parametrize("operator", OPERATORS)
def test_jacrev_of_epsilon(operator):
    scores, epsilon = rows(2, 6), torch.tensor([0.2, 0.7], dtype=torch.float64)
    got = vmap(jacrev(lambda x, e: operator(x, 2, epsilon=e), argnums=1))(scores, epsilon)
    h = 1e-6
    up, down = operator(scores, 2, epsilon=epsilon + h), operator(scores, 2, epsilon=epsilon - h)
    torch.testing.assert_close(got, (up - down) / (2 * h), atol=1e-6, rtol=1e-6)


COMPILED = {
    "soft_topk": lambda x: soft_topk(x, 3),
    "log_soft_topk": lambda x: log_soft_topk(x, 3),
    "sorted_soft_topk": lambda x: sorted_soft_topk(x, 3),
    "soft_topk hard": lambda x: soft_topk(x, 3, hard=True),
    "sorted_soft_topk hard": lambda x: sorted_soft_topk(x, 3, hard=True),
    "soft_topk, k per problem": lambda x: soft_topk(x, torch.tensor([1, 4])),
    "soft_topk smallest": lambda x: soft_topk(x, 3, largest=False, cost_scale="max"),
    "soft_topk sinkhorn": lambda x: soft_topk(x, 3, epsilon=3.0, solver="sinkhorn_log"),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("n", [8, 200])
def test_compile(name, n):
    torch._dynamo.reset()
    function = COMPILED[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = rows(2, n).requires_grad_(), None
    traced = eager.detach().clone().requires_grad_()
    expected, got = function(eager), compiled(traced)
    torch.testing.assert_close(got, expected, **SAME)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    torch.testing.assert_close(traced.grad, eager.grad, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_compile_without_gradients(name, needs_grad):
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    scores = rows(2, 8).requires_grad_(needs_grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(scores), COMPILED[name](scores), **SAME)
    if not needs_grad:
        torch.testing.assert_close(compiled(scores), COMPILED[name](scores), **SAME)


@pytest.mark.parametrize("solver", ["newton", "sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("operator", [soft_topk, sorted_soft_topk, log_soft_topk])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(operator, solver, dtype):
    options = {"epsilon": 2.0} if operator is log_soft_topk else {"epsilon": 2.0, "solver": solver}
    outside = torch.randn(3, 20).to(dtype).requires_grad_()
    inside = outside.detach().clone().requires_grad_()
    operator(outside, 3, **options).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        weights = operator(inside, 3, **options)
        assert weights.dtype == dtype
        loss = weights.square().sum()
    loss.backward()
    assert torch.equal(weights, operator(outside, 3, **options))
    assert torch.equal(inside.grad, outside.grad)


def test_autocast_changes_nothing_in_transport():
    cost, rows_, cols = torch.rand(6, 3), torch.ones(6), torch.full((3,), 2.0)
    for solver in ("newton", "sinkhorn", "sinkhorn_log"):
        expected = solve_transport(cost, rows_, cols, 0.5, solver=solver)
        with torch.autocast("cpu", torch.bfloat16):
            got = solve_transport(cost, rows_, cols, 0.5, solver=solver)
        assert torch.equal(got.plan, expected.plan) and got.plan.dtype == torch.float32


@pytest.mark.parametrize("module, operator", [(SoftTopK, soft_topk), (SortedSoftTopK, sorted_soft_topk)])
def test_modules(module, operator):
    layer = module(2, epsilon=0.3, largest=False)
    assert repr(layer) == f"{module.__name__}(k=2, epsilon=0.3, largest=False)"
    assert not layer.state_dict() and not list(layer.parameters())
    scores = rows(3, 6)
    expected = operator(scores, 2, epsilon=0.3, largest=False)
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.nn.Sequential(layer)):
        assert torch.equal(same(scores), expected)
    assert repr(pickle.loads(pickle.dumps(layer))) == repr(layer)
