"""The sorted SOFT top-k operator: scores -> how much element i has rank l.

The anchors are k, k-1, ..., 1 for the ranks 1 ... k, and 0 for all other elements (paper, section 4).

**Start at the hard solution.**  Between two neighbouring ranks the hard assignment switches at the
midpoint ``m_l`` of the l-th and (l+1)-th largest score.  Rank l is better than rank l + 1 by

    L_il - L_i,l+1 = d_il,        d_il = 2 (x_i - m_l) / epsilon.

With these logits the hard solution has the potentials zeta = 0, and at any epsilon zeta is a correction of the
size of a logarithm of n: Newton's method starts close.  As d_il grows with l, the logits
relative to the best rank of a row are sums of numbers of one sign,

    L_ij - max_l L_il = sum_(l >= j) min(d_il, 0) - sum_(l < j) max(d_il, 0),

in which nothing cancels, however small epsilon is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import Problem, check_contents, prepare
from .transport import column_potentials, transport_plan


def sorted_soft_topk(
    scores: Tensor,
    k: int,
    *,
    epsilon: float | Tensor = 0.1,
    dim: int = -1,
    largest: bool = True,
    cost_scale: str = "none",
) -> Tensor:
    r"""Relaxes the permutation matrix of the sorted top-k: ``one_hot(scores.topk(k).indices, n).T``.

    The weights A are the first k columns of the plan that solves (paper, eq. 7)

    .. math::
        \min_{P \ge 0} \sum_{ij} C_{ij} P_{ij} + \epsilon \sum_{ij} P_{ij} \ln P_{ij}, \quad
        C_{ij} = (x_i - b_j)^2, \; b = (k, \dots, 1, 0), \quad P \mathbf 1 = \mathbf 1, \;
        \mathbf 1^\top P = (1, \dots, 1, n - k),

    exactly, at every epsilon.  It is solved in float64; gradients come from implicit differentiation
    (paper, Algorithm 4), and memory does not grow with the number of solver steps.

    Args:
        scores: any shape, floating point; not modified.  ``-inf`` (``+inf`` for the smallest)
            means "never": weight exactly 0, gradient exactly 0, no influence on the others.
        k: how many ranks, in [0, n].
        epsilon: entropic weight, in units of score x anchor distance, after the scaling below;
            a tensor has the shape of ``scores`` without ``dim``.
        dim: the dimension to select from.
        largest: rank 1 is the largest score, or the smallest.
        cost_scale: ``"none"``, ``"max"`` or ``"batch_max"``, see :func:`soft_topk`.

    Returns:
        Weights in [0, 1] of the dtype of ``scores`` and its shape with ``dim`` moved last, + (k,):
        entry [..., i, l] says how much element i has rank l + 1.  Each rank sums to 1 over the elements;
        each element to at most 1 over the ranks.

    Raises:
        ValueError: if an argument is out of range, scores hold NaN or the opposite infinity, or
            fewer than k of them are not masked.
    """
    if isinstance(k, Tensor) or int(k) != k:
        raise ValueError(f"k must be an integer, got {k}")
    problem = prepare(scores, k + 1, epsilon, dim, largest, cost_scale, torch.float64)
    n = problem.scores.size(-1)
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in [0, {n}], the number of scores, got {k}")
    if k == 0 or problem.scores.numel() == 0:
        return scores.movedim(dim, -1).unsqueeze(-1).expand(*problem.scores.shape, k) * 0.0
    return _solve(problem, k)[..., :k].to(scores.dtype)


def _solve(problem: Problem, k: int) -> Tensor:
    """The plan, (..., n, k + 1): the last column holds what has no rank."""
    middle = _thresholds(problem, k)  # (..., k)
    # Where exactly k elements are alive there is no threshold below them, and the last column is closed.
    closed = middle == -math.inf
    logits = _logits(problem, middle.masked_fill(closed, 0.0))
    alive = problem.alive.to(logits.dtype)
    unranked = alive.sum(-1, keepdim=True) - k
    col_mass = torch.cat([torch.ones_like(middle), unranked], dim=-1)
    start = torch.zeros_like(col_mass)
    start[..., k:] = start[..., k:].masked_fill(closed[..., -1:], -math.inf)
    if bool(middle.isnan().any()):
        check_contents(problem.scores, problem.alive, k)
    return transport_plan(logits, alive, column_potentials(logits, alive, col_mass, start))


def _logits(problem: Problem, middle: Tensor) -> Tensor:
    """How much worse each rank is than the best of its row, (..., n, k + 1)."""
    steps = torch.stack([problem.slopes(m) for m in middle.unsqueeze(-1).unbind(-2)], dim=-1)  # d, (..., n, k)
    worse_above, worse_below = steps.masked_fill(steps > 0, 0.0), steps.masked_fill(steps <= 0, 0.0)
    none = torch.zeros_like(steps[..., :1])
    above = torch.cat([worse_above.flip(-1).cumsum(-1).flip(-1), none], dim=-1)
    return above - torch.cat([none, worse_below.cumsum(-1)], dim=-1)


def _thresholds(problem: Problem, k: int) -> Tensor:
    """The k midpoints below each rank, (..., k); NaN where the scores cannot be ranked."""
    scores = problem.scores.detach()
    ranked = scores.topk(min(k + 1, scores.size(-1)), dim=-1).values
    if ranked.size(-1) == k:
        ranked = torch.cat([ranked, torch.full_like(ranked[..., :1], -math.inf)], dim=-1)
    unsolvable = ~(ranked[..., :1] < math.inf) | (ranked[..., k - 1 : k] == -math.inf)
    middle = ranked[..., :-1] / 2 + ranked[..., 1:] / 2
    return middle.masked_fill(unsolvable, math.nan)
