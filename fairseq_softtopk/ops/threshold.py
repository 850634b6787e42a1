"""The one unknown of the top-k plan, and the derivative of the weights that follow from it.

With the two anchors "selected" and "not selected" the row constraints make every row of the plan
a softmax over two anchors, that is, a sigmoid:

    A_i = sigmoid(z_i + t),    z_i = 2 x_i / epsilon,    t the root of  sum_i A_i = k.

**The equation.**  Split the elements into the k largest ("top") and the others ("rest").  The sum is k
when what rest has equals what top lacks, and we solve that equation between logarithms:

    g(t) = ln sum_rest A_i - ln sum_top (1 - A_i) = 0.

**Its slope** is the weighted mean of 1 - A over rest plus the weighted mean of A over top.  As A is
larger on top than on rest, the slope lies between 1 and 2, whatever the scores, n, k and epsilon are, and
as each term is a variance minus a mean of A (1 - A), it changes by at most 1/2 per unit of t.  Hence
|t - root| <= |g(t)|, and a step of Newton's method leaves at most g(t)^2 / 4 of it: an error
bound at no cost, with which the method never moves away from the root.

**Small epsilon.**  Measure every element from the edge of its own side, u_i = exp(|z_i - edge|) >= 1, and
the threshold from the middle of the gap between the edges, t = ln y - middle.  With q = exp(-gap / 2)

    rest:      A_i = p v_i,    1 - A_i = u_i v_i,    v_i = 1 / (u_i + p),    p = q y,
    top:   1 - A_i = r v_i,        A_i = u_i v_i,    v_i = 1 / (u_i + r),    r = q / y,

so that the equation is ``y sum_rest v_i = sum_top v_i / y``: no exponential in the loop, and nothing in it
cancels, over- or underflows, however small epsilon makes q.  float32 suffices, also for the smallest weights
and for their gradient, as A and 1 - A are known apart from each other.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .problem import (
    Problem,
    apply,
    batch_first,
    check_contents,
    check_epsilon,
    distances,
    refuse_k,
    require,
    watched,
)
from .ranking import rank
from .residual import warn_residual

MAX_ITER = 50
# Where the host must not wait for the device, this many steps are taken and none is looked at.
BLIND_STEPS = 10


class Threshold(NamedTuple):
    """The solution of a batch of problems.

    Attributes:
        weights: A, (..., n).
        variance: A (1 - A) / p, (..., n), never rounded to nothing next to the threshold, even where A is hard
            to the last bit.
        odds: p, (..., 1), A / (1 - A) of the largest score of rest; 0 where all or nothing is selected.
        origin: (..., 1), the largest score of rest.
        shift: (..., 1), such that ``A_i = sigmoid(2 (x_i - origin) / epsilon + shift)``.
    """

    weights: Tensor
    variance: Tensor
    odds: Tensor
    origin: Tensor
    shift: Tensor


def threshold(problem: Problem, max_iter: int | None, tol: float | None) -> Threshold:
    """Solves a problem; ``weights`` and ``shift`` are differentiable, twice, in scores and epsilon.

    Args:
        problem: at least one problem of at least one element.
        max_iter: Newton steps at most.
        tol: the error of ``sum_i A_i``, relative to k, that is tolerated.
    """
    tol = 4 * torch.finfo(problem.scores.dtype).eps if tol is None else tol
    arguments = (
        problem.scores,
        problem.epsilon,
        problem.counts,
        problem.k,
        max_iter or MAX_ITER,
        tol,
        problem.check,
    )
    return Threshold(*apply(_Threshold, _solve_opaque, *arguments))


class _Threshold(torch.autograd.Function):
    """Implicit differentiation of ``sum_i A_i = k`` (for two anchors, the paper's Theorem 3 and Algorithm 3).

    With the variance s_i = A_i (1 - A_i) / p and w_i = s_i / sum_j s_j,

        dA_i = p s_i (dz_i + dt),        ds_i = (1 - 2 A_i) s_i (dz_i + dt),        dt = -sum_i w_i dz_i,

    p held fixed: what uses s multiplies by p, or cancels it as w does, which is 0 / 0 only where every element
    is masked.
    """

    @staticmethod
    def forward(
        scores: Tensor, epsilon: Tensor, counts: Tensor | None, k: int, max_iter: int, tol: float, check: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        solver = _solve_opaque if torch.compiler.is_compiling() else _solve
        return solver(scores, epsilon, counts, k, max_iter, tol, check)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scores, epsilon = inputs[:2]
        weights, variance, odds, origin, _ = output
        ctx.mark_non_differentiable(odds, origin)
        ctx.set_materialize_grads(False)
        # The scores are only needed for the gradient of epsilon.
        scores = scores if epsilon.requires_grad else None
        ctx.save_for_backward(weights, variance, odds, origin, epsilon, scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, variance, odds, origin, epsilon, scores = ctx.saved_tensors
        for_weights, for_variance, _, _, for_shift = grads
        total = variance.sum(-1, keepdim=True).clamp(min=torch.finfo(variance.dtype).tiny)
        if torch.is_grad_enabled() or for_weights is None or for_variance is not None or for_shift is not None:
            incoming = torch.zeros_like(variance) if for_weights is None else odds * for_weights
            incoming = incoming if for_variance is None else incoming + (1 - 2 * weights) * for_variance
            pulled = (variance * incoming).sum(-1, keepdim=True)
            pulled = pulled if for_shift is None else pulled + for_shift
            for_scores = (incoming - pulled / total) * variance * (2 / epsilon)
        else:  # the same, in little memory
            mean = (variance * for_weights).sum(-1, keepdim=True) / total
            slope = (odds * (2 / epsilon)).clamp(max=torch.finfo(variance.dtype).max)
            for_scores = (for_weights - mean).mul_(variance).mul_(slope)
        for_epsilon = None
        if scores is not None:
            # dz_i = -z_i depsilon / epsilon; the sum over the dimensions that epsilon was broadcast along
            distance = distances(scores, origin)
            for_epsilon = (-for_scores * distance / epsilon).sum_to_size(epsilon.shape)
        return for_scores, for_epsilon, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _Threshold.apply(*batch_first(info, in_dims, arguments))  # type: ignore[no-untyped-call]
        return outputs, (0,) * len(outputs)


def _solve(
    scores: Tensor, epsilon: Tensor, counts: Tensor | None, k: int, max_iter: int, tol: float, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`Threshold`."""
    if check:
        check_epsilon(epsilon)
    edges = _split(scores, counts, k)
    log2_slope = (2 / math.log(2)) / epsilon

    # From here on, everything is measured from the edge of its own side.
    rest = torch.sub(edges.outside, scores).mul_(log2_slope).exp2_()
    edges.write(rest, math.inf)
    top = (edges.top - edges.inside).mul_(log2_slope).exp2_()
    # An eighth, so that the slopes of log_soft_topk, a quarter at most, still tell the sides apart.
    half_gap = ((edges.inside - edges.outside) / epsilon).clamp(max=torch.finfo(scores.dtype).max / 8)
    q = (-half_gap).exp()
    if edges.stuck is not None:
        q = q.masked_fill(edges.stuck != 0, 0.0)

    # No pass below allocates: for large n, memory that is fresh costs more than what is computed in it.
    buffer = torch.empty_like(rest)
    y, solved = _balance(rest, top, q, edges.stuck, max_iter, tol, buffer)
    p, r = q * y, q / y
    lacking = torch.div(p, rest, out=buffer).add_(1).reciprocal_()  # 1 - A
    v = torch.div(lacking, rest, out=rest)
    variance, weights = lacking.mul_(v), v.mul_(p)
    selected = (r / top).add_(1).reciprocal_()  # A
    edges.write(weights, selected)
    edges.write(variance, selected / top * selected / (y * y))
    if not solved:
        wanted = torch.as_tensor(k if counts is None else counts, device=scores.device)
        error = (weights.sum(-1, keepdim=True) - wanted).abs() / wanted.clamp(min=1)
        residual = float(error.amax())
        if residual > max(tol, 64 * torch.finfo(weights.dtype).eps):
            warn_residual(residual, max_iter)
    shift = y.log() - half_gap
    if edges.stuck is not None:
        shift = torch.where(edges.stuck == 0, shift, edges.stuck)
    return weights, variance, p, edges.outside.clone(), shift


class _Edges(NamedTuple):
    """Where top ends and rest begins.

    Attributes:
        top: (..., k), the scores of top, ``inf`` in the columns that a problem with a smaller k has not.
        where: (..., k), their positions.
        is_top: None if every problem has the same k, else (..., k): which columns belong to top.
        inside: (..., 1), the smallest score of top.
        outside: (..., 1), the largest score of rest.
        stuck: None, or (..., 1): ``inf`` where everything is selected, ``-inf`` where nothing is, else 0.
    """

    top: Tensor
    where: Tensor
    is_top: Tensor | None
    inside: Tensor
    outside: Tensor
    stuck: Tensor | None

    def write(self, target: Tensor, values: Tensor | float) -> None:
        """Puts values (..., k) or one number at the positions of top in a target (..., n)."""
        if self.is_top is None:
            target.scatter_(-1, self.where, values)
        else:
            values = torch.where(self.is_top, values, target.gather(-1, self.where))
            target.scatter_(-1, self.where, values)


def _split(scores: Tensor, counts: Tensor | None, k: int) -> _Edges:
    """Finds the edges; an error where the scores cannot be split."""
    n = scores.size(-1)
    if counts is None and 0 < k < n:
        ranked, where = rank(scores, k + 1)
        top, inside, outside = ranked[..., :k], ranked[..., k - 1 : k], ranked[..., k:]
        finite = watched(scores) and float(outside.amin()) > -math.inf
        if finite and float(ranked[..., 0].amax()) < math.inf:
            return _Edges(top, where[..., :k], None, inside, outside, None)
        is_top, counts = None, torch.full((), k, device=scores.device)
    else:
        if counts is None:
            counts = torch.full((), k, device=scores.device)
        else:
            k = _largest_count(counts, n)
        counts = counts.expand(*scores.shape[:-1], 1)
        ranked, where = rank(scores, min(k + 1, n))
        if k == n:
            ranked = torch.nn.functional.pad(ranked, (0, 1), value=-math.inf)
        is_top = torch.arange(k, device=scores.device) < counts
        top = ranked[..., :k].masked_fill(~is_top, math.inf)
        inside, outside = ranked.gather(-1, (counts - 1).clamp(min=0)), ranked.gather(-1, counts)

    def complain() -> NoReturn:
        check_contents(scores, counts)

    require((ranked[..., :1] < math.inf) & ((inside > -math.inf) | (counts == 0)), complain)
    stuck = torch.zeros_like(inside).masked_fill(outside == -math.inf, math.inf)
    stuck = stuck.masked_fill(counts == 0, -math.inf)
    inside = inside.masked_fill(inside == -math.inf, 0.0)
    outside = torch.where(stuck == 0, outside, inside)
    return _Edges(top, where[..., :k], is_top, inside, outside, stuck)


def _largest_count(counts: Tensor, n: int) -> int:
    """The largest k of a batch; the one number that is always read, as it decides a shape."""
    smallest, largest = int(counts.amin()), int(counts.amax())
    if not 0 <= smallest <= largest <= n:
        refuse_k(smallest if smallest < 0 else largest, n)
    return largest


def _balance(
    rest: Tensor, top: Tensor, q: Tensor, stuck: Tensor | None, max_iter: int, tol: float, buffer: Tensor
) -> tuple[Tensor, bool]:
    """The y, (..., 1), at which rest has what top lacks, by Newton's method in ln y; False if it is not found.

    Args:
        rest: (..., n), the u of rest, ``inf`` where an element is not of rest.
        top: (..., k), the u of top.
        q: (..., 1).
        stuck: see :class:`_Edges`.
        max_iter: Newton steps at most.
        tol: the error that may remain in ln y.
        buffer: (..., n), overwritten.
    """

    def look(y: Tensor) -> tuple[Tensor, Tensor]:
        """What top lacks, over what rest has; and the slope of its logarithm, negated."""
        p, r = q * y, q / y
        v = torch.add(rest, p, out=buffer).reciprocal_()
        has, has_squares = v.sum(-1, keepdim=True), torch.linalg.vector_norm(v, dim=-1, keepdim=True).square_()
        v = (top + r).reciprocal_()
        lacks, lacks_squares = v.sum(-1, keepdim=True), v.square_().sum(-1, keepdim=True)
        slope = 2 - p.mul_(has_squares).div_(has) - r.mul_(lacks_squares).div_(lacks)
        ratio = lacks.div_(has).div_(y).div_(y)
        return (ratio if stuck is None else ratio.masked_fill(stuck != 0, 1.0)), slope

    # A step from here leaves an error of at most error^2 / 4.
    enough = 2 * math.sqrt(tol)
    y = torch.ones_like(q)
    for _ in range(max_iter if watched(rest) else min(max_iter, BLIND_STEPS)):
        ratio, slope = look(y)
        y = y * ratio.pow(slope.reciprocal_())
        if watched(rest):
            low, high = torch.aminmax(ratio)
            if float(low) >= 1 - enough and float(high) <= 1 + enough:
                return y, True
    return y, not watched(rest)


@torch.library.custom_op("fairseq_softtopk::threshold", mutates_args=())
def _solve_opaque(
    scores: Tensor, epsilon: Tensor, counts: Tensor | None, k: int, max_iter: int, tol: float, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`_solve` as one node of a compiled graph, which cannot look into a loop that depends on data."""
    return _solve(scores.contiguous(), epsilon, counts, k, max_iter, tol, check)


@_solve_opaque.register_fake
def _(
    scores: Tensor, epsilon: Tensor, counts: Tensor | None, k: int, max_iter: int, tol: float, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_problem = scores.new_empty(*scores.shape[:-1], 1)
    like = torch.empty_like(scores, memory_format=torch.contiguous_format)
    return (
        like,
        torch.empty_like(like),
        per_problem,
        torch.empty_like(per_problem),
        torch.empty_like(per_problem),
    )


# For exported programs, in which only the operator is left.
_solve_opaque.register_autograd(_Threshold.backward, setup_context=_Threshold.setup_context)
