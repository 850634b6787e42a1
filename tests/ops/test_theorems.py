"""What the paper proves, on random problems."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fairseq_softtopk.ops import soft_topk, sorted_soft_topk

QUICK = settings(max_examples=200, deadline=None, derandomize=True)
# What PyTorch 2.5 compiles turns subnormal numbers off for the whole process.
floats = partial(st.floats, allow_subnormal=False)


@st.composite
def problems(draw, smallest_gap: float, largest: int = 12):
    """Scores in any order, neighbours at least ``smallest_gap`` apart, and a k with 0 < k < n."""
    n = draw(st.integers(2, largest))
    gaps = draw(st.lists(floats(smallest_gap, 2.0), min_size=n, max_size=n))
    order = draw(st.permutations(range(n)))
    scores = torch.tensor(gaps, dtype=torch.float64).cumsum(0) + draw(floats(-10, 10))
    return scores[list(order)], draw(st.integers(1, n - 1))


@QUICK
@given(problems(smallest_gap=0.01))
def test_proposition_1(problem):
    """Without ties the unregularised plan is the hard indicator; gap / epsilon >= 50 leaves n exp(-50)."""
    scores, k = problem
    hard = torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1.0)
    torch.testing.assert_close(soft_topk(scores, k, epsilon=2e-4), hard, atol=12 * math.exp(-50), rtol=0)
    ranks = torch.nn.functional.one_hot(scores.topk(k).indices, len(scores)).T.double()
    torch.testing.assert_close(sorted_soft_topk(scores, k, epsilon=2e-4), ranks, atol=1e-9, rtol=0)


@QUICK
@given(problems(smallest_gap=0.01), floats(0.02, 10.0))
def test_theorem_1(problem, epsilon):
    """The Jacobian always has an entry that is not 0 (gap / epsilon <= 100: exp(-100) does not underflow)."""
    scores, k = problem
    jacobian = torch.autograd.functional.jacobian(lambda x: soft_topk(x, k, epsilon=epsilon), scores)
    # Raising an element that is selected a little raises its weight, and that of no other.
    assert jacobian.abs().max() > 0
    assert (jacobian.diagonal() >= 0).all() and (jacobian - jacobian.diagonal().diag() <= 0).all()


def bias(scores: torch.Tensor, k: int, epsilon: float) -> float:
    """The Frobenius norm of the difference of the two plans of total mass 1."""
    hard = torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1.0)
    error = soft_topk(scores, k, epsilon=epsilon) - hard
    return float(error.norm()) * math.sqrt(2) / len(scores)  # the other column is off by as much


@QUICK
@given(problems(smallest_gap=1e-3, largest=60), floats(1e-4, 100.0))
def test_theorem_2(problem, epsilon):
    """The bias is at most ``epsilon (ln n + ln 2) / (n gap)``, the gap of the k-th and the next score."""
    scores, k = problem
    inside, outside = scores.sort(descending=True).values[k - 1 : k + 1]
    bound = epsilon * (math.log(len(scores)) + math.log(2)) / (len(scores) * float(inside - outside))
    assert bias(scores, k, epsilon) <= bound + 1e-12


@QUICK
@given(problems(smallest_gap=1e-3, largest=60), floats(1e-4, 100.0))
def test_a_bound_on_the_bias_for_every_n(problem, epsilon):
    """A mass of L moved across the gap costs 2 L gap, and gains at most n ln 2 of entropy; |A - hard| <= 1."""
    scores, k = problem
    inside, outside = scores.sort(descending=True).values[k - 1 : k + 1]
    bound = math.sqrt(epsilon * math.log(2) / (len(scores) * float(inside - outside)) * 2)
    assert bias(scores, k, epsilon) <= bound + 1e-12


@pytest.mark.parametrize("n", [2, 100, 1000, 10_000])
def test_two_clusters(n):
    """Half of the scores at 1, half at 0: A is sigmoid(+-1 / epsilon).

    For n of several hundred this is more than Theorem 2 allows: its factor 1 / n cannot hold for every n.
    """
    epsilon = 1 / 1.278  # where gap / epsilon * sigmoid(-gap / epsilon) is largest
    scores = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat_interleave(n // 2)
    weights = soft_topk(scores, n // 2, epsilon=epsilon)
    expected = torch.sigmoid((2 * scores - 1) / epsilon)
    torch.testing.assert_close(weights, expected, atol=1e-14, rtol=0)
    allowed = epsilon * (math.log(n) + math.log(2)) / n
    assert (bias(scores, n // 2, epsilon) <= allowed) == (n <= 100)
