"""What both operators share: the arguments, the masks and the meaning of epsilon.

Scores ``x`` are moved onto anchors ``b_j`` at the cost ``C_ij = (x_i - b_j)^2`` (paper, section 2).
Only the part ``2 x_i b_j`` of that cost matters: ``x_i^2`` is constant along a row, ``b_j^2`` along
a column, and the marginals absorb both.  So the plan depends on ``2 x_i / epsilon`` alone, and
selecting the smallest scores is selecting the largest of ``-x``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COST_SCALES = ("none", "max", "batch_max")
# Slopes beyond this are as good as infinite, but their sums and differences stay finite.
LARGEST_SLOPE = 1e30


@dataclass(frozen=True)
class Problem:
    """Scores ready to be solved: the largest win, the last dimension is the one to select from.

    Attributes:
        scores: (..., n), in the precision of the solver; masked entries are ``-inf``.
        alive: (..., n), False at masked entries.
        epsilon: (..., 1) or (), the entropic weight of the un-scaled cost.
    """

    scores: Tensor
    alive: Tensor
    epsilon: Tensor

    def slopes(self, origin: Tensor) -> Tensor:
        """``2 (x_i - origin) / epsilon``, and 0 at masked entries, where no gradient may pass.

        Subtracting before scaling keeps every digit near the origin (Sterbenz), so that a small
        epsilon needs no wider floats.  The origin cancels in the plan and carries no gradient.

        Args:
            origin: (..., 1).
        """
        largest = torch.finfo(self.scores.dtype).max
        distance = (self.scores - origin).masked_fill(~self.alive, 0.0).clamp(-largest, largest)
        return (distance * (2 / self.epsilon)).clamp(-LARGEST_SLOPE, LARGEST_SLOPE)


def prepare(
    scores: Tensor,
    num_anchors: int,
    epsilon: float | Tensor,
    dim: int,
    largest: bool,
    cost_scale: str,
    dtype: torch.dtype,
) -> Problem:
    """Checks the arguments of an operator and brings its scores into the form of :class:`Problem`.

    Args:
        scores: the user's scores.
        num_anchors: the anchors are 0, 1, ..., num_anchors - 1.
        epsilon: entropic weight; a tensor has the shape of scores without ``dim``.
        dim: the dimension to select from.
        largest: whether the largest scores are to be selected.
        cost_scale: what the cost is divided by, see :func:`soft_topk`.
        dtype: the precision to solve in.

    Raises:
        ValueError: for arguments outside their range.
    """
    if scores.dim() == 0:
        raise ValueError("scores must have at least one dimension, got a scalar")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if cost_scale not in COST_SCALES:
        raise ValueError(f"cost_scale must be one of {', '.join(COST_SCALES)}, got {cost_scale!r}")
    scores = scores.movedim(dim, -1).to(dtype)
    weight = as_epsilon(epsilon, scores)
    alive = scores != (-math.inf if largest else math.inf)
    if cost_scale != "none":
        weight = weight * _largest_cost(scores.detach(), alive, num_anchors - 1, cost_scale)
    return Problem(scores if largest else -scores, alive, weight)


def as_epsilon(epsilon: float | Tensor, scores: Tensor) -> Tensor:
    """Epsilon as a tensor that broadcasts against scores (..., n).

    Raises:
        ValueError: if epsilon is not a positive finite number, or does not broadcast.
    """
    if not isinstance(epsilon, Tensor):
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be a positive finite number, got {epsilon}")
        epsilon = max(epsilon, torch.finfo(scores.dtype).tiny)
        return torch.tensor(epsilon, dtype=scores.dtype, device=scores.device)
    if epsilon.dim() and epsilon.shape != scores.shape[:-1]:
        raise ValueError(
            f"epsilon must be one number or one per problem, {tuple(scores.shape[:-1])}, "
            f"got {tuple(epsilon.shape)}"
        )
    wrong = ~((epsilon > 0) & epsilon.isfinite())
    if bool(wrong.any()):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon[wrong][0].item()}")
    epsilon = epsilon.to(scores).clamp(min=torch.finfo(scores.dtype).tiny)
    return epsilon.unsqueeze(-1) if epsilon.dim() else epsilon


def _largest_cost(scores: Tensor, alive: Tensor, last_anchor: int, cost_scale: str) -> Tensor:
    """The largest ``(x_i - b_j)^2``, over each problem or over the batch; a constant, no gradient."""
    costs = torch.maximum(scores.square(), (scores - last_anchor).square()).masked_fill(~alive, 0.0)
    if costs.numel() == 0:
        return costs.new_ones(())
    largest = costs.amax() if cost_scale == "batch_max" else costs.amax(-1, keepdim=True)
    return largest.masked_fill(largest == 0, 1.0)


def check_contents(scores: Tensor, alive: Tensor, k: Tensor | int) -> None:
    """Finds out why a problem has no solution; called only when the solver did not find one.

    A NaN, an infinity on the wrong side and a mask that leaves too few elements all end as a
    residual that is not a number, so that good input pays nothing for these checks.

    Raises:
        ValueError: if scores hold a NaN or the wrong infinity, or fewer than k entries are alive.
    """
    if bool(scores.isnan().any()):
        raise ValueError("scores contain NaN")
    if bool((scores == math.inf).any()):
        raise ValueError(
            "scores contain the infinity that no selection can avoid: "
            "mask with -inf when largest=True, with +inf when largest=False"
        )
    missing = alive.sum(-1) < k
    if bool(missing.any()):
        left = int(alive.sum(-1)[missing].min())
        wanted = k if isinstance(k, int) else int(k.expand(missing.shape)[missing].max())
        raise ValueError(f"k = {wanted} elements to select, but the mask leaves only {left}")
