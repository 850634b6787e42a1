"""The SOFT top-k operator: scores -> one weight per element, summing to k.

With the two anchors "selected" and "not selected" the transport plan has one unknown.  The row
constraints make every row a softmax over two anchors, that is, a sigmoid:

    A_i = sigmoid(z_i + t),    z_i = 2 x_i / epsilon,    t the root of  sum_i A_i = k.

**The root.**  Split the elements into the k largest ("top") and the others ("rest").  The sum is k
when what rest has equals what top lacks, and we solve that equation between logarithms:

    g(t) = ln sum_rest sigmoid(z_i + t) - ln sum_top sigmoid(-z_i - t) = 0.

Its slope is the weighted mean of 1 - A over rest plus the weighted mean of A over top.  As A is
larger on top than on rest, the slope lies between 1 and 2 whatever the scores, n, k and epsilon are.
Hence |t - root| <= |g(t)|, an error bound at no cost; Newton's method never moves away from
the root and converges quadratically; and nothing cancels or underflows at small epsilon.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Problem, check_contents, prepare

MAX_ITER = 50


def soft_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    epsilon: float | Tensor = 0.1,
    dim: int = -1,
    largest: bool = True,
    cost_scale: str = "none",
) -> Tensor:
    r"""Relaxes the indicator of the k largest scores: ``zeros.scatter(dim, scores.topk(k).indices, 1)``.

    The weights A solve the entropic optimal transport problem (paper, eq. 4 and Algorithm 1)

    .. math::
        \min_{P \ge 0} \sum_{ij} C_{ij} P_{ij} + \epsilon \sum_{ij} P_{ij} \ln P_{ij}, \quad
        C_{ij} = (x_i - b_j)^2, \; b = (1, 0), \quad P \mathbf 1 = \mathbf 1, \;
        \mathbf 1^\top P = (k, n - k), \quad A = P_{:,0},

    exactly, at every epsilon.  A tends to the hard indicator as epsilon -> 0 (tied scores share
    equally) and to k/n as epsilon -> infinity.  Gradients come from implicit differentiation.

    Args:
        scores: any shape, floating point; not modified.  ``-inf`` (``+inf`` for the smallest)
            means "never": weight exactly 0, gradient exactly 0, no influence on the others.
        k: how many to select, in [0, n]; or an integer tensor with one k per problem, of the
            shape of ``scores`` without ``dim``.
        epsilon: entropic weight, in units of score x anchor distance, after the scaling below.
        dim: the dimension to select from.
        largest: select the largest scores, or the smallest.
        cost_scale: ``"none"``: the result does not change when a constant is added to the scores;
            ``"max"``: divide C by its maximum over each problem, so that epsilon has no unit;
            ``"batch_max"``: by its maximum over the whole batch, as the paper's code does, which
            makes every row depend on the others.  The scale is a constant to the gradient.

    Returns:
        Weights in [0, 1], of the shape and dtype of ``scores``; they sum to k along ``dim``.

    Raises:
        ValueError: if an argument is out of range, scores hold NaN or the opposite infinity, or
            fewer than k of them are not masked.

    Note:
        The gradient may be 1 / (2 epsilon) times the incoming one: float16 ends at 65504.
    """
    exponent = _exponent(scores, k, epsilon, dim, largest, cost_scale)
    return torch.sigmoid(exponent).to(scores.dtype).movedim(-1, dim)


def log_soft_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    epsilon: float | Tensor = 0.1,
    dim: int = -1,
    largest: bool = True,
    cost_scale: str = "none",
) -> Tensor:
    """The logarithm of :func:`soft_topk`, accurate where the weight itself underflows to 0.

    Takes the arguments of :func:`soft_topk`, raises what it raises, and returns ``ln A`` (nats),
    computed as the log-sigmoid of the solver's exponent; ``-inf`` at masked entries.
    """
    exponent = _exponent(scores, k, epsilon, dim, largest, cost_scale)
    return F.logsigmoid(exponent).to(scores.dtype).movedim(-1, dim)


def _exponent(
    scores: Tensor,
    k: int | Tensor,
    epsilon: float | Tensor,
    dim: int,
    largest: bool,
    cost_scale: str,
) -> Tensor:
    """The solved exponents ``z + t``, (..., n): A is their sigmoid."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    problem = prepare(scores, 2, epsilon, dim, largest, cost_scale, dtype)
    count = _as_count(k, problem.scores)
    if problem.scores.numel() == 0:
        return problem.scores
    top, origin = _split(problem, count)
    z = problem.slopes(origin).masked_fill(~problem.alive, -math.inf)
    shift: Tensor = _Shift.apply(z, top, problem, count)  # type: ignore[no-untyped-call]
    z = z.masked_fill(shift.isinf(), 0.0)  # all or nothing is selected, and nothing can move
    return (z + shift).masked_fill(~problem.alive, -math.inf)


def _as_count(k: int | Tensor, scores: Tensor) -> Tensor:
    """K as an integer tensor that broadcasts against scores (..., n)."""
    n = scores.size(-1)
    if isinstance(k, Tensor) and (k.is_floating_point() or k.is_complex()):
        raise ValueError(f"k must be an integer, got a tensor of {k.dtype}")
    if not isinstance(k, Tensor) and int(k) != k:
        raise ValueError(f"k must be an integer, got {k}")
    count = torch.as_tensor(k, device=scores.device).to(torch.long)
    if count.dim() and count.shape != scores.shape[:-1]:
        raise ValueError(
            f"k must be one number or one per problem, {tuple(scores.shape[:-1])}, got {tuple(count.shape)}"
        )
    if count.numel() and not 0 <= int(count.min()) <= int(count.max()) <= n:
        wrong = int(count.min()) if int(count.min()) < 0 else int(count.max())
        raise ValueError(f"k must lie in [0, {n}], the number of scores, got {wrong}")
    return count.unsqueeze(-1) if count.dim() else count.reshape(1)


def _split(problem: Problem, count: Tensor) -> tuple[Tensor, Tensor]:
    """The mask of the top elements (..., n), and an origin (..., 1) next to the threshold.

    Where there is nothing to solve (NaN, the wrong infinity, too few elements left) the origin is
    NaN, and so is every residual: the solver finds out when it looks at the residual anyway.
    """
    scores, n = problem.scores.detach(), problem.scores.size(-1)
    count = count.expand(*scores.shape[:-1], 1)
    ranked = scores.topk(min(int(count.max()) + 1, n), dim=-1)
    selected = torch.arange(ranked.values.size(-1), device=scores.device) < count
    top = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked.indices, selected)
    largest, origin = ranked.values[..., :1], ranked.values.gather(-1, (count - 1).clamp(min=0))
    unsolvable = ~(largest < math.inf) | ((origin == -math.inf) & (count > 0))
    return top, origin.masked_fill(unsolvable, math.nan)


class _Shift(torch.autograd.Function):
    """The number t, one per problem, for which the sigmoids of ``z + t`` sum to k.

    Differentiating ``sum_i sigmoid(z_i + t) = k`` gives ``dt = -sum_i w_i dz_i`` with
    ``w_i = A_i (1 - A_i) / sum_j A_j (1 - A_j)`` (for two anchors, the paper's Theorem 3 and Algorithm 3).  The
    weights are a softmax of ``ln A + ln(1 - A)``: at small epsilon the quotient would be 0 / 0.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, top: Tensor, problem: Problem, count: Tensor) -> Tensor:
        shift = _solve(z, top, problem, count)
        ctx.save_for_backward(z, shift)
        return shift

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        z, shift = ctx.saved_tensors
        # Where t is infinite all or nothing is selected, and nothing can move.
        exponent = z + shift.masked_fill(shift.isinf(), 0.0)
        weights = torch.softmax(F.logsigmoid(exponent) + F.logsigmoid(-exponent), dim=-1)
        return (-weights * grads[0]).masked_fill(shift.isinf() | z.isinf(), 0.0), None, None, None


def _solve(z: Tensor, top: Tensor, problem: Problem, count: Tensor) -> Tensor:
    """Newton's method on g from the middle of the gap between top and rest."""
    inside = z.masked_fill(~top, math.inf).amin(-1, keepdim=True)
    outside = z.masked_fill(top, -math.inf).amax(-1, keepdim=True)
    everything = (outside == -math.inf) & (inside > -math.inf)
    nothing = (inside == math.inf) & ~outside.isnan()
    trivial = everything | nothing
    shift = (-(inside + outside) / 2).masked_fill(trivial, 0.0)
    tolerance = 16 * torch.finfo(z.dtype).eps
    for _ in range(MAX_ITER):
        error, slope = _balance(z + shift, top)
        error = error.masked_fill(trivial, 0.0)
        shift = shift - error / slope.masked_fill(trivial, 1.0)
        # After this step the error is far smaller still; relative to the shift, as that is rounded.
        if bool((error.abs() <= tolerance * shift.abs().clamp(min=1.0)).all()):
            break
    else:
        check_contents(problem.scores, problem.alive, count.squeeze(-1))
        warnings.warn(
            f"soft_topk did not converge in {MAX_ITER} Newton steps: its threshold is off by at most "
            f"{error.abs().max().item():.1e} epsilon / 2",
            RuntimeWarning,
            stacklevel=2,
        )
    return shift.masked_fill(everything, math.inf).masked_fill(nothing, -math.inf)


def _balance(exponent: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """G and its slope, (..., 1) each, at the exponents ``z + t``."""
    log_has = F.logsigmoid(exponent).masked_fill(top, -math.inf)
    log_lacks = F.logsigmoid(-exponent).masked_fill(~top, -math.inf)
    rest, missing = log_has.logsumexp(-1, keepdim=True), log_lacks.logsumexp(-1, keepdim=True)
    slope = (log_has - rest).exp() * torch.sigmoid(-exponent)
    slope = slope + (log_lacks - missing).exp() * torch.sigmoid(exponent)
    return rest - missing, slope.sum(-1, keepdim=True)
