"""Differentiable beam search, in pure PyTorch (paper, Appendix D and I.2).

The data flows through one file after the other:

============================  ===============================================================
:mod:`.candidates`            log-probabilities of one step -> the best continuations of the beams
:mod:`.selection`             candidates -> soft weights, back-pointers, scores of the next beams
:mod:`.gradient`              bounds what flows from a selection back into its scores
:mod:`.search`                the loop over steps -> the gold log-probability on the best path
============================  ===============================================================
"""

from .search import BeamConfig, BeamStats, StepDecoder, gold_lprobs_on_best_path
from .selection import RELAXATIONS

__all__ = ["RELAXATIONS", "BeamConfig", "BeamStats", "StepDecoder", "gold_lprobs_on_best_path"]
