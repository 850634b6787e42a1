"""The best continuations of the live beams: the only part of the vocabulary that a selection sees."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """The n best (beam, token) pairs of every sentence, best first; all (bsz, n).

    Attributes:
        scores: cumulative log-probability (nats); ``-inf`` where there are fewer than n.
        lprobs: log-probability of the last token alone; likewise.
        beams: the beam that is continued.
        tokens: the token that continues it.
    """

    scores: Tensor
    lprobs: Tensor
    beams: Tensor
    tokens: Tensor


def best_candidates(
    cumulative: Tensor,
    lprobs: Tensor,
    num_candidates: int,
    never: tuple[int, ...],
    eos: int,
    may_end: Tensor,
) -> Candidates:
    """Scores every continuation and keeps the best, differentiably in the scores.

    With un-scaled costs and an epsilon of tenths of a nat, 64 candidates stand for all k V: what is
    far below rank k has no weight.  With a softer selection their number matters.

    Args:
        cumulative: (bsz, beams), the score of each beam so far.
        lprobs: (bsz, beams, V), log-probabilities of the next token.
        num_candidates: how many to keep, at most beams x V.
        never: tokens that no hypothesis may contain, such as padding.
        eos: the end of sentence: a candidate only where it ``may_end`` (bsz,), since a mixture of a finished
            and an unfinished hypothesis has no meaning.
        may_end: (bsz,), True at a sentence's last step.
    """
    bsz, _, vocab = lprobs.shape
    with torch.no_grad():
        scores = cumulative.unsqueeze(-1) + lprobs
        for token in never:
            scores[..., token] = -math.inf
        scores[..., eos].masked_fill_(~may_end.unsqueeze(-1), -math.inf)
        scores = scores.view(bsz, -1)
        best = scores.topk(min(num_candidates, scores.size(-1)), dim=-1)
    beams, tokens = best.indices // vocab, best.indices % vocab
    kept = lprobs.flatten(1).gather(1, best.indices).masked_fill(best.values == -math.inf, -math.inf)
    return Candidates(cumulative.gather(1, beams) + kept, kept, beams, tokens)
