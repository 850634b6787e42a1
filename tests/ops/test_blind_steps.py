"""On an accelerator the solvers take a fixed number of steps and look at none: that number is enough.

Here it is taken on the CPU: with ``max_iter`` as that number, a solver that needs more warns; with a tolerance
that cannot be met, it takes all of them, and must not leave the solution again.
"""

import warnings

import pytest
import torch
from score_kinds import KINDS, make_scores

from fairseq_softtopk.ops import semidual, soft_topk, sorted_soft_topk, threshold

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
