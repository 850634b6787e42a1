"""What a search leaves behind: enough to follow every hypothesis from its end to its first token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepRecord(NamedTuple):
    """What one step leaves behind; ``beams`` is 1 at the first step, then k.

    Attributes:
        gold_lprobs: (bsz, beams), log-probability of the gold token on each beam (label smoothed); None
            where the gold sentences of the batch are over.
        finished: (bsz, beams), cumulative log-probability of each beam if it ends here with eos.
        best: (bsz,), the beam that the best candidate continues.
        parents: (bsz, k), the beam that each next beam continues; None after the last step.
        tokens: (bsz, k), the token that continues it; likewise.
        sharpness: (bsz,), see :class:`.selection.Selection`; likewise.
        agreement: (bsz,), likewise.
        gold_rank: (bsz,), rank of the gold token among the continuations of the first beam, 1 for the best.
    """

    gold_lprobs: Tensor | None
    finished: Tensor
    best: Tensor
    parents: Tensor | None = None
    tokens: Tensor | None = None
    sharpness: Tensor | None = None
    agreement: Tensor | None = None
    gold_rank: Tensor | None = None

    def spread(self, rows: Tensor, bsz: int) -> StepRecord:
        """The record of ``bsz`` sentences, of which these are ``rows`` (n,); the others get zeros."""
        if len(rows) == bsz:
            return self

        def full(value: Tensor) -> Tensor:
            return value.new_zeros(bsz, *value.shape[1:]).index_copy(0, rows, value)

        return self._replace(
            **{name: full(value) for name, value in self._asdict().items() if value is not None}
        )


class Paths(NamedTuple):
    """Hypotheses of a trace of S steps.

    Attributes:
        beams: (bsz, M, S), the beam that each hypothesis is on at each step.
        tokens: (bsz, M, S - 1), the tokens that it feeds to the next step; garbage from its last step on.
    """

    beams: Tensor
    tokens: Tensor


def follow(trace: list[StepRecord], last: Tensor, beams: Tensor) -> Paths:
    """Follows the back-pointers of M hypotheses per sentence.

    Args:
        trace: the records of all S steps.
        last: (bsz, M), the last step of each hypothesis, from 0.
        beams: (bsz, M), the beam that it is on there.

    Returns:
        The beams that each one was on, and the tokens that it fed.
    """
    beam, path, tokens = beams, [beams], []
    for step in range(len(trace) - 2, -1, -1):
        record = trace[step]
        assert record.parents is not None and record.tokens is not None
        tokens.append(record.tokens.gather(1, beam))
        beam = torch.where(last > step, record.parents.gather(1, beam), beams)
        path.append(beam)
    return Paths(
        torch.stack(path[::-1], dim=-1),
        torch.stack(tokens[::-1], dim=-1) if tokens else beams.new_zeros(*beams.shape, 0),
    )
