"""On an accelerator the solvers take a fixed number of steps and look at none: that number is enough.

Here it is taken on the CPU: with ``max_iter`` as that number, a solver that needs more warns; with a tolerance
that cannot be met, it takes all of them, and must not leave the solution again.
"""

import math
import warnings

import pytest
import torch
from score_kinds import KINDS, make_scores

from fairseq_softtopk.ops import (
    log_soft_topk,
    problem,
    ranks,
    semidual,
    soft_topk,
    sorted_soft_topk,
    threshold,
    transport,
)

MAGNITUDES = torch.logspace(-3, 3, 13)


def problems(kind: str, epsilon: float, n: int) -> torch.Tensor:
    """130 problems of 13 magnitudes; epsilon belongs to magnitude 1."""
    return (make_scores(kind, 130, n).view(13, 10, n) * MAGNITUDES.view(-1, 1, 1)).view(130, n) / epsilon


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(2, 1), (20, 1), (20, 10), (20, 19), (400, 5), (400, 200)])
def test_of_the_threshold(kind, n, k, dtype):
    for epsilon in (100.0, 1.0, 1e-3):
        scores = problems(kind, epsilon, n).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            expected = soft_topk(scores, k, epsilon=1.0, max_iter=threshold.BLIND_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            all_steps = soft_topk(scores, k, epsilon=1.0, max_iter=threshold.BLIND_STEPS, tol=1e-300)
        # A step more or less moves ln y by the tolerance, 4 units in the last place, and A by a quarter of that
        torch.testing.assert_close(all_steps, expected, atol=8 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(2, 1), (20, 1), (20, 5), (20, 19), (100, 5), (60, 30)])
def test_of_the_ranks(kind, n, k):
    for epsilon in (100.0, 1.0, 1e-3):
        scores = problems(kind, epsilon, n).double()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            expected = sorted_soft_topk(scores, k, epsilon=1.0, max_iter=semidual.BLIND_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            all_steps = sorted_soft_topk(scores, k, epsilon=1.0, max_iter=semidual.BLIND_STEPS, tol=1e-300)
        torch.testing.assert_close(all_steps, expected, atol=1e-8, rtol=0)


@pytest.fixture
def unwatched(monkeypatch):
    """The branches of an accelerator on the CPU: no number may be read, and checks are assertions."""
    for module in (problem, ranks, semidual, threshold, transport):
        monkeypatch.setattr(module, "watched", lambda tensor: False)


def operators():
    """Every operator, by name."""
    return {
        "soft_topk": lambda x: soft_topk(x, 3, epsilon=0.3),
        "hard": lambda x: soft_topk(x, 3, epsilon=0.3, hard=True),
        "log_soft_topk": lambda x: log_soft_topk(x, 3, epsilon=0.3),
        "epsilon": lambda x: soft_topk(x, 3, epsilon=torch.full((len(x),), 0.3)),
        "sorted": lambda x: sorted_soft_topk(x, 3, epsilon=0.3),
        "sinkhorn": lambda x: sorted_soft_topk(x, 3, epsilon=10.0, solver="sinkhorn"),
    }


@pytest.mark.parametrize("name", operators())
def test_without_looking_the_result_is_the_same(name, request):
    scores, operator = torch.randn(4, 3000, requires_grad=True), operators()[name]
    expected = operator(scores)
    grad = torch.randn_like(expected)
    (for_scores,) = torch.autograd.grad(expected, scores, grad)
    request.getfixturevalue("unwatched")
    got = operator(scores)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got, scores, grad)[0], for_scores, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_without_looking_wrong_scores_are_an_assertion(name, wrong, unwatched):
    scores = torch.randn(4, 30)
    scores[1, 2] = wrong
    with pytest.raises(RuntimeError, match="the same call on the CPU says which"):
        operators()[name](scores)
    with pytest.raises(RuntimeError, match="the same call on the CPU says which"):
        operators()[name](torch.full((2, 30), -math.inf).index_fill(1, torch.tensor([0, 5]), 1.0))


def test_without_looking_a_wrong_epsilon_is_an_assertion(unwatched):
    for operator in (soft_topk, sorted_soft_topk):
        with pytest.raises(RuntimeError, match="the same call on the CPU says which"):
            operator(torch.randn(2, 30), 3, epsilon=torch.tensor([0.1, math.nan]))
