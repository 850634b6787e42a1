"""Other relaxations of the top-k, as published, to compare :func:`sorted_soft_topk` with.

Their weights have the form of :func:`sorted_soft_topk`, but for :func:`relax_subset`, which has that of
:func:`soft_topk`.  ``-inf`` scores (``+inf`` for the smallest) are never selected.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from .problem import check_contents, check_k, require
from .transport import solve_transport


def softmax_k(
    scores: Tensor, k: int, *, temperature: float = 1.0, dim: int = -1, largest: bool = True
) -> Tensor:
    """For each rank a softmax over what the better ranks leave: "softmax k times".

    Entry [..., i, l] is ``exp(x_i / temperature)`` over the sum of those that are not among the l best, and 0
    if i is one of them.  The continuous beam search of Goyal et al. (2018, Algorithm 2) also takes k softmaxes,
    but of ``-(x - m_l)^2 / temperature``, m_l the l-th largest score, and masks none.

    Args:
        scores: any shape, floating point.
        k: how many ranks.
        temperature: positive, in units of the scores.
        dim: the dimension to select from.
        largest: rank 1 is the largest score, or the smallest.

    Returns:
        Weights of the dtype of ``scores`` and its shape with ``dim`` moved last, + (k,); each rank sums to 1.

    Raises:
        ValueError: if an argument is out of range, scores hold NaN or the opposite infinity, or fewer than k of
            them are not masked.
    """
    _check_temperature(temperature)
    x, k = _prepare(scores, k, dim, largest)
    ranks = torch.full(x.shape, k, device=x.device)
    ranks = ranks.scatter(
        -1, x.detach().topk(k).indices, torch.arange(k, device=x.device).expand(*x.shape[:-1], k)
    )
    taken = ranks.unsqueeze(-1) < torch.arange(k, device=x.device)  # (..., n, k)
    weights = torch.softmax((x / temperature).unsqueeze(-1).masked_fill(taken, -math.inf), dim=-2)
    return weights.to(scores.dtype)


def relax_subset(
    scores: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    dim: int = -1,
    largest: bool = True,
    sample: bool = False,
) -> Tensor:
    """A relaxed subset of k elements (RelaxSubSample: Xie and Ermon 2019, Algorithm 2).

    A softmax p of ``alpha / temperature`` is taken k times, and each time ``alpha += ln(1 - p)``; the weights
    are the sum of the p, and may exceed 1.

    Args:
        scores: any shape, floating point; the logarithms of the elements' weights, where subsets are sampled.
        k: how many to select.
        temperature: positive, in units of the scores.
        dim: the dimension to select from.
        largest: select the largest scores, or the smallest.
        sample: add Gumbel noise to the scores: as the temperature tends to 0 the weights are those of a sample
            of k elements without replacement.

    Returns:
        Weights of the dtype and shape of ``scores``, which sum to k.

    Raises:
        ValueError: see :func:`softmax_k`.
    """
    _check_temperature(temperature)
    x, k = _prepare(scores, k, dim, largest)
    alpha = _perturbed(x, sample)
    weights = torch.zeros_like(alpha)
    for _ in range(k):
        logits = alpha / temperature
        share = torch.softmax(logits, dim=-1)
        weights = weights + share
        alpha = alpha + _log_rest(logits, share)
    return weights.movedim(-1, dim).to(scores.dtype)


def neuralsort(
    scores: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    dim: int = -1,
    largest: bool = True,
    sample: bool = False,
) -> Tensor:
    """The first k ranks of a relaxed permutation matrix (NeuralSort: Grover et al. 2019, eq. 5).

    Rank i of n is ``softmax_j(((n + 1 - 2 i) x_j - sum_m |x_j - x_m|) / temperature)``: a unimodal
    row-stochastic matrix, transposed here.

    Args:
        scores: any shape, floating point; the logarithms of the elements' weights, where orders are sampled.
        k: how many ranks.
        temperature: positive, in units of the scores.
        dim: the dimension to sort.
        largest: rank 1 is the largest score, or the smallest.
        sample: add Gumbel noise to the scores: as the temperature tends to 0 the weights are those of an order
            sampled from the Plackett-Luce distribution.

    Returns:
        Weights as those of :func:`softmax_k`.

    Raises:
        ValueError: see :func:`softmax_k`.
    """
    _check_temperature(temperature)
    x, k = _prepare(scores, k, dim, largest)
    x = _perturbed(x, sample)
    masked = x == -math.inf
    x = x.masked_fill(masked, 0.0)
    n = (~masked).sum(-1, keepdim=True).unsqueeze(-1)
    between = (x.unsqueeze(-1) - x.unsqueeze(-2)).abs().masked_fill(masked.unsqueeze(-2), 0.0).sum(-1)
    ranks = torch.arange(1, k + 1, device=x.device)
    logits = (n + 1 - 2 * ranks) * x.unsqueeze(-1) - between.unsqueeze(-1)  # (..., n, k)
    logits = logits.masked_fill(masked.unsqueeze(-1), -math.inf)
    return torch.softmax(logits / temperature, dim=-2).to(scores.dtype)


def sinkhorn_sort(
    scores: Tensor,
    k: int,
    *,
    epsilon: float = 0.01,
    dim: int = -1,
    largest: bool = True,
    solver: str = "newton",
    max_iter: int | None = None,
) -> Tensor:
    r"""The first k ranks of a relaxed permutation matrix by optimal transport (Cuturi et al. 2019, Section 4).

    The scores are squashed into [0, 1] by ``sigmoid((x - mean) / deviation)`` and transported, each with mass
    1/n, to n equally spaced targets, with the squared distance as cost; column l of the plan, times n, is rank
    l.  :func:`sorted_soft_topk` has k + 1 targets instead, the last of which takes what has no rank, and does
    not squash.

    Args:
        scores: any shape, floating point.
        k: how many ranks.
        epsilon: entropic weight, positive, in units of the squared distance of the squashed scores.
        dim: the dimension to sort.
        largest: rank 1 is the largest score, or the smallest.
        solver: ``"newton"``, ``"sinkhorn"`` or ``"sinkhorn_log"``, see :func:`solve_transport`.
        max_iter: its steps.

    Returns:
        Weights as those of :func:`softmax_k`; masked scores are not supported.

    Raises:
        ValueError: see :func:`softmax_k`; or if a score is masked.
    """
    x, k = _prepare(scores, k, dim, largest)
    n = x.size(-1)
    if n == 0:
        return scores.movedim(dim, -1).unsqueeze(-1).expand(*x.shape, k)

    def complain() -> NoReturn:
        raise ValueError("sinkhorn_sort knows no masked scores: its targets are as many as the scores")

    require(x != -math.inf, complain)
    centred = x - x.mean(-1, keepdim=True)
    # Scores that are equal but for rounding have no deviation to divide by: they stay so, without a gradient.
    largest_score = x.detach().abs().amax(-1, keepdim=True)
    spread = centred.detach().abs().amax(-1, keepdim=True)
    equal = spread <= 4 * torch.finfo(x.dtype).eps * largest_score
    centred = (centred / spread.masked_fill(equal, 1.0)).masked_fill(equal, 0.0)  # squares stay in range
    deviation = centred.square().mean(-1, keepdim=True).masked_fill(equal, 1.0).sqrt()
    squashed = torch.sigmoid(centred / deviation)
    targets = torch.linspace(1, 0, n, dtype=x.dtype, device=x.device)
    cost = (squashed.unsqueeze(-1) - targets).square()
    mass = torch.full_like(targets, 1 / n)
    plan = solve_transport(cost, mass, mass, epsilon, solver=solver, max_iter=max_iter).plan
    return (n * plan[..., :k]).to(scores.dtype)


def _prepare(scores: Tensor, k: int, dim: int, largest: bool) -> tuple[Tensor, int]:
    """The scores (..., n), of which the largest win, in float32 or wider, and k, after the checks."""
    if scores.dim() == 0:
        raise ValueError("scores must have at least one dimension, got a scalar")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    x = scores.movedim(dim, -1).to(torch.promote_types(scores.dtype, torch.float32))
    if isinstance(k, Tensor):
        raise ValueError(f"k must be an int here, one for all problems, got a tensor: {k}")
    k = check_k(k, x.size(-1))
    x = x if largest else -x
    fine = ~x.isnan() & (x != math.inf) & ((x != -math.inf).sum(-1, keepdim=True) >= k)
    require(fine, lambda: check_contents(x, k))
    return x, k


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _perturbed(scores: Tensor, sample: bool) -> Tensor:
    """The scores, with standard Gumbel noise where a sample is wanted."""
    return scores - torch.empty_like(scores).exponential_().log() if sample else scores


def _log_rest(logits: Tensor, share: Tensor) -> Tensor:
    """``ln(1 - share)`` of a softmax; for the largest share, which may be 1, from the logits of the others."""
    first = logits.argmax(-1, keepdim=True)
    is_first = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, first, True)
    others = torch.logsumexp(logits.masked_fill(is_first, -math.inf), -1, keepdim=True)
    rest = others - torch.logsumexp(logits, -1, keepdim=True)
    return torch.where(is_first, rest, torch.log1p(-share.masked_fill(is_first, 0.0)))
