"""The sorted SOFT top-k operator: scores -> how much element i has rank l."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import in_order, prepare, whole
from .ranks import rank_weights
from .threshold import threshold
from .transport import plan_by_sinkhorn


def sorted_soft_topk(
    scores: Tensor,
    k: int,
    *,
    epsilon: float | Tensor = 0.1,
    dim: int = -1,
    largest: bool = True,
    hard: bool = False,
    cost_scale: str = "none",
    solver: str = "newton",
    max_iter: int | None = None,
    tol: float | None = None,
) -> Tensor:
    r"""Relaxes the permutation matrix of the sorted top-k: ``one_hot(scores.topk(k).indices, n).T``.

    The weights A are the first k columns of the plan that solves (paper, eq. 7)

    .. math::
        \min_{P \ge 0} \sum_{ij} C_{ij} P_{ij} + \epsilon \sum_{ij} P_{ij} \ln P_{ij}, \quad
        C_{ij} = (x_i - b_j)^2, \; b = (k, \dots, 1, 0), \quad P \mathbf 1 = \mathbf 1, \;
        \mathbf 1^\top P = (1, \dots, 1, n - k),

    exactly, at every epsilon.  It is solved in float64; gradients, of any order, come from implicit
    differentiation (paper, Algorithm 4), and memory does not grow with the number of solver steps.

    Args:
        scores: any shape, floating point; not modified.  ``-inf`` (``+inf`` for the smallest)
            means "never": weight exactly 0, gradient exactly 0, no influence on the others.
        k: how many ranks, in [0, n].
        epsilon: entropic weight, in units of score x anchor distance, after the scaling below; a number, or a
            tensor with one per problem, of the shape of ``scores`` without ``dim`` or broadcasting to it.
        dim: the dimension to select from.
        largest: rank 1 is the largest score, or the smallest.
        hard: return the permutation matrix itself, with the ties of ``torch.topk``, and the gradient of the
            soft weights (straight-through).
        cost_scale: ``"none"``, ``"max"`` or ``"batch_max"``, see :func:`soft_topk`.
        solver: ``"newton"``, ``"sinkhorn"`` or ``"sinkhorn_log"``, see :func:`soft_topk`.
        max_iter: steps at most; by default 100 for Newton's method, 200 for Sinkhorn's.
        tol: the relative error of a marginal at which the solver stops and is content; by default 1e-9 for
            Newton's method; Sinkhorn's takes all its steps, and is content with 1e-3.

    Returns:
        Weights in [0, 1] of the dtype of ``scores`` and its shape with ``dim`` moved last, + (k,):
        entry [..., i, l] says how much element i has rank l + 1.  Each rank sums to 1 over the elements;
        each element to at most 1 over the ranks.

    Raises:
        ValueError: if an argument is out of range, scores hold NaN or the opposite infinity, or
            fewer than k of them are not masked; on an accelerator see :func:`soft_topk`.

    Warns:
        RuntimeWarning: if the solver stopped before it was content, with the residual.
    """
    if isinstance(k, Tensor):
        raise ValueError(f"k must be an int here, one for all problems, got a tensor: {k}")
    k = whole(k)
    dtype = scores.dtype if solver != "newton" and scores.dtype.itemsize >= 4 else torch.float64
    problem = prepare(scores, k, k + 1, epsilon, dim, largest, cost_scale, solver, max_iter, tol, dtype)
    k = problem.k
    if problem.scores.numel() == 0:
        nothing = problem.scores * problem.epsilon.sum()  # so that both are in the graph
        return nothing.unsqueeze(-1).expand(*problem.scores.shape, k).to(scores.dtype)
    if k == 0:  # nothing, after the same checks
        return threshold(problem, max_iter, tol).weights.unsqueeze(-1)[..., :0].to(scores.dtype)
    if solver == "newton":
        weights = rank_weights(problem, scores.dtype, max_iter, tol).transpose(-1, -2)
    else:
        weights = plan_by_sinkhorn(problem, k + 1, largest, solver, max_iter, tol)[..., :k]
    if hard:
        order = in_order(scores, dim, largest).to(dtype).topk(k).indices.unsqueeze(-2)
        weights = torch.zeros_like(weights).scatter(-2, order, 1.0) + (weights - weights.detach())
    return weights.to(scores.dtype)
