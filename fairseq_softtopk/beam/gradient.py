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
        norm: sum of the norms before a selection's own bound (those of later steps have acted), in multiples of
            the gradient of the sentence's loss.
        clipped: how often the bound was active.
        total: how many gradients there were.
    """

    norm: Tensor
    clipped: Tensor
    total: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> ScoreGradStats:
        """Statistics of nothing yet."""
        return cls(*torch.zeros(3, device=device).unbind())


class ScoreGradBound:
    """Clips the gradient of scores, per sentence, relative to the gradient of the loss.

    The unit is the gradient of the sentence's loss, which is also what each gold log-probability receives that
    is summed up in it: the bound means the same whatever weight, loss scale (mixed precision) or batch the
    loss is in.

    Args:
        bound: largest norm, in that unit; 0 for no bound (the literal gradient).
        device: where the statistics are kept.
    """

    def __init__(self, bound: float, device: torch.device) -> None:
        self.bound = bound
        self.stats = ScoreGradStats.zeros(device)
        self._unit: Tensor | None = None

    def watch(self, scores: Tensor, live: Tensor, rows: Tensor) -> Tensor:
        """The scores of sentences, with a bound on what flows back through them.

        Args:
            scores: (sentences, n).
            live: (sentences,), where it counts for the statistics.
            rows: (sentences,), which losses of the batch are theirs.
        """
        watched = scores.view_as(scores)  # other uses of the scores are left alone
        if watched.requires_grad:
            watched.register_hook(lambda grad: self._clip(grad, live, rows))  # type: ignore[no-untyped-call]
        return watched

    def take_unit(self, loss: Tensor) -> None:
        """Takes the unit from the gradient of the sentences' losses (bsz,), which is the first to come."""
        if loss.requires_grad:
            loss.register_hook(self._set_unit)  # type: ignore[no-untyped-call]

    def _set_unit(self, grad: Tensor) -> None:
        self._unit = grad.detach().abs().unsqueeze(-1)  # (bsz, 1)

    def _clip(self, grad: Tensor, live: Tensor, rows: Tensor) -> Tensor:
        assert self._unit is not None
        unit = self._unit[rows]
        norm: Tensor = grad.detach().double().norm(dim=-1, keepdim=True)  # (sentences, 1)
        limit = self.bound * unit
        over = norm > limit if self.bound > 0 else torch.zeros_like(norm, dtype=torch.bool)
        relative = (norm / unit.clamp(min=torch.finfo(norm.dtype).tiny)).squeeze(-1)
        counted = live & (unit.squeeze(-1) > 0)
        self.stats.norm.add_(relative.where(counted, 0.0).sum())
        self.stats.clipped.add_((over.squeeze(-1) & counted).sum())
        self.stats.total.add_(counted.sum())
        factor: Tensor = (limit / norm.clamp(min=torch.finfo(norm.dtype).tiny)).where(over, 1.0)
        return grad * factor.to(grad.dtype)
