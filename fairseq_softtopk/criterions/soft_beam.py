"""The criterion ``soft_beam``: teacher forcing and a differentiable beam search, mixed.

    loss = rho * teacher forcing + (1 - rho) * soft beam        (paper, section I.2)

Both parts are negative log-likelihoods of the same gold tokens.  Teacher forcing feeds the gold tokens; the
soft beam feeds what a beam search would have written, and its gradient also goes through the selections.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from ..beam import RELAXATIONS, BeamConfig, BeamStats, StepDecoder, gold_lprobs_on_best_path
from ..decoders import step_decoder_for
from ..ops.problem import COST_SCALES, watched


@dataclass
class SoftBeamConfig(FairseqDataclass):
    """Options of ``--criterion soft_beam``."""

    teacher_forcing_ratio: float = field(
        default=0.8,
        metadata={"help": "rho in [0, 1]: weight of the teacher-forcing loss; 1 runs no beam at all"},
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "in [0, 1), 0 for none: share of a gold token's weight that goes to all tokens alike"
        },
    )
    soft_beam_size: int = field(
        default=5, metadata={"help": "k, the number of beams; at most the vocabulary less three"}
    )
    soft_beam_epsilon: float = field(
        default=0.1,
        metadata={
            "help": "entropic weight of the selection, positive; in nats with --soft-beam-cost-scale none"
        },
    )
    soft_beam_candidates: int = field(
        default=64,
        metadata={"help": "continuations per sentence that a selection looks at, at least the beam size"},
    )
    soft_beam_cost_scale: ChoiceEnum(COST_SCALES) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "divide the cost by nothing, by its maximum over a sentence's candidates, or by its "
            "maximum over the batch; with the last two epsilon has no unit"
        },
    )
    soft_beam_relaxation: ChoiceEnum(RELAXATIONS) = field(  # type: ignore[valid-type]
        default="soft_topk",
        metadata={
            "help": "what relaxes the choice of the beams: the sorted SOFT top-k operator; softmax_k: for each "
            "rank a softmax over what the ranks before it leave, with temperature epsilon; straight_through: "
            "the hard choice with the operator's gradient; hard: the hard choice without a gradient"
        },
    )
    soft_beam_score_grad_clip: float = field(
        default=0.5,
        metadata={
            "help": "largest norm of the gradient that a selection passes to its scores, per sentence and "
            "step, in multiples of the gradient of one gold log-probability; 0 for no bound"
        },
    )
    soft_beam_eos_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight in [0, 1] of the gold end of sentence in the soft beam's loss: it is scored at the "
            "gold length, after whatever the beam has written until then"
        },
    )
    sentence_avg: bool = II("optimization.sentence_avg")


def check_config(cfg: SoftBeamConfig, vocabulary: int) -> None:
    """Raises a one-line ``ValueError`` for the first option that is out of range.

    Args:
        cfg: the options.
        vocabulary: size of the target dictionary.
    """
    writable = vocabulary - 3  # a hypothesis never contains bos, pad, nor eos before its end
    size, candidates = cfg.soft_beam_size, cfg.soft_beam_candidates
    if not 0 <= cfg.teacher_forcing_ratio <= 1:
        raise ValueError(f"--teacher-forcing-ratio must lie in [0, 1], got {cfg.teacher_forcing_ratio}")
    if not 0 <= cfg.label_smoothing < 1:
        raise ValueError(f"--label-smoothing must lie in [0, 1), got {cfg.label_smoothing}")
    if not 1 <= size <= writable:
        raise ValueError(
            f"--soft-beam-size must lie in [1, {writable}] (the vocabulary of {vocabulary} less bos, pad "
            f"and eos), got {size}"
        )
    if not 0 < cfg.soft_beam_epsilon < math.inf:
        raise ValueError(f"--soft-beam-epsilon must be positive and finite, got {cfg.soft_beam_epsilon}")
    if candidates < size:
        raise ValueError(f"--soft-beam-candidates must be at least --soft-beam-size {size}, got {candidates}")
    if not cfg.soft_beam_score_grad_clip >= 0:
        raise ValueError(f"--soft-beam-score-grad-clip must be at least 0, got {cfg.soft_beam_score_grad_clip}")
    if str(cfg.soft_beam_relaxation) not in RELAXATIONS:
        raise ValueError(
            f"--soft-beam-relaxation must be one of {', '.join(RELAXATIONS)}, got {cfg.soft_beam_relaxation}"
        )
    if str(cfg.soft_beam_relaxation) == "softmax_k" and str(cfg.soft_beam_cost_scale) != "none":
        raise ValueError(
            "--soft-beam-cost-scale must be none with --soft-beam-relaxation softmax_k, which has no cost, "
            f"got {cfg.soft_beam_cost_scale}"
        )
    if not 0 <= cfg.soft_beam_eos_weight <= 1:
        raise ValueError(f"--soft-beam-eos-weight must lie in [0, 1], got {cfg.soft_beam_eos_weight}")
    if str(cfg.soft_beam_cost_scale) not in COST_SCALES:
        raise ValueError(
            f"--soft-beam-cost-scale must be one of {', '.join(COST_SCALES)}, got {cfg.soft_beam_cost_scale}"
        )


@register_criterion("soft_beam", dataclass=SoftBeamConfig)
class SoftBeamCriterion(FairseqCriterion):
    """Mixes the teacher-forcing loss with the loss of a soft beam search.

    Args:
        task: a fairseq task with a target dictionary, such as ``translation``.
        cfg: the options.

    Raises:
        ValueError: if an option is out of range, or targets are padded on the left.
    """

    def __init__(self, task: Any, cfg: SoftBeamConfig) -> None:
        super().__init__(task)
        target = task.target_dictionary
        check_config(cfg, len(target))
        if getattr(getattr(task, "cfg", None), "left_pad_target", False):
            raise ValueError("soft_beam wants targets padded on the right, got --left-pad-target True")
        self.rho = cfg.teacher_forcing_ratio
        self.label_smoothing = cfg.label_smoothing
        self.sentence_avg = cfg.sentence_avg
        self.beam = BeamConfig(
            size=cfg.soft_beam_size,
            epsilon=cfg.soft_beam_epsilon,
            num_candidates=cfg.soft_beam_candidates,
            cost_scale=str(cfg.soft_beam_cost_scale),
            relaxation=str(cfg.soft_beam_relaxation),
            score_grad_bound=cfg.soft_beam_score_grad_clip,
            eos_weight=cfg.soft_beam_eos_weight,
            label_smoothing=cfg.label_smoothing,
            eos=target.eos(),
            never=(target.pad(), target.bos()),
        )

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """The loss of a batch, summed over its tokens.

        Args:
            model: an encoder-decoder whose decoder :func:`step_decoder_for` knows.
            sample: a batch of fairseq's ``LanguagePairDataset``.
            reduce: must be True.

        Returns:
            The loss (nats), the sample size that it is to be divided by, and what to log.

        Raises:
            FloatingPointError: if a loss is not finite, or the beam meets a NaN (on an accelerator, where
                reading a number would make the host wait, an assertion on the device).  fairseq itself stops
                at gradients that are not finite, but not in validation, after which it writes checkpoints.
        """
        if not reduce:
            raise ValueError("soft_beam returns one loss per batch: reduce must be True, got False")
        target = sample["target"]
        sample_size = target.size(0) if self.sentence_avg else sample["ntokens"]
        logging_output: dict[str, Any] = {
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample_size,
        }
        loss: Any = 0.0
        with _encoder_output(model) as encoder_outs:
            if self.rho > 0:
                teacher_forcing, likelihood = self.teacher_forcing(model, sample)
                _require_finite("teacher-forcing loss", teacher_forcing)
                logging_output["teacher_forcing_loss"] = likelihood.detach()
                loss = loss + self.rho * teacher_forcing
            else:
                _refuse_ddp(model)
                model.encoder(**_encoder_input(sample))
        if self.rho < 1:
            soft_beam, stats = self.soft_beam(model, encoder_outs[0], sample)
            _require_finite("soft beam's loss", soft_beam)
            logging_output.update(_loggable(soft_beam, stats))
            loss = loss + (1 - self.rho) * soft_beam
        logging_output["loss"] = loss.detach()
        return loss, sample_size, logging_output

    def teacher_forcing(self, model: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of the gold tokens given the gold tokens before them, and their negative log-likelihood."""
        lprobs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
        lprobs, target = lprobs.view(-1, lprobs.size(-1)), sample["target"].view(-1)
        if self.label_smoothing > 0:
            loss: tuple[Tensor, Tensor] = label_smoothed_nll_loss(
                lprobs, target, self.label_smoothing, ignore_index=self.padding_idx
            )
            return loss
        likelihood = F.nll_loss(lprobs, target, ignore_index=self.padding_idx, reduction="sum")
        return likelihood, likelihood

    def soft_beam(self, model: nn.Module, encoder_out: Any, sample: dict[str, Any]) -> tuple[Tensor, BeamStats]:
        """The negative log-likelihood of the gold tokens on the best path of the soft beam search."""
        target = sample["target"]
        path_lprobs, stats = gold_lprobs_on_best_path(
            _CheckedSteps(step_decoder_for(model)),
            encoder_out,
            first=sample["net_input"]["prev_output_tokens"][:, :1],
            gold=target,
            lengths=target.ne(self.padding_idx).sum(1),
            config=self.beam,
        )
        return -path_lprobs.sum(), stats

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Aggregates what :meth:`forward` logged; losses in bits, as fairseq logs them."""

        def total(key: str) -> float:
            return float(sum(log.get(key, 0) for log in logging_outputs))

        def log_mean(name: str, key: str, count: float, scale: float = 1.0, digits: int = 3) -> None:
            if count > 0 and any(key in log for log in logging_outputs):
                metrics.log_scalar(name, total(key) / count * scale, count, round=digits)

        ntokens, selections = total("ntokens"), total("beam_selections")
        bits = 1 / math.log(2)
        log_mean("loss", "loss", total("sample_size"), bits)
        log_mean("teacher_forcing_loss", "teacher_forcing_loss", ntokens, bits)
        log_mean("soft_beam_loss", "soft_beam_loss", ntokens, bits)
        # Perplexity is teacher forcing's where there is one, so that runs with any rho compare.
        likelihood = (
            "teacher_forcing_loss"
            if any("teacher_forcing_loss" in log for log in logging_outputs)
            else "soft_beam_loss"
        )
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters[likelihood].avg))
        log_mean("sharpness", "beam_sharpness", selections)
        log_mean("agreement", "beam_agreement", selections)
        gradients = total("score_grad_count")
        log_mean("score_grad_norm", "score_grad_norm", gradients)
        log_mean("score_grad_clipped", "score_grad_clipped", gradients)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is a sum, so ranks may add theirs up before :meth:`reduce_metrics`."""
        return True


@dataclass
class SoftBeamSearchConfig(SoftBeamConfig):
    """Options of ``--criterion soft_beam_search``, the alias of ``soft_beam``."""


@register_criterion("soft_beam_search", dataclass=SoftBeamSearchConfig)
class SoftBeamSearchCriterion(SoftBeamCriterion):
    """``soft_beam`` under its other name."""


class _CheckedSteps:
    """A step decoder that stops at the first step whose log-probabilities are not numbers."""

    def __init__(self, decoder: StepDecoder) -> None:
        self._decoder = decoder
        self._steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self, embeddings: Tensor, state: Any) -> tuple[Tensor, Any]:
        """A step of the decoder."""
        lprobs, state = self._decoder.step(embeddings, state)
        self._steps += 1
        # A logit that is NaN or +inf makes NaN of its whole log-softmax: one entry per beam tells.
        fine = ~lprobs.detach()[..., 0].isnan()
        _require(fine, f"the model's log-probabilities at step {self._steps} of the beam search contain NaN")
        return lprobs, state


def _require_finite(name: str, loss: Tensor) -> None:
    fine = loss.detach().isfinite()
    _require(fine, f"the {name} of a batch is {loss.item() if watched(loss) else 'not finite'}")


def _require(fine: Tensor, complaint: str) -> None:
    """Stops where a tensor says that something is not fine, without waiting for an accelerator."""
    complaint = f"soft_beam: {complaint}; the model has diverged, or its checkpoint or input is broken"
    if not watched(fine):
        torch._assert_async(fine.all(), complaint)
    elif not bool(fine.all()):
        raise FloatingPointError(complaint)


def _loggable(soft_beam: Tensor, stats: BeamStats) -> dict[str, Tensor]:
    """The sums to log; those of the gradient are filled in by the backward pass, before fairseq reads them."""
    return {
        "soft_beam_loss": soft_beam.detach(),
        "beam_sharpness": stats.sharpness,
        "beam_agreement": stats.agreement,
        "beam_selections": stats.selections,
        "score_grad_norm": stats.score_grad.norm,
        "score_grad_clipped": stats.score_grad.clipped,
        "score_grad_count": stats.score_grad.total,
    }


@contextmanager
def _encoder_output(model: nn.Module) -> Iterator[list[Any]]:
    """Keeps what the model's encoder returns inside the block, so that the beam need not encode again."""
    outputs: list[Any] = []
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            f"soft_beam trains encoder-decoder models, got {type(model).__name__} without an encoder"
        )
    handle = encoder.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _encoder_input(sample: dict[str, Any]) -> dict[str, Any]:
    net_input = sample["net_input"]
    return {key: value for key, value in net_input.items() if key != "prev_output_tokens"}


def _refuse_ddp(model: nn.Module) -> None:
    """Only a wrapper that is told to reduce the gradients is of use where ``model(...)`` is never called.

    That is ``legacy_ddp``.  The others (PyTorch's DDP, SlowMo, sharding) act on what runs through their
    own forward.
    """
    if hasattr(model, "module") and not hasattr(model, "all_reduce_grads"):
        raise ValueError(
            "--teacher-forcing-ratio 0 with several processes wants --ddp-backend legacy_ddp: under "
            f"{_innermost_wrapper(model)} gradients would stay unsynchronised"
        )


def _innermost_wrapper(model: nn.Module) -> str:
    while hasattr(model.module, "module"):
        model = model.module
    return type(model).__name__
