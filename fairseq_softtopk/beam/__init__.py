"""Differentiable beam search, in pure PyTorch (paper, Appendix D and I.2).

The data flows through one file after the other:

============================  ===============================================================
:mod:`.candidates`            log-probabilities of one step -> the best continuations of the beams
:mod:`.selection`             candidates -> soft weights and back-pointers
:mod:`.gradient`              bounds what flows from a selection back into its scores
:mod:`.search`                the loop over steps -> their records
:mod:`.trace`                 records -> hypotheses, by the back-pointers
:mod:`.words`                 pieces of words -> words
:mod:`.bleu`                  hypotheses -> their sentence BLEU
:mod:`.loss`                  records -> the loss of each sentence
============================  ===============================================================
"""

from .loss import OBJECTIVES, BeamConfig, BeamStats, soft_beam_loss
from .search import DETACH, StepDecoder
from .selection import RELAXATIONS
from .words import POST_PROCESSES, WordJoiner, find_post_process

__all__ = [
    "DETACH",
    "OBJECTIVES",
    "POST_PROCESSES",
    "RELAXATIONS",
    "BeamConfig",
    "BeamStats",
    "StepDecoder",
    "WordJoiner",
    "find_post_process",
    "soft_beam_loss",
]
