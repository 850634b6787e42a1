"""The loop of the soft beam search (paper, Appendix D and I.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .candidates import best_candidates
from .gradient import ScoreGradBound, ScoreGradStats
from .selection import beam_weights, select


class StepDecoder(Protocol):
    """What the search asks of a decoder: to start, to step on embeddings, and to mix its state.

    A state is whatever the decoder carries from one step to the next, for ``beams`` hypotheses of
    each of ``bsz`` sentences.
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


@dataclass(frozen=True)
class BeamConfig:
    """Settings of the search.

    Attributes:
        size: k, the number of beams.
        epsilon: entropic weight of the selection (nats when ``cost_scale`` is ``"none"``).
        num_candidates: how many continuations per sentence a selection looks at.
        cost_scale: see :func:`fairseq_softtopk.ops.soft_topk`.
        relaxation: see :func:`.selection.select`.
        score_grad_bound: see :class:`.gradient.ScoreGradBound`.
        eos_weight: weight of the last gold token, eos, in the result.
        label_smoothing: share of a gold token's weight that goes to all tokens alike.
        eos: the end-of-sentence token.
        never: tokens that no hypothesis may contain.
    """

    size: int
    epsilon: float
    num_candidates: int
    cost_scale: str
    relaxation: str
    score_grad_bound: float
    eos_weight: float
    label_smoothing: float
    eos: int
    never: tuple[int, ...]


class BeamStats(NamedTuple):
    """Sums over the selections of a batch, 0-dimensional; divide by ``selections``.

    Attributes:
        sharpness: see :class:`.selection.Selection`.
        agreement: likewise.
        selections: how many selections there were (sentences x steps but the last).
        score_grad: filled in during the backward pass.
    """

    sharpness: Tensor
    agreement: Tensor
    selections: Tensor
    score_grad: ScoreGradStats


def gold_lprobs_on_best_path(
    decoder: StepDecoder,
    encoder_out: Any,
    first: Tensor,
    gold: Tensor,
    lengths: Tensor,
    config: BeamConfig,
) -> tuple[Tensor, BeamStats]:
    """Log-probability of the gold tokens along the best hypothesis of a soft beam search.

    The search writes its own hypotheses; the gold sentence only says how long they are and is scored on the
    best of them: the model learns to continue correctly from what it would have written.

    Args:
        decoder: the decoder, one step at a time.
        encoder_out: what the encoder returned for the batch.
        first: (bsz, 1), the token that starts a hypothesis.
        gold: (bsz, T), padded on the right, ending with eos.
        lengths: (bsz,), number of gold tokens of each sentence, eos included, at least 1.
        config: settings of the search.

    Returns:
        The summed gold log-probability of each sentence (bsz,), nats, and statistics.
    """
    bsz, num_steps = gold.shape
    state = decoder.start(encoder_out)
    embeddings = decoder.embed(first)
    cumulative = torch.zeros(bsz, 1, device=gold.device)
    never = torch.tensor(config.never, device=gold.device)
    bound = ScoreGradBound(config.score_grad_bound, gold.device)

    gold_lprobs, parents = [], []
    best_at_end = torch.zeros_like(lengths)
    sharpness, agreement = torch.zeros(2, bsz, device=gold.device)
    for step in range(num_steps):
        lprobs, state = decoder.step(embeddings, state)
        beams = lprobs.size(1)
        gold_lprobs.append(_smoothed(lprobs, gold[:, step], config.label_smoothing))
        last, live = lengths == step + 1, lengths > step + 1
        candidates = best_candidates(cumulative, lprobs, config.num_candidates, never, config.eos, last)
        best_at_end = torch.where(last, candidates.beams[:, 0], best_at_end)
        if step + 1 == num_steps:
            break
        bound.watch(candidates.scores, live)
        chosen = select(candidates, config.size, config.epsilon, config.cost_scale, config.relaxation)
        embeddings = decoder.mix_embeddings(candidates.tokens, chosen.weights)
        state = decoder.mix(state, beam_weights(chosen, candidates, beams))
        cumulative = chosen.scores
        parents.append(chosen.beams)
        sharpness += chosen.sharpness * live
        agreement += chosen.agreement * live

    path = _follow(parents, best_at_end, lengths)
    on_path = [row.gather(1, path[:, step : step + 1]) for step, row in enumerate(gold_lprobs)]
    left = lengths.unsqueeze(1) - torch.arange(num_steps, device=gold.device)  # gold tokens from this step on
    weights = (left > 1).to(cumulative.dtype).masked_fill(left == 1, config.eos_weight)
    path_lprobs = (torch.cat(on_path, dim=1).masked_fill(left < 1, 0.0) * weights).sum(1)
    bound.take_unit(path_lprobs)
    return path_lprobs, BeamStats(sharpness.sum(), agreement.sum(), (lengths - 1).sum(), bound.stats)


def _smoothed(lprobs: Tensor, gold: Tensor, label_smoothing: float) -> Tensor:
    """Log-probability (bsz, beams) of the gold tokens (bsz,), smoothed as fairseq does it."""
    own = lprobs.gather(2, gold.view(-1, 1, 1).expand(-1, lprobs.size(1), 1))[..., 0]
    if label_smoothing == 0:
        return own
    other = label_smoothing / (lprobs.size(2) - 1)
    return (1 - label_smoothing - other) * own + other * lprobs.sum(2)


def _follow(parents: list[Tensor], best_at_end: Tensor, lengths: Tensor) -> Tensor:
    """The beam of the best hypothesis at every step, (bsz, T), from the back-pointers.

    Args:
        parents: for each step but the last, (bsz, k): the beam that each next beam continues.
        best_at_end: (bsz,), the best beam at the sentence's own last step.
        lengths: (bsz,).
    """
    beam = best_at_end
    path = [beam]
    for step in range(len(parents) - 1, -1, -1):
        parent = parents[step].gather(1, beam.unsqueeze(1)).squeeze(1)
        beam = torch.where(lengths > step + 1, parent, best_at_end)
        path.append(beam)
    return torch.stack(path[::-1], dim=1)
