"""The loop of the soft beam search (paper, Appendix D and I.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .candidates import best_candidates
from .gradient import ScoreGradBound
from .selection import SelectionConfig, beam_weights, select
from .trace import StepRecord


class StepDecoder(Protocol):
    """What the search asks of a decoder: to start, to step on embeddings, and to mix its state.

    A state is whatever the decoder carries from one step to the next, for ``beams`` hypotheses of
    each of ``bsz`` sentences.  No method modifies a state that it was given.
    """

    def start(self, encoder_out: Any) -> Any:
        """The state before the first step, with one beam per sentence."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (bsz, beams, E) of tokens (bsz, beams)."""

    def mix_embeddings(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Mixed embeddings ``E_l = sum_n weights[n, l] w_(tokens[n])`` (paper, eq. 9), (bsz, k, E)."""

    def step(self, embeddings: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step on (bsz, beams, E): lprobs (bsz, beams, V), float32 or wider, and the new state."""

    def mix(self, state: Any, weights: Tensor) -> Any:
        """``h_l = sum_i weights[i, l] h_i`` (paper, eq. 10), weights (bsz, beams, k): a state of k beams."""

    def keep(self, state: Any, sentences: Tensor) -> Any:
        """The state of some sentences only; their numbers (n,) are those of the state before."""

    def detach(self, state: Any) -> Any:
        """The same state, without a gradient to what it was made of."""


# Sentences that are over leave the batch when no more than this share of it goes on.
CROWD = 0.875

DETACH = ("nothing", "scores", "embeddings")


@dataclass(frozen=True)
class SearchConfig(SelectionConfig):
    """Settings of the search; the first are those of a selection.

    Attributes:
        num_candidates: how many continuations per sentence a selection looks at.
        eos: the end-of-sentence token.
        never: tokens that no hypothesis may contain.
        label_smoothing: share of a gold token's weight that goes to all tokens alike.
        score_grad_bound: see :class:`.gradient.ScoreGradBound`.
        detach: where the selections send no gradient: to the ``"scores"`` of the beams so far, or through the
            ``"embeddings"`` that they mix.
        horizon: over how many steps a gradient flows through selections and states; 0 for all.
        recompute: whether each step is computed again in the backward pass instead of kept.
    """

    num_candidates: int = 64
    eos: int = 2
    never: tuple[int, ...] = (0, 1)
    label_smoothing: float = 0.0
    score_grad_bound: float = 0.01
    detach: str = "nothing"
    horizon: int = 0
    recompute: bool = False


class Beams(NamedTuple):
    """The live hypotheses before a step.

    Attributes:
        embeddings: (bsz, beams, E), what they feed.
        state: the decoder's.
        scores: (bsz, beams), their cumulative log-probability.
        selected_by: (bsz, beams), the same numbers, with the gradient that selections may send there.
    """

    embeddings: Tensor
    state: Any
    scores: Tensor
    selected_by: Tensor

    def keep(self, decoder: StepDecoder, sentences: Tensor) -> Beams:
        """Those of some sentences."""
        return Beams(
            self.embeddings[sentences],
            decoder.keep(self.state, sentences),
            self.scores[sentences],
            self.selected_by[sentences],
        )

    def detached(self, decoder: StepDecoder) -> Beams:
        """The same, without the gradient of the selections before."""
        return Beams(
            self.embeddings.detach(), decoder.detach(self.state), self.scores, self.selected_by.detach()
        )


def soft_beam_search(
    decoder: StepDecoder,
    encoder_out: Any,
    first: Tensor,
    gold: Tensor,
    limits: Tensor,
    ends: Tensor,
    config: SearchConfig,
) -> tuple[list[StepRecord], ScoreGradBound]:
    """Writes hypotheses, and keeps of every step what a loss may ask for.

    Args:
        decoder: the decoder, one step at a time.
        encoder_out: what the encoder returned for the batch.
        first: (bsz, P), the tokens that start a hypothesis, at least one.
        gold: (bsz, T), padded on the right.
        limits: (bsz,), how many steps each sentence takes, at least 1.
        ends: (bsz,), after how many steps eos is a continuation like the others; 0 for never.
        config: settings of the search.

    Returns:
        The records of all steps, and the bound on the selections' gradient, which waits for its unit.
    """
    scores = torch.zeros(len(gold), 1, device=gold.device)
    state = decoder.start(encoder_out)
    for given in first[:, :-1].unsqueeze(2).unbind(1):
        _, state = decoder.step(decoder.embed(given), state)
    beams = Beams(decoder.embed(first[:, -1:]), state, scores, scores)
    bound = ScoreGradBound(config.score_grad_bound, gold.device)
    trace: list[StepRecord] = []
    bsz, until = len(gold), limits.tolist()  # the one time that the host looks
    num_steps, rows = max(until), torch.arange(bsz, device=gold.device)
    for step in range(num_steps):
        going = [sentence for sentence, limit in enumerate(until) if limit > step]
        if len(going) <= CROWD * len(until):
            until = [until[sentence] for sentence in going]
            kept = torch.tensor(going, device=gold.device)
            beams = beams.keep(decoder, kept)
            rows, gold, limits, ends = rows[kept], gold[kept], limits[kept], ends[kept]
        if config.horizon and step and step % config.horizon == 0:
            beams = beams.detached(decoder)
        target = gold[:, step] if step < gold.size(1) else None
        live = limits > step + 1 if step + 1 < num_steps else None
        arguments = (decoder, beams, target, ends == step + 1, live, rows, bound, config)
        if config.recompute and torch.is_grad_enabled():
            record, beams = checkpoint(_step, *arguments, use_reentrant=False)
        else:
            record, beams = _step(*arguments)
        trace.append(record.spread(rows, bsz))
    return trace, bound


def _step(
    decoder: StepDecoder,
    beams: Beams,
    gold: Tensor | None,
    may_end: Tensor,
    live: Tensor | None,
    rows: Tensor,
    bound: ScoreGradBound,
    config: SearchConfig,
) -> tuple[StepRecord, Beams]:
    """Continues all beams by one token.

    ``live`` (n,) says which sentences go on, None if none does, and ``rows`` (n,) which of the batch they are.
    """
    lprobs, state = decoder.step(beams.embeddings, beams.state)
    candidates = best_candidates(beams.scores, lprobs, config.num_candidates, config.never, config.eos, may_end)
    record = StepRecord(
        gold_lprobs=None if gold is None else _smoothed(lprobs, gold, config.label_smoothing),
        gold_rank=None if gold is None else _rank(lprobs[:, 0].detach(), gold),
        finished=beams.scores + lprobs[..., config.eos],
        best=candidates.beams[:, 0],
    )
    if live is None:
        return record, beams
    seen = beams.selected_by.gather(1, candidates.beams) + candidates.lprobs
    chosen = select(bound.watch(seen, live, rows), config)
    parents = candidates.beams.gather(1, chosen.origin)
    seen_next = candidates.scores.detach() if config.detach == "scores" else seen
    record = record._replace(
        parents=parents,
        tokens=candidates.tokens.gather(1, chosen.origin),
        sharpness=chosen.sharpness,
        agreement=chosen.agreement,
    )
    token_weights = chosen.weights.detach() if config.detach == "embeddings" else chosen.weights
    return record, Beams(
        decoder.mix_embeddings(candidates.tokens, token_weights),
        decoder.mix(state, beam_weights(chosen.weights, candidates.beams, lprobs.size(1))),
        candidates.scores.gather(1, chosen.origin),
        seen_next.gather(1, chosen.origin),
    )


def _smoothed(lprobs: Tensor, gold: Tensor, label_smoothing: float) -> Tensor:
    """Log-probability (bsz, beams) of the gold tokens (bsz,), smoothed as fairseq does it."""
    own = lprobs.gather(2, gold.view(-1, 1, 1).expand(-1, lprobs.size(1), 1))[..., 0]
    if label_smoothing == 0:
        return own
    other = label_smoothing / (lprobs.size(2) - 1)
    return (1 - label_smoothing - other) * own + other * lprobs.sum(2)


def _rank(lprobs: Tensor, gold: Tensor) -> Tensor:
    """Rank (bsz,) of the gold tokens (bsz,) in lprobs (bsz, V), 1 for the most probable."""
    return 1 + (lprobs > lprobs.gather(1, gold.unsqueeze(1))).sum(1)
