"""From attention scores to attention weights, for every ``topk_attention`` architecture alike.

    w = softmax(f + ln A),      A = soft_topk(f, k, epsilon)        (paper, Appendix I.3)

A is the SOFT top-k indicator of the attention scores f over the real source positions; its logarithm
comes from the solver's exponent, so that a weight may be as small as it likes.
"""

import logging
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from torch import Tensor, nn

from ..ops import log_soft_topk
from ..options import with_help
from ..schedules import SCHEDULES, Schedule

logger = logging.getLogger(__name__)

RELAXATIONS = ("soft_topk", "softmax", "hard_topk", "sparsemax", "entmax15")
WITH_K = ("soft_topk", "hard_topk")
FROM_ENTMAX = ("sparsemax", "entmax15")
# Not the operator's "batch_max": a translation must not depend on what it is batched with.
SCALES = ("none", "max")


@dataclass
class RelaxationConfig(FairseqDataclass):
    """Options that all ``topk_attention`` architectures have."""

    attention_relaxation: ChoiceEnum(RELAXATIONS) = with_help(  # type: ignore[valid-type]
        "soft_topk",
        "soft_topk: attend to the k best; softmax: to all, as fairseq's own models do; hard_topk: a softmax "
        "over the k best and no others; sparsemax, entmax15: to those that these leave, which need the "
        "package entmax",
    )
    attention_top_k: int = with_help(5, "k: how many source tokens to attend to, at least 1")
    attention_epsilon: float = with_help(
        1.0, "entropic weight of the selection, positive; its unit is that of --attention-cost-scale"
    )
    attention_cost_scale: ChoiceEnum(SCALES) = with_help(  # type: ignore[valid-type]
        "none",
        "none: epsilon is in units of the attention score; max: it is a share of the largest cost of a choice, "
        "max_ij (f_i - b_j)^2 with the anchors b = 1, 0",
    )
    attention_epsilon_schedule: ChoiceEnum(SCHEDULES) = with_help(  # type: ignore[valid-type]
        "constant", "how epsilon goes from --attention-epsilon to --attention-epsilon-end"
    )
    attention_epsilon_end: float = with_help(0.01, "epsilon at the end of its schedule, positive")
    attention_epsilon_updates: int = with_help(0, "updates that the schedule takes")


class Relaxation(nn.Module):
    """Attention weights of attention scores.

    Its epsilon is that of the model's last update, whose number is saved in checkpoints, so that a model
    translates with the epsilon that it was trained with last.

    Args:
        kind: one of :data:`RELAXATIONS`.
        k: how many positions to attend to; a source shorter than k gets a plain softmax.
        epsilon: entropic weight of the selection, in units of the attention score.
        cost_scale: what the cost of the selection is divided by, see :func:`..ops.soft_topk`.

    Raises:
        ValueError: if ``kind`` or ``cost_scale`` is unknown, or k or epsilon is out of range.
        ImportError: if ``kind`` needs the package entmax and it is not there.
    """

    def __init__(
        self, kind: str = "softmax", k: int = 1, epsilon: float | Schedule = 1.0, cost_scale: str = "none"
    ) -> None:
        super().__init__()
        if not isinstance(epsilon, Schedule):
            epsilon = Schedule("--attention-epsilon", epsilon, epsilon, 0, "constant")
        if kind not in RELAXATIONS:
            raise ValueError(f"--attention-relaxation must be one of {', '.join(RELAXATIONS)}, got {kind}")
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"--attention-top-k must be a whole number, at least 1, got {k}")
        if kind == "hard_topk" and k == 1:
            raise ValueError("hard_topk wants --attention-top-k of at least 2: a single score has no gradient")
        for end, value in (("", epsilon.start), ("-end", epsilon.end)):
            if not 0 < value < math.inf:
                raise ValueError(f"{epsilon.name}{end} must be positive and finite, got {value}")
        if cost_scale not in SCALES:
            raise ValueError(f"--attention-cost-scale must be one of {', '.join(SCALES)}, got {cost_scale}")
        for name, given, default in (
            (f"{epsilon.name}-schedule", epsilon.kind, "constant"),
            ("--attention-cost-scale", cost_scale, "none"),
        ):
            if given != default and kind != "soft_topk":
                raise ValueError(f"{name} wants --attention-relaxation soft_topk, got {kind}")
        if kind in FROM_ENTMAX and find_spec("entmax") is None:
            raise ImportError(f"--attention-relaxation {kind} needs the package entmax: pip install entmax")
        self.kind, self.k, self.schedule, self.cost_scale = kind, k, epsilon, cost_scale
        self.num_updates = 0.0

    @classmethod
    def from_args(cls, args: Namespace) -> "Relaxation":
        """What the options of :class:`RelaxationConfig` ask for; one that is absent has its default."""
        given = RelaxationConfig(
            **{
                name: getattr(args, name)
                for name in RelaxationConfig.__dataclass_fields__
                if hasattr(args, name)
            }
        )
        kind, end = str(given.attention_epsilon_schedule), given.attention_epsilon_end
        if kind == "constant" and end != RelaxationConfig.attention_epsilon_end:
            raise ValueError(f"--attention-epsilon-end wants an --attention-epsilon-schedule, got {end}")
        epsilon = Schedule(
            "--attention-epsilon",
            given.attention_epsilon,
            end,
            given.attention_epsilon_updates,
            kind,
        )
        relaxation = cls(
            str(given.attention_relaxation), given.attention_top_k, epsilon, str(given.attention_cost_scale)
        )
        for name, has_effect in (
            ("attention_top_k", relaxation.kind in WITH_K),
            ("attention_epsilon", relaxation.kind == "soft_topk"),
        ):
            if not has_effect and getattr(given, name) != getattr(RelaxationConfig, name):
                option = f"--{name.replace('_', '-')}"
                logger.warning("%s has no effect with --attention-relaxation %s", option, relaxation.kind)
        return relaxation

    @property
    def epsilon(self) -> float:
        """Epsilon of the moment."""
        return self.schedule.at(self.num_updates)

    def forward(self, scores: Tensor) -> Tensor:
        """Weights that sum to 1 over the last dimension, float32 or wider.

        Args:
            scores: (..., srclen), ``-inf`` at padding, where the weight is 0.  Where another is not finite, or
                all are padding, the weights are NaN, as a softmax has it.
        """
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.kind == "soft_topk":
            if scores.size(-1) > self.k:
                scores = scores + self._log_selection(scores)
        elif self.kind == "hard_topk":
            best = scores.topk(min(self.k, scores.size(-1)), dim=-1)
            scores = torch.full_like(scores, -math.inf).scatter(-1, best.indices, best.values)
        elif self.kind in FROM_ENTMAX:
            return self._from_entmax(scores)
        return torch.softmax(scores, dim=-1)

    def _log_selection(self, scores: Tensor) -> Tensor:
        """The logarithm of A; 0 where no more than k positions are real."""
        choice = ((scores != -math.inf).sum(-1, keepdim=True) > self.k) & (scores < math.inf).all(
            -1, keepdim=True
        )
        log_weights = log_soft_topk(
            scores.where(choice, 0.0), self.k, epsilon=self.epsilon, cost_scale=self.cost_scale
        )
        return log_weights.where(choice, 0.0)

    def _from_entmax(self, scores: Tensor) -> Tensor:
        best = scores.detach().amax(-1, keepdim=True)
        valid = best.isfinite()  # what is not would end both in an index out of range, for all rows
        # Both give what is 2 below the best a weight of exactly 0; -inf would become NaN.
        scores = (scores - best).masked_fill(scores == -math.inf, -4.0).where(valid, 0.0)
        transform: Callable[..., Tensor] = getattr(import_module("entmax"), self.kind)
        return transform(scores, dim=-1).where(valid, math.nan)

    # fairseq calls the next one before every update, and the last one on what it loads.

    def set_num_updates(self, num_updates: int) -> None:
        """Sets the number of the update that follows, counted from 0."""
        self.num_updates = num_updates

    def get_extra_state(self) -> Tensor:
        """The number of the last update, as floating point, so that fairseq averages it like parameters."""
        return torch.tensor(float(self.num_updates))

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what a checkpoint says."""
        self.num_updates = float(state)

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Lets fairseq's own models load as these architectures."""
        state_dict.setdefault(f"{name}._extra_state", self.get_extra_state())

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        shown = self.kind
        if self.kind in WITH_K:
            shown += f", k={self.k}"
        if self.kind == "soft_topk":
            shown += f", epsilon={self.epsilon:g}, cost_scale={self.cost_scale}"
        return shown
