"""The SOFT top-k operator: scores -> one weight per element, summing to k."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Problem, in_order, prepare
from .threshold import threshold
from .transport import plan_by_sinkhorn


def soft_topk(
    scores: Tensor,
    k: int | Tensor,
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
    r"""Relaxes the indicator of the k largest scores: ``zeros.scatter(dim, scores.topk(k).indices, 1)``.

    The weights A solve the entropic optimal transport problem (paper, eq. 4 and Algorithm 1)

    .. math::
        \min_{P \ge 0} \sum_{ij} C_{ij} P_{ij} + \epsilon \sum_{ij} P_{ij} \ln P_{ij}, \quad
        C_{ij} = (x_i - b_j)^2, \; b = (1, 0), \quad P \mathbf 1 = \mathbf 1, \;
        \mathbf 1^\top P = (k, n - k), \quad A = P_{:,0},

    exactly, at every epsilon.  A tends to the hard indicator as epsilon -> 0 (tied scores share
    equally) and to k/n as epsilon -> infinity.  Gradients come from implicit differentiation, in reverse mode
    and of any order.

    Args:
        scores: any shape, floating point; not modified.  ``-inf`` (``+inf`` for the smallest)
            means "never": weight exactly 0, gradient exactly 0, no influence on the others.
        k: how many to select, in [0, n]; or an integer tensor with one k per problem, of the
            shape of ``scores`` without ``dim`` or broadcasting to it.
        epsilon: entropic weight, in units of score x anchor distance, after the scaling below; a number, or a
            tensor with one per problem, like ``k``, which may require a gradient.
        dim: the dimension to select from.
        largest: select the largest scores, or the smallest.
        hard: return the 0/1 indicator itself, with the ties of ``torch.topk`` (in any order with a
            tensor of k), and the gradient of the soft weights (straight-through).
        cost_scale: ``"none"``: the result does not change when a constant is added to the scores (Sinkhorn's
            solvers, as the paper's code, round the cost of a large one);
            ``"max"``: divide C by its maximum over each problem, so that epsilon has no unit;
            ``"batch_max"``: by its maximum over the whole batch, as the paper's code does, which
            makes every row depend on the others (``torch.vmap`` shows it one problem at a time).  The scale is
            a constant to the gradient.
        solver: ``"newton"``: exact; ``"sinkhorn"``: the paper's Algorithm 1, with the gradient of its
            Algorithm 4, and ``"sinkhorn_log"``, the same in the log domain, for comparison: 200 steps are far
            from the solution at small epsilon.
        max_iter: steps at most; by default 50 (never needed) for Newton's method, 200 for Sinkhorn's.
        tol: the relative error of a marginal at which the solver stops and is content; by default 4 units in
            the last place for Newton's method; for Sinkhorn's it takes all its steps, and is content with 1e-3.

    Returns:
        Weights in [0, 1], of the shape and dtype of ``scores``; they sum to k along ``dim``.  (Where a
        Sinkhorn solver warns, one may exceed 1, by up to the residual.)

    Raises:
        ValueError: if an argument is out of range, scores hold NaN or the opposite infinity, or
            fewer than k of them are not masked.  On an accelerator, what depends on the contents of a tensor
            is an assertion on the device instead, so that the host never waits (but for a tensor of k).

    Warns:
        RuntimeWarning: if the solver stopped before it was content, with the residual (not on an
            accelerator with Newton's method, whose fixed number of steps is twice what was ever needed).

    Note:
        The gradient may be 1 / (2 epsilon) times the incoming one: float16 ends at 65504.
    """
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    problem = prepare(scores, k, 2, epsilon, dim, largest, cost_scale, solver, max_iter, tol, dtype)
    if problem.scores.numel() == 0:
        weights = problem.scores * problem.epsilon.sum()  # nothing, but both are in the graph
    elif solver == "newton":
        weights = threshold(problem, max_iter, tol).weights
    else:
        weights = plan_by_sinkhorn(problem, 2, largest, solver, max_iter, tol)[..., 0]
    if hard:
        weights = _selected(in_order(scores, dim, largest).to(dtype), problem) + (weights - weights.detach())
    return weights.to(scores.dtype).movedim(-1, dim)


def log_soft_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    epsilon: float | Tensor = 0.1,
    dim: int = -1,
    largest: bool = True,
    cost_scale: str = "none",
    max_iter: int | None = None,
    tol: float | None = None,
) -> Tensor:
    """The logarithm of :func:`soft_topk`, accurate where the weight itself underflows to 0.

    Takes the arguments of :func:`soft_topk` except ``hard`` and ``solver``, raises what it raises, and
    returns ``ln A`` (nats), the log-sigmoid of the solver's exponent; ``-inf``, with gradient 0, at masked
    entries and where k is 0.
    """
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    problem = prepare(scores, k, 2, epsilon, dim, largest, cost_scale, "newton", max_iter, tol, dtype)
    if problem.scores.numel() == 0:
        return (problem.scores * problem.epsilon.sum()).to(scores.dtype).movedim(-1, dim)
    solution = threshold(problem, max_iter, tol)
    alive = problem.scores != -math.inf
    exponent = (
        problem.slopes(solution.origin).masked_fill(~alive | solution.shift.isinf(), 0.0) + solution.shift
    )
    never = ~alive | (solution.shift == -math.inf)  # masked, or nothing is selected: no gradient either
    return F.logsigmoid(exponent).masked_fill(never, -math.inf).to(scores.dtype).movedim(-1, dim)


def _selected(scores: Tensor, problem: Problem) -> Tensor:
    """The hard indicator (..., n) of the scores of a problem."""
    counts = problem.counts
    if counts is None:
        return torch.zeros_like(scores).scatter(-1, scores.topk(problem.k).indices, 1.0)
    order = scores.topk(scores.size(-1)).indices
    chosen = torch.arange(scores.size(-1), device=scores.device) < counts
    return torch.zeros_like(scores).scatter(-1, order, chosen.expand_as(scores).to(scores.dtype))
