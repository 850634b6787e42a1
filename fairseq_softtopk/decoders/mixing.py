"""The two mixtures of a soft beam search, for every fairseq decoder alike."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def mix_embeddings(embed_tokens: nn.Embedding, tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of embeddings (paper, eq. 9); ``embedding_bag`` never holds those of all candidates.

    Args:
        embed_tokens: the decoder's embeddings.
        tokens: (bsz, n).
        weights: (bsz, n, k).

    Returns:
        (bsz, k, E), ``sum_n weights[n, l] w_(tokens[n])``.
    """
    bsz, n, k = weights.shape
    table = embed_tokens.weight
    bags = tokens.unsqueeze(1).expand(bsz, k, n).reshape(bsz * k, n)
    per_sample = weights.transpose(1, 2).reshape(bsz * k, n).to(table.dtype)
    mixed = F.embedding_bag(bags, table, mode="sum", per_sample_weights=per_sample)
    return mixed.view(bsz, k, -1)


def mix_beams(hidden: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of what the beams carry (paper, eq. 10).

    Args:
        hidden: (bsz, beams, ...).
        weights: (bsz, beams, k).

    Returns:
        (bsz, k, ...), ``sum_i weights[i, l] hidden[i]``, in the dtype of ``hidden``.
    """
    mixed = weights.transpose(1, 2).to(hidden.dtype) @ hidden.flatten(2)  # (bsz, k, beams) @ (bsz, beams, -1)
    return mixed.view(*mixed.shape[:2], *hidden.shape[2:])
