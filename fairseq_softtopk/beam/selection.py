"""One soft selection: which candidates become the next beams, and by how much."""

from __future__ import annotations

import math
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


RELAXATIONS = ("soft_topk", "softmax_k", "straight_through", "hard")


def select(
    candidates: Candidates, k: int, epsilon: float, cost_scale: str, relaxation: str = "soft_topk"
) -> Selection:
    """Relaxes the choice of the k best candidates (paper, Algorithm 2; back-pointers: section I.2).

    Args:
        candidates: best first.
        k: how many to choose.
        epsilon: how soft the choice is.
        cost_scale: see :func:`fairseq_softtopk.ops.soft_topk`; for ``softmax_k`` it must be ``"none"``.
        relaxation: ``"soft_topk"``: the sorted SOFT top-k operator; ``"straight_through"``: its gradient, but
            the hard choice forward; ``"softmax_k"``: for each rank a softmax with temperature epsilon over
            the candidates that a hard search leaves to it; ``"hard"``: the hard choice, without a gradient.
    """
    scores = candidates.scores
    if relaxation == "softmax_k":
        weights = _masked_softmaxes(scores, k, epsilon)
    elif relaxation == "hard":
        weights = torch.eye(scores.size(1), k, dtype=scores.dtype, device=scores.device).expand(
            len(scores), -1, -1
        )
    else:
        straight = relaxation == "straight_through"
        weights = sorted_soft_topk(scores, k, epsilon=epsilon, cost_scale=cost_scale, hard=straight)
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


def _masked_softmaxes(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """Softmaxes (bsz, n, k) of scores (bsz, n), best first; the l-th does not see the l - 1 before it."""
    taken = torch.ones(scores.size(1), k, dtype=torch.bool, device=scores.device).triu(1)
    return torch.softmax((scores / epsilon).unsqueeze(-1).masked_fill(taken, -math.inf), dim=1)


def beam_weights(selection: Selection, candidates: Candidates, num_beams: int) -> Tensor:
    """The marginal over tokens, (bsz, num_beams, k): how much beam i goes into next beam l (eq. 10)."""
    k = selection.weights.size(-1)
    marginal = selection.weights.new_zeros(candidates.beams.size(0), num_beams, k)
    return marginal.scatter_add(
        1, candidates.beams.unsqueeze(-1).expand_as(selection.weights), selection.weights
    )
