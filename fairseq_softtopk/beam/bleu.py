"""Sentence BLEU of many hypotheses at once, on the device that they are on."""

from __future__ import annotations

import torch
from torch import Tensor

ORDER = 4


def sentence_bleu(
    hypotheses: Tensor,
    lengths: Tensor,
    references: Tensor,
    ref_lengths: Tensor,
    dtype: torch.dtype = torch.float32,
    brevity_smoothing: float = 0.0,
) -> Tensor:
    """BLEU+1 in [0, 1] (Lin and Och 2004): n-gram counts of n > 1 are one higher, so that none is 0.

    An n-gram of a hypothesis is a match unless it has occurred there already as often as in the reference.

    Args:
        hypotheses: (bsz, M, H), tokens.
        lengths: (bsz, M), how many tokens count.
        references: (bsz, R), tokens.
        ref_lengths: (bsz,), how many tokens count.
        dtype: of the result.
        brevity_smoothing: how many tokens longer the reference is to the brevity penalty. The smoothing of the
            n-gram counts favours short hypotheses; 1 is the cure of Nakov et al. (2012). It is a third of the
            reference at most, or one of one or two tokens would be worth more with a wrong token behind it.

    Returns:
        (bsz, M); 0 without a token of the reference, 1 if both are empty.
    """
    inside = torch.arange(hypotheses.size(2), device=lengths.device) < lengths.unsqueeze(-1)
    ref_inside = torch.arange(references.size(1), device=lengths.device) < ref_lengths.unsqueeze(-1)
    tokens, ref_tokens = hypotheses.unsqueeze(-1), references[:, None, None, :]
    own = (tokens == hypotheses.unsqueeze(-2)) & inside.unsqueeze(-1) & inside.unsqueeze(-2)  # (bsz, M, H, H)
    same = (tokens == ref_tokens) & inside.unsqueeze(-1) & ref_inside[:, None, None, :]  # (bsz, M, H, R)
    own_ngrams, same_ngrams = own, same
    log_precision = torch.zeros(lengths.shape, dtype=dtype, device=lengths.device)
    for n in range(1, ORDER + 1):
        if n > 1:  # n-grams agree where (n - 1)-grams do, and the n-th tokens
            own_ngrams = own_ngrams[..., :-1, :-1] & own[..., n - 1 :, n - 1 :]
            same_ngrams = same_ngrams[..., :-1, :-1] & same[..., n - 1 :, n - 1 :]
        before = own_ngrams.tril(-1).sum(-1)
        matches = (before < same_ngrams.sum(-1)).sum(-1)
        smoothing = 0 if n == 1 else 1
        total = (lengths - n + 1).clamp(min=0) + smoothing
        log_precision += torch.log((matches + smoothing).to(dtype) / total.clamp(min=1)) / ORDER
    wanted = (ref_lengths + (ref_lengths / 3).clamp(max=brevity_smoothing)).to(dtype).unsqueeze(1)
    brevity = (1 - wanted / lengths.clamp(min=1)).clamp(max=0)
    bleu = torch.exp(log_precision + brevity)
    both_empty = ref_lengths.unsqueeze(1) == 0
    return torch.where(lengths == 0, both_empty.to(dtype), bleu)
