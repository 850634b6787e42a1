"""The k + 1 column potentials of the sorted top-k plan, and the derivative of the plan.

The anchors are k, k-1, ..., 1 for the ranks 1 ... k, and 0 for all other elements (paper, section 4).

**Start at the hard solution.**  Between two neighbouring ranks the hard assignment switches at the
midpoint ``m_l`` of the l-th and (l+1)-th largest score.  Rank l is better than rank l + 1 by

    L_il - L_i,l+1 = d_il,        d_il = 2 (x_i - m_l) / epsilon.

With these logits the hard solution has the potentials zeta = 0, and at any epsilon zeta is a correction of the
size of a logarithm of n: Newton's method starts close.  As d_il grows with l, the logits
relative to the best rank of a row are sums of numbers of one sign,

    L_ij - max_l L_il = sum_(l >= j) min(d_il, 0) - sum_(l < j) max(d_il, 0),

in which nothing cancels, however small epsilon is.

**Only what is near the ranks is solved for.**  The share that an element has in all ranks together is
at most ``k exp(d_ik + max_l zeta_l - zeta_(k+1))``: elements far enough below the last midpoint have none.

**Memory.**  The plan is never held as a whole: the solver needs sums over elements only, and the backward
pass computes it again, piece by piece.  Tensors are laid out (..., rank, element), so that every pass is
contiguous, and logits are in bits, as powers of 2 take half the time of powers of e.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from .problem import Problem, apply, batch_first, check_contents, check_epsilon, require, watched
from .ranking import rank
from .residual import warn_residual
from .semidual import as_laplacian, solve_laplacian, solve_potentials
from .transport import NEWTON_STEPS, NEWTON_TOLERANCE

# Numbers in a piece of the plan: small enough for a cache.
PIECE = 2**15
# zeta_l - zeta_(k+1) is assumed to be below this when far elements are left out, and looked at afterwards.
SLACK = 15.0


def rank_weights(problem: Problem, dtype: torch.dtype, max_iter: int | None, tol: float | None) -> Tensor:
    """Solves a problem; the weights (..., k, n) are differentiable, twice, in scores and epsilon.

    Args:
        problem: at least one problem with at least one rank, in float64.
        dtype: of the weights.
        max_iter: Newton steps at most.
        tol: the error of a rank's sum that is tolerated.
    """
    weights, *_ = apply(
        _Ranks,
        _solve_opaque,
        problem.scores,
        problem.epsilon,
        problem.k,
        dtype,
        max_iter or NEWTON_STEPS,
        tol or NEWTON_TOLERANCE,
        problem.check,
    )
    return weights


class _Ranks(torch.autograd.Function):
    """Implicit differentiation of the column sums (paper, Theorem 3 and Algorithm 4).

    A gradient G of the plan becomes ``P * (W - sum_j P_ij W_ij)`` for the logits, with W = G - u and
    ``H u = sum_i P_i * (G_i - sum_j P_ij G_ij)``; and ``dL_ij = 2 b_j dx_i / epsilon`` with the anchors b.
    """

    @staticmethod
    def forward(
        scores: Tensor, epsilon: Tensor, k: int, dtype: torch.dtype, max_iter: int, tol: float, check: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        solver = _solve_opaque if torch.compiler.is_compiling() else _solve
        return solver(scores, epsilon, k, dtype, max_iter, tol, check)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, zeta, middle = output
        ctx.mark_non_differentiable(middle)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], zeta, middle)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scores, epsilon, zeta, middle = ctx.saved_tensors
        for_weights, for_zeta, _ = grads
        near, traced = None, torch.is_grad_enabled() or torch.compiler.is_compiling()
        if for_weights is not None and watched(scores) and not traced:
            slack = float((zeta[..., :-1].amax(-1) - zeta[..., -1]).amax())
            near = _near(scores, middle, 2 / epsilon, slack, for_weights.dtype)
        if for_weights is None or near is None:
            for_scores, for_epsilon = _vjp(scores, epsilon, zeta, middle, for_weights, for_zeta)
        else:
            close = for_weights.gather(-1, near.unsqueeze(-2).expand(*for_weights.shape[:-1], -1))
            found, for_epsilon = _vjp(scores.gather(-1, near), epsilon, zeta, middle, close, for_zeta)
            for_scores = torch.zeros_like(scores).scatter(-1, near, found)
        return for_scores, for_epsilon.sum_to_size(epsilon.shape), None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _Ranks.apply(*batch_first(info, in_dims, arguments))  # type: ignore[no-untyped-call]
        return outputs, (0,) * len(outputs)


def _vjp(
    scores: Tensor,
    epsilon: Tensor,
    zeta: Tensor,
    middle: Tensor,
    for_weights: Tensor | None,
    for_zeta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of scores (..., n) and epsilon (..., 1) from those of weights and zeta.

    When a graph of this is asked for, the plan is one piece.
    """
    slope = 2 / epsilon
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
    pieces = [(0, scores.size(-1))] if whole else list(_pieces(scores, zeta.size(-1)))

    def look(piece: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        logits = _logits(scores.narrow(-1, *piece), middle, slope)
        plan = _plan(logits, zeta)[0]
        if for_weights is None:
            return logits, plan, torch.zeros_like(plan)
        return (
            logits,
            plan,
            torch.nn.functional.pad(for_weights.narrow(-1, *piece).to(plan.dtype), (0, 0, 0, 1)),
        )

    only = look(pieces[0]) if len(pieces) == 1 else None
    pulled, products = torch.zeros_like(zeta), torch.zeros_like(zeta.unsqueeze(-1) * zeta.unsqueeze(-2))
    for piece in pieces:
        _, plan, incoming = only or look(piece)
        pulled = pulled + _through_softmax(plan, incoming).sum(-1)
        products = products + plan @ plan.transpose(-1, -2)
    pulled = pulled if for_zeta is None else pulled + for_zeta
    multiplier = solve_laplacian(as_laplacian(products), pulled).unsqueeze(-1)

    anchors = torch.arange(zeta.size(-1) - 1, -1, -1, dtype=scores.dtype, device=scores.device)
    for_scores, for_epsilon = [], torch.zeros_like(epsilon)
    for piece in pieces:
        logits, plan, incoming = only or look(piece)
        for_logits = _through_softmax(plan, incoming - multiplier)
        for_scores.append((for_logits * anchors.unsqueeze(-1)).sum(-2) * slope)
        if epsilon.requires_grad:  # logits are proportional to 1 / epsilon; where one is infinite nothing moves
            finite = logits.masked_fill(logits.isinf(), 0.0)
            lost = (for_logits * finite).sum((-1, -2)).unsqueeze(-1) * math.log(2)
            for_epsilon = for_epsilon - lost / epsilon
    return torch.cat(for_scores, dim=-1), for_epsilon


def _through_softmax(plan: Tensor, grad: Tensor) -> Tensor:
    return plan * (grad - (plan * grad).sum(-2, keepdim=True))


def _solve(
    scores: Tensor, epsilon: Tensor, k: int, dtype: torch.dtype, max_iter: int, tol: float, check: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (..., k, n), zeta (..., k + 1) and the midpoints (..., k)."""
    if check:
        check_epsilon(epsilon)
    slope = 2 / epsilon
    middle = _midpoints(scores, k)
    weights = torch.zeros(*scores.shape[:-1], k, scores.size(-1), dtype=dtype, device=scores.device)
    for near in (_near(scores, middle, slope, SLACK, dtype), None):
        close = scores if near is None else scores.gather(-1, near)
        pieces = list(_pieces(close, k + 1))
        logits = [_logits(close.narrow(-1, *piece), middle, slope) for piece in pieces]
        zeta = _potentials(logits, max_iter, tol)
        if near is None or float((zeta[..., :-1].amax(-1) - zeta[..., -1]).amax()) <= SLACK:
            break
    for piece, part in zip(pieces, logits, strict=True):
        plan = _plan(part, zeta)[0][..., :-1, :].to(dtype)
        if near is None:
            weights.narrow(-1, *piece).copy_(plan)
        else:
            weights.scatter_(-1, near.narrow(-1, *piece).unsqueeze(-2).expand_as(plan), plan)
    return weights, zeta, middle


def _midpoints(scores: Tensor, k: int) -> Tensor:
    """The k midpoints below each rank, (..., k); ``-inf`` below the last element that is not masked."""
    ranked, _ = rank(scores, min(k + 1, scores.size(-1)))
    if ranked.size(-1) == k:
        ranked = torch.nn.functional.pad(ranked, (0, 1), value=-math.inf)

    def complain() -> NoReturn:
        check_contents(scores, k)

    require((ranked[..., 0] < math.inf) & (ranked[..., k - 1] > -math.inf), complain)
    return ranked[..., :-1] / 2 + ranked[..., 1:] / 2


def _near(scores: Tensor, middle: Tensor, slope: Tensor, slack: float, dtype: torch.dtype) -> Tensor | None:
    """The positions (..., w) of all elements that have something of a rank, or None where they are not few.

    Args:
        scores: (..., n).
        middle: (..., k).
        slope: (..., 1).
        slack: the largest zeta_l - zeta_(k+1).
        dtype: in whose last place a weight of less than all left out is nothing.
    """
    if not watched(scores):
        return None  # the number of them decides a shape, and the host must not wait for it
    n, k = scores.size(-1), middle.size(-1)
    reach = math.log(n * k / torch.finfo(dtype).eps) + slack
    width = max(k + 1, int((scores > middle[..., -1:] - reach / slope).sum(-1).amax()))
    return scores.topk(width, dim=-1, sorted=False).indices if 4 * width < n else None


def _potentials(logits: list[Tensor], max_iter: int, tol: float) -> Tensor:
    """The potentials (..., k + 1) at which every rank's sum is 1, from those of the hard solution.

    Args:
        logits: pieces (..., k + 1, length) of the elements.
        max_iter: Newton steps at most.
        tol: the error of a rank's sum that is tolerated.
    """
    n = sum(piece.size(-1) for piece in logits)
    start = torch.zeros_like(logits[0][..., 0])

    def measure(zeta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, sums = torch.zeros_like(zeta[..., 0]), torch.zeros_like(zeta)
        products = torch.zeros_like(zeta.unsqueeze(-1) * zeta.unsqueeze(-2))
        for piece in logits:
            plan, norm = _plan(piece, zeta)
            value -= norm.log().sum(-1)
            sums += plan.sum(-1)
            products += plan @ plan.transpose(-1, -2)
        return value, sums, as_laplacian(products)

    col_mass = torch.ones_like(start)
    col_mass[..., -1] = n - start.size(-1) + 1
    solution = solve_potentials(measure, col_mass, start, n, max_iter, tol)
    if watched(start) and not bool((solution.residual <= tol).all()):
        warn_residual(float(solution.residual.amax()), solution.iterations)
    return solution.zeta


def _pieces(scores: Tensor, columns: int) -> Iterator[tuple[int, int]]:
    """Starts and lengths of pieces of the elements, whose plans (..., columns, length) fit in a cache."""
    n = scores.size(-1)
    length = max(64, PIECE * n // max(1, scores.numel() * columns))
    return ((first, min(length, n - first)) for first in range(0, n, length))


def _logits(scores: Tensor, middle: Tensor, slope: Tensor) -> Tensor:
    """How much worse each rank is than the best of its element, (..., k + 1, n), at most 0, in bits."""
    bits = slope.unsqueeze(-1) / math.log(2)
    # The difference of two infinities is a masked element where only masked ones are left: it has no rank.
    distance = (scores.unsqueeze(-2) - middle.unsqueeze(-1)).nan_to_num(nan=torch.finfo(scores.dtype).min)
    steps = distance * bits  # d, (..., k, n)
    above = steps.clamp(max=0.0).flip(-2).cumsum(-2).flip(-2)
    below = steps.clamp(min=0.0).cumsum(-2)
    pad = torch.nn.functional.pad
    return pad(above, (0, 0, 0, 1)) - pad(below, (0, 0, 1, 0))


def _plan(logits: Tensor, zeta: Tensor) -> tuple[Tensor, Tensor]:
    """The plan (..., k + 1, n), whose columns sum to 1, and the sums (..., n) that it was divided by."""
    kernel = (logits + zeta.unsqueeze(-1) / math.log(2)).exp2()
    norm = kernel.sum(-2)
    return kernel / norm.unsqueeze(-2), norm


@torch.library.custom_op("fairseq_softtopk::ranks", mutates_args=())
def _solve_opaque(
    scores: Tensor, epsilon: Tensor, k: int, dtype: torch.dtype, max_iter: int, tol: float, check: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_solve` as one node of a compiled graph, which cannot look into a loop that depends on data."""
    return _solve(scores, epsilon, k, dtype, max_iter, tol, check)


@_solve_opaque.register_fake
def _(
    scores: Tensor, epsilon: Tensor, k: int, dtype: torch.dtype, max_iter: int, tol: float, check: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = scores.shape[:-1], scores.size(-1)
    weights = scores.new_empty(*batch, k, n, dtype=dtype)
    return weights, scores.new_empty(*batch, k + 1), scores.new_empty(*batch, k)


# For exported programs, in which only the operator is left.
_solve_opaque.register_autograd(_Ranks.backward, setup_context=_Ranks.setup_context)
