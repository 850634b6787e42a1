"""What a soft beam search is trained for: from the records of its steps to one loss per sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bleu import sentence_bleu
from .gradient import ScoreGradStats
from .search import SearchConfig, StepDecoder, soft_beam_search
from .trace import StepRecord, follow
from .words import WordJoiner

OBJECTIVES = ("risk", "gold")

NO_TOKEN = -1  # equals none

# Among so many times the hypotheses that share the risk, distinct ones are looked for.
SPARE = 2


@dataclass(frozen=True)
class BeamConfig(SearchConfig):
    """Settings of the loss; the others are those of the search.

    Attributes:
        objective: ``"gold"``: :func:`gold_on_best_path`; ``"risk"``: :func:`expected_risk`.
        max_len: the search takes no more steps than this; 0 for as many as the objective wants.
        eos_weight: weight of the last gold token, eos, in the ``"gold"`` loss.
        hypotheses: how many finished hypotheses share the ``"risk"``.
        temperature: of their distribution, in nats per token.
        unk: the token that stands for unknown words; in a reference, no hypothesis matches it.
        words: makes words of tokens, of which the BLEU of the ``"risk"`` is; None for that of the tokens.
        brevity_smoothing: of that BLEU, see :func:`.bleu.sentence_bleu`.
    """

    objective: str = "risk"
    max_len: int = 0
    eos_weight: float = 1.0
    hypotheses: int = 10
    temperature: float = 0.1
    unk: int | None = None
    words: WordJoiner | None = None
    brevity_smoothing: float = 0.0


class BeamStats(NamedTuple):
    """Sums over a batch, 0-dimensional; each stands with the count to divide it by.

    Attributes:
        sharpness: see :class:`.selection.Selection`.
        agreement: likewise.
        selections: how many selections there were.
        tokens: how many gold tokens there were, those of a given prefix not counted.
        gold_rank: ranks of the gold tokens among the continuations of the first beam, 1 for the best.
        gold_tokens: how many of them were looked at.
        gold_on_beam: sentences whose gold prefix is one of the beams before the last gold token.
        sentences: how many sentences there were.
        bleu: sentence BLEU of the best finished hypotheses, in [0, 1], without brevity smoothing; 0 unless the
            objective is ``"risk"``.
        score_grad: filled in during the backward pass.
    """

    sharpness: Tensor
    agreement: Tensor
    selections: Tensor
    tokens: Tensor
    gold_rank: Tensor
    gold_tokens: Tensor
    gold_on_beam: Tensor
    sentences: Tensor
    bleu: Tensor
    score_grad: ScoreGradStats


def soft_beam_loss(
    decoder: StepDecoder,
    encoder_out: Any,
    first: Tensor,
    gold: Tensor,
    lengths: Tensor,
    config: BeamConfig,
) -> tuple[Tensor, BeamStats]:
    """The loss of every sentence, from a soft beam search that writes its own hypotheses.

    Args:
        decoder: the decoder, one step at a time.
        encoder_out: what the encoder returned for the batch.
        first: (bsz, P), the tokens that start a hypothesis, at least one.
        gold: (bsz, T), padded on the right, ending with eos.
        lengths: (bsz,), number of gold tokens of each sentence, eos included, at least 1.
        config: settings of the loss and the search.

    Returns:
        The losses (bsz,), and statistics.
    """
    if config.objective == "risk":  # hypotheses may be longer than the gold sentence, and end by themselves
        limits, ends = lengths + lengths // 5 + 2, torch.zeros_like(lengths)
        config = replace(config, label_smoothing=0.0)  # not of the gold tokens' log-probabilities, then
    else:
        limits = ends = lengths
    if config.max_len > 0:
        limits = limits.clamp(max=config.max_len)
    trace, bound = soft_beam_search(decoder, encoder_out, first, gold, limits, ends, config)
    bleu = torch.zeros((), device=gold.device)
    if config.objective == "risk":
        reference = gold if config.unk is None else gold.masked_fill(gold == config.unk, NO_TOKEN)
        loss, best = expected_risk(trace, reference, lengths, limits, config)
        bleu = best.sum()
    else:
        loss = gold_on_best_path(trace, lengths, limits, config.eos_weight)
    bound.take_unit(loss)
    return loss, _stats(trace, gold, lengths, limits, bleu, bound.stats)


def gold_on_best_path(trace: list[StepRecord], lengths: Tensor, limits: Tensor, eos_weight: float) -> Tensor:
    """Minus the log-probability (nats) of the gold tokens along the best hypothesis (paper, section I.2).

    The gold sentence only says how long the hypotheses are, and is scored on the best of them: the model learns
    to continue correctly from what it would have written.

    Args:
        trace: the records of the search.
        lengths: (bsz,), number of gold tokens, eos included.
        limits: (bsz,), how many of them are scored.
        eos_weight: weight of eos, the last gold token.

    Returns:
        The losses (bsz,).
    """
    last = limits.unsqueeze(1) - 1
    best = torch.stack([record.best for record in trace], dim=1).gather(1, last)
    path = follow(trace, last, best).beams[:, 0]  # (bsz, S)
    on_path = [record.gold_lprobs.gather(1, path[:, [step]]) for step, record in enumerate(trace)]  # type: ignore[union-attr]
    lprobs = torch.cat(on_path, dim=1)
    steps = torch.arange(len(trace), device=lengths.device)
    weights = torch.where(steps == lengths.unsqueeze(1) - 1, eos_weight, 1.0).to(lprobs.dtype)
    unscored = (steps > last) | (weights == 0)  # where a log-probability of -inf is not to become NaN
    return -(lprobs.masked_fill(unscored, 0.0) * weights).sum(1)


def expected_risk(
    trace: list[StepRecord], gold: Tensor, lengths: Tensor, limits: Tensor, config: BeamConfig
) -> tuple[Tensor, Tensor]:
    """``length x sum_m p_m (1 - BLEU_m)`` over the best finished hypotheses of a search.

    Every beam may end at every step: of all these hypotheses the best M distinct ones by log-probability per
    token share the probability ``p = softmax(log-probability per token / temperature)`` (minimum risk
    training: Shen et al. 2016; Edunov et al. 2018).  Their BLEU is that of the tokens that their back-pointers
    name, or of the words that these make; of two soft beams that name the same tokens the better is kept.

    Args:
        trace: the records of the search.
        gold: (bsz, T), padded on the right, ending with eos.
        lengths: (bsz,), number of gold tokens, eos included.
        limits: (bsz,), how many steps each sentence took.
        config: M, the temperature (in nats per token), and what the BLEU is of.

    Returns:
        The losses (bsz,), and the BLEU of each sentence's best hypothesis, without brevity smoothing.
    """
    steps = torch.cat([torch.full_like(record.finished[0], step) for step, record in enumerate(trace)]).long()
    beams = torch.cat([torch.arange(record.finished.size(1), device=gold.device) for record in trace])
    scores = torch.cat([record.finished for record in trace], dim=1) / (steps + 1)  # (bsz, 1 + k (S - 1))
    scores = scores.masked_fill(steps >= limits.unsqueeze(1), -math.inf)
    with torch.no_grad():
        best = scores.topk(min(SPARE * config.hypotheses, scores.size(1)), dim=1).indices
        tokens = follow(trace, steps[best], beams[best]).tokens
        repeated = _repeated(tokens, steps[best])
        distinct = scores.gather(1, best).masked_fill(repeated, -math.inf)
        kept = distinct.topk(min(config.hypotheses, distinct.size(1)), dim=1).indices  # (bsz, M)
        best, tokens = best.gather(1, kept), tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.size(2)))
        written, reference = (tokens, steps[best]), (gold, lengths - 1)  # without eos
        if config.words is not None:
            written, reference = config.words(*written), config.words(*reference)
        bleu = sentence_bleu(*written, *reference, scores.dtype, config.brevity_smoothing)
        of_best = sentence_bleu(written[0][:, :1], written[1][:, :1], *reference, scores.dtype)[:, 0]
        repeated = repeated.gather(1, kept)  # where there are fewer than M
    probabilities = torch.softmax(
        scores.gather(1, best).masked_fill(repeated, -math.inf) / config.temperature, dim=1
    )
    return lengths * (probabilities * (1 - bleu)).sum(1), of_best


def _repeated(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Which of the hypotheses (bsz, M, S), of so many tokens (bsz, M), equal an earlier one; (bsz, M)."""
    inside = torch.arange(tokens.size(2), device=tokens.device) < lengths.unsqueeze(-1)
    tokens = tokens.masked_fill(~inside, NO_TOKEN)
    equal = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).all(-1)  # (bsz, M, M)
    return equal.tril(-1).any(-1)


@torch.no_grad()
def _stats(
    trace: list[StepRecord],
    gold: Tensor,
    lengths: Tensor,
    limits: Tensor,
    bleu: Tensor,
    score_grad: ScoreGradStats,
) -> BeamStats:
    sums = torch.zeros(3, device=gold.device)
    for step, record in enumerate(trace):
        if record.sharpness is not None and record.agreement is not None:
            live = limits > step + 1
            sums[0] += (record.sharpness * live).sum()
            sums[1] += (record.agreement * live).sum()
        if record.gold_rank is not None:
            sums[2] += (record.gold_rank * (step < torch.minimum(lengths, limits))).sum()
    return BeamStats(
        sharpness=sums[0],
        agreement=sums[1],
        selections=(limits - 1).sum(),
        tokens=lengths.sum(),
        gold_rank=sums[2],
        gold_tokens=torch.minimum(lengths, limits).sum(),
        gold_on_beam=_gold_on_beam(trace, gold, torch.minimum(lengths, limits) - 1).sum(),
        sentences=torch.tensor(len(gold), device=gold.device),
        bleu=bleu,
        score_grad=score_grad,
    )


def _gold_on_beam(trace: list[StepRecord], gold: Tensor, selections: Tensor) -> Tensor:
    """Whether a beam is the gold prefix after so many ``selections`` (bsz,)."""
    on_beam = torch.ones(len(gold), 1, dtype=torch.bool, device=gold.device)
    for step, record in enumerate(trace[: gold.size(1) - 1]):
        if record.parents is None or record.tokens is None:
            break
        continued = on_beam.gather(1, record.parents) & (record.tokens == gold[:, step : step + 1])
        on_beam = torch.where((step < selections).unsqueeze(1), continued, on_beam)
    return on_beam.any(1)
