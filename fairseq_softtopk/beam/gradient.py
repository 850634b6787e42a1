"""A bound on what flows from a selection back into its scores.

Every selection multiplies the gradient of its inputs by about 2 / epsilon, and its output feeds
the next step: over a sentence the literal gradient grows to 1e5 and more, and is noise.  The
bound limits, per sentence and step, the norm of the gradient that a selection passes to
its scores; everything else in the gradient is left as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreGradStats(NamedTuple):
    """Sums over sentences and steps, filled during the backward pass; all 0-dimensional.

    Attributes:
        norm: sum of the norms before the bound, in multiples of the gradient that one gold token's
            log-probability receives.
        clipped: how often the bound was active.
        total: how many gradients there were.
    """

    norm: Tensor
    clipped: Tensor
    total: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> ScoreGradStats:
        """Statistics of nothing yet, on the device of ``like``, in float32."""
        zero = torch.zeros((), device=like.device)
        return cls(zero.clone(), zero.clone(), zero.clone())


class ScoreGradBound:
    """Clips the gradient of scores, per sentence, relative to the gradient of the loss.

    The unit is the gradient that each gold token's log-probability on the path receives: the bound
    means the same whatever weight, loss scale (mixed precision) or batch the loss is in.

    Args:
        bound: largest norm, in that unit; 0 for no bound (the literal gradient).
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self._unit: Tensor | None = None
        self.stats: ScoreGradStats | None = None

    def start(self, path_lprobs: Tensor) -> ScoreGradStats:
        """Takes the unit from the result of the search, (bsz,), of which the backward pass comes first."""
        self.stats = ScoreGradStats.zeros(path_lprobs)
        if path_lprobs.requires_grad:
            path_lprobs.register_hook(self._set_unit)  # type: ignore[no-untyped-call]
        return self.stats

    def watch(self, scores: Tensor, live: Tensor) -> None:
        """Bounds the gradient of ``scores`` (bsz, n) and counts it where ``live`` (bsz,)."""
        if scores.requires_grad:
            scores.register_hook(lambda grad: self._clip(grad, live))  # type: ignore[no-untyped-call]

    def _set_unit(self, grad: Tensor) -> None:
        self._unit = grad.detach().abs().unsqueeze(-1)  # (bsz, 1)

    def _clip(self, grad: Tensor, live: Tensor) -> Tensor:
        assert self._unit is not None
        assert self.stats is not None
        norm: Tensor = grad.detach().float().norm(dim=-1, keepdim=True)  # (bsz, 1)
        limit = self.bound * self._unit
        over = norm > limit if self.bound > 0 else torch.zeros_like(norm, dtype=torch.bool)
        relative = (norm / self._unit.clamp(min=torch.finfo(norm.dtype).tiny)).squeeze(-1)
        counted = live & (self._unit.squeeze(-1) > 0)
        self.stats.norm.add_(relative.where(counted, 0.0).sum())
        self.stats.clipped.add_((over.squeeze(-1) & counted).sum())
        self.stats.total.add_(counted.sum())
        factor: Tensor = (limit / norm.clamp(min=torch.finfo(norm.dtype).tiny)).where(over, 1.0)
        return grad * factor.to(grad.dtype)
