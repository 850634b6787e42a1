"""One soft selection: which candidates become the next beams, and by how much."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import sorted_soft_topk
from .candidates import Candidates


class Selection(NamedTuple):
    """The k next beams of every sentence.

    Attributes:
        weights: (bsz, n, k), how much candidate n is the next beam k; columns sum to 1.
        beams: (bsz, k), back-pointer ``r_l``: the beam that each next beam mostly continues.
        scores: (bsz, k), cumulative log-probability of each next beam.
        sharpness: (bsz,), mean over the beams of the largest weight: 1 for a hard selection.
        agreement: (bsz,), how many of the beams continue what a hard beam search would, in [0, 1].
    """

    weights: Tensor
    beams: Tensor
    scores: Tensor
    sharpness: Tensor
    agreement: Tensor


def select(candidates: Candidates, k: int, epsilon: float, cost_scale: str) -> Selection:
    """Relaxes the choice of the k best candidates (paper, Algorithm 2; back-pointers: section I.2)."""
    weights = sorted_soft_topk(candidates.scores, k, epsilon=epsilon, cost_scale=cost_scale)
    largest, origin = weights.detach().max(dim=1)  # (bsz, k)
    # The candidates come sorted, so a hard beam search takes the first k in this order.
    hard = torch.arange(k, device=origin.device)
    return Selection(
        weights=weights,
        beams=candidates.beams.gather(1, origin),
        scores=candidates.scores.gather(1, origin),
        sharpness=largest.mean(1),
        agreement=(origin == hard).to(largest.dtype).mean(1),
    )


def beam_weights(selection: Selection, candidates: Candidates, num_beams: int) -> Tensor:
    """The marginal over tokens, (bsz, num_beams, k): how much beam i goes into next beam l (eq. 10)."""
    k = selection.weights.size(-1)
    marginal = selection.weights.new_zeros(candidates.beams.size(0), num_beams, k)
    return marginal.scatter_add(
        1, candidates.beams.unsqueeze(-1).expand_as(selection.weights), selection.weights
    )
