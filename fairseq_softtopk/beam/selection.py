"""One soft selection: which candidates become the next beams, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import softmax_k, sorted_soft_topk

RELAXATIONS = ("soft_topk", "softmax_k", "straight_through", "hard")


@dataclass(frozen=True)
class SelectionConfig:
    """Settings of a selection.

    Attributes:
        size: k, the number of beams to choose.
        epsilon: how soft the choice is: entropic weight, or temperature of ``"softmax_k"`` (nats).
        relaxation: ``"soft_topk"``: the sorted SOFT top-k operator; ``"straight_through"``: its gradient, but
            the hard choice forward; ``"softmax_k"``: for each rank a softmax over the candidates that a hard
            search leaves to it; ``"hard"``: the hard choice, without a gradient.
        cost_scale: see :func:`fairseq_softtopk.ops.soft_topk`; for ``"softmax_k"`` it must be ``"none"``.
        backward_epsilon: the gradient is that of this epsilon; 0 for that of ``epsilon``.
    """

    size: int
    epsilon: float
    relaxation: str = "soft_topk"
    cost_scale: str = "none"
    backward_epsilon: float = 0.0


class Selection(NamedTuple):
    """The k next beams of every sentence.

    Attributes:
        weights: (bsz, n, k), how much candidate n is the next beam k; columns sum to 1.
        origin: (bsz, k), the candidate that each next beam mostly is (back-pointers, section I.2).
        sharpness: (bsz,), mean over the beams of the largest weight: 1 for a hard selection.
        agreement: (bsz,), how many of the beams continue what a hard beam search would, in [0, 1].
    """

    weights: Tensor
    origin: Tensor
    sharpness: Tensor
    agreement: Tensor


def select(scores: Tensor, config: SelectionConfig) -> Selection:
    """Relaxes the choice of the k best candidates (paper, Algorithm 2).

    Args:
        scores: (bsz, n), best first.
        config: how.
    """
    weights = _weights(scores, config, config.epsilon)
    if config.backward_epsilon > 0 and scores.requires_grad:
        softer = _weights(scores, config, config.backward_epsilon)
        weights = softer + (weights - softer).detach()
    largest, origin = weights.detach().max(dim=1)  # (bsz, k)
    # The candidates come sorted, so a hard beam search takes the first k in this order.
    hard = torch.arange(config.size, device=origin.device)
    return Selection(weights, origin, largest.mean(1), (origin == hard).to(largest.dtype).mean(1))


def _weights(scores: Tensor, config: SelectionConfig, epsilon: float) -> Tensor:
    if config.relaxation == "softmax_k":
        return softmax_k(scores, config.size, temperature=epsilon)
    if config.relaxation == "hard":
        identity = torch.eye(scores.size(1), config.size, dtype=scores.dtype, device=scores.device)
        return identity.expand(len(scores), -1, -1)
    straight = config.relaxation == "straight_through"
    return sorted_soft_topk(scores, config.size, epsilon=epsilon, cost_scale=config.cost_scale, hard=straight)


def beam_weights(weights: Tensor, beams: Tensor, num_beams: int) -> Tensor:
    """The marginal over tokens, (bsz, num_beams, k): how much beam i goes into next beam l (eq. 10).

    Args:
        weights: (bsz, n, k), of the candidates.
        beams: (bsz, n), the beam that each candidate continues.
        num_beams: how many beams there are.
    """
    marginal = weights.new_zeros(len(beams), num_beams, weights.size(-1))
    return marginal.scatter_add(1, beams.unsqueeze(-1).expand_as(weights), weights)
