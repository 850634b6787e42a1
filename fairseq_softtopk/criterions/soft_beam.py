"""The criterion ``soft_beam``: teacher forcing and a differentiable beam search, mixed.

    loss = rho * teacher forcing + (1 - rho) * soft beam        (paper, section I.2)

Teacher forcing feeds the gold tokens and is minus their log-likelihood.  The soft beam feeds what a beam search
would have written; its loss is the expected risk of its hypotheses or, as in the paper, minus the
log-likelihood of the gold tokens on its best path, and its gradient also goes through the selections.
"""

import logging
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, Optional

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.distributed import FullyShardedDataParallel
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, distributed, nn

from ..beam import (
    DETACH,
    OBJECTIVES,
    POST_PROCESSES,
    RELAXATIONS,
    BeamConfig,
    BeamStats,
    StepDecoder,
    WordJoiner,
    find_post_process,
    soft_beam_loss,
)
from ..decoders import step_decoder_for
from ..decoders.output import output_lprobs
from ..ops.problem import COST_SCALES, watched
from ..options import with_help
from ..schedules import SCHEDULES, Schedule

logger = logging.getLogger(__name__)

BROKEN = "the model has diverged, or its checkpoint or input is broken"

# A beam whose largest part is smaller than this is an average of the vocabulary.
LOW_SHARPNESS = 0.25

# What has no effect where an option has a certain value, and must be left at its default.
WITHOUT_EFFECT: dict[tuple[str, str], tuple[str, ...]] = {
    ("soft_beam_objective", "gold"): (
        "soft_beam_post_process",
        "soft_beam_brevity_smoothing",
        "soft_beam_hypotheses",
        "soft_beam_temperature",
    ),
    ("soft_beam_objective", "risk"): ("soft_beam_eos_weight",),
    ("teacher_forcing_ratio_schedule", "constant"): ("teacher_forcing_ratio_end",),
    ("soft_beam_epsilon_schedule", "constant"): ("soft_beam_epsilon_end",),
    ("soft_beam_relaxation", "hard"): (
        "soft_beam_cost_scale",
        "soft_beam_detach",
        "soft_beam_backward_epsilon",
    ),
}


@dataclass
class SoftBeamConfig(FairseqDataclass):
    """Options of ``--criterion soft_beam``."""

    teacher_forcing_ratio: float = with_help(
        0.0, "rho in [0, 1]: weight of the teacher-forcing loss; 1 runs no beam at all"
    )
    teacher_forcing_ratio_schedule: ChoiceEnum(SCHEDULES) = with_help(  # type: ignore[valid-type]
        "constant", "how rho goes from --teacher-forcing-ratio to --teacher-forcing-ratio-end"
    )
    teacher_forcing_ratio_end: float = with_help(0.0, "rho in [0, 1] at the end of its schedule")
    teacher_forcing_ratio_updates: int = with_help(
        0, "updates that the schedule takes, from --soft-beam-start-update on"
    )
    label_smoothing: float = with_help(
        0.0,
        "in [0, 1), 0 for none: share of a gold token's weight that goes to all tokens alike, in teacher "
        "forcing and the gold objective",
    )
    soft_beam_size: int = with_help(10, "k, the number of beams; at most the vocabulary less three")
    soft_beam_epsilon: float = with_help(
        0.01, "entropic weight of the selection, positive; in nats with --soft-beam-cost-scale none"
    )
    soft_beam_epsilon_schedule: ChoiceEnum(SCHEDULES) = with_help(  # type: ignore[valid-type]
        "constant", "how epsilon goes from --soft-beam-epsilon to --soft-beam-epsilon-end"
    )
    soft_beam_epsilon_end: float = with_help(0.001, "epsilon at the end of its schedule, positive")
    soft_beam_epsilon_updates: int = with_help(
        0, "updates that the schedule takes, from --soft-beam-start-update on"
    )
    soft_beam_candidates: int = with_help(
        64, "continuations per sentence that a selection looks at, at least the beam size"
    )
    soft_beam_cost_scale: ChoiceEnum(COST_SCALES) = with_help(  # type: ignore[valid-type]
        "none",
        "divide the cost by nothing, by its maximum over a sentence's candidates, or by its maximum over the "
        "batch; with the last two epsilon has no unit",
    )
    soft_beam_relaxation: ChoiceEnum(RELAXATIONS) = with_help(  # type: ignore[valid-type]
        "soft_topk",
        "what relaxes the choice of the beams: the sorted SOFT top-k operator; softmax_k: for each rank a "
        "softmax over what the ranks before it leave, with temperature epsilon; straight_through: the hard "
        "choice with the operator's gradient; hard: the hard choice without a gradient",
    )
    soft_beam_objective: ChoiceEnum(OBJECTIVES) = with_help(  # type: ignore[valid-type]
        "risk",
        "what the beam is trained for: risk: the expected sentence BLEU of its best finished hypotheses; gold: "
        "the log-probability of the gold tokens on its best path, as in the paper",
    )
    soft_beam_hypotheses: int = with_help(
        20, "finished hypotheses that share the risk, at least 2; for the risk"
    )
    soft_beam_temperature: float = with_help(
        0.1, "of the hypotheses' distribution, positive, in nats per token; for the risk"
    )
    soft_beam_post_process: ChoiceEnum(POST_PROCESSES) = with_help(  # type: ignore[valid-type]
        "auto",
        "what makes words of tokens, of which the BLEU of the risk is, as fairseq-generate's --post-process; "
        "auto: what the dictionary looks like",
    )
    soft_beam_brevity_smoothing: Optional[float] = with_help(
        None,
        "words or tokens by which a reference counts as longer in the brevity penalty of the risk's BLEU, at "
        "least 0, and at most a third of it counts; against outputs that become shorter. By itself 1 if pieces "
        "are joined to words, else 0",
    )
    soft_beam_score_grad_clip: float = with_help(
        0.01,
        "largest norm of the gradient that a selection passes to its scores, per sentence and step, in "
        "multiples of the gradient of the sentence's loss; 0 for no bound",
    )
    soft_beam_backward_epsilon: float = with_help(
        0.0, "epsilon of the selections' gradient; 0 for that of the selections themselves"
    )
    soft_beam_detach: ChoiceEnum(DETACH) = with_help(  # type: ignore[valid-type]
        "nothing",
        "where selections send no gradient: to the cumulative scores of the beams, or through the embeddings "
        "that they mix",
    )
    soft_beam_horizon: int = with_help(
        0, "steps over which a gradient flows through selections and decoder states; 0 for all"
    )
    soft_beam_eos_weight: float = with_help(
        1.0,
        "weight in [0, 1] of the gold end of sentence in the gold objective: it is scored at the gold length, "
        "after whatever the beam has written until then",
    )
    soft_beam_max_len: int = with_help(
        0,
        "steps that the beam takes at most, at least 2 for the risk; 0 for the length of the gold sentence, "
        "for the risk a fifth more and 2",
    )
    soft_beam_prefix_size: int = with_help(
        0,
        "tokens at the start of a target that are given, such as 1 for a language's token: the beam starts "
        "after them, and they are not in its loss",
    )
    soft_beam_start_update: int = with_help(0, "teacher forcing only before this update")
    soft_beam_prob: float = with_help(
        1.0, "probability in [0, 1] that an update runs the beam; the others are teacher forcing only"
    )
    soft_beam_recompute: bool = with_help(
        False, "compute each step again in the backward pass: less memory, more time"
    )
    sentence_avg: bool = II("optimization.sentence_avg")
    seed: int = II("common.seed")


def check_config(cfg: SoftBeamConfig, vocabulary: int) -> None:
    """Raises a one-line ``ValueError`` for the first option that is out of range.

    Args:
        cfg: the options.
        vocabulary: size of the target dictionary.
    """
    writable = vocabulary - 3  # a hypothesis never contains bos, pad, nor eos before its end
    size = cfg.soft_beam_size

    def require(in_range: bool, option: str, text: str) -> None:
        if not in_range:
            value = getattr(cfg, option)
            raise ValueError(f"--{option.replace('_', '-')} must {text}, got {value}")

    for option in (
        "teacher_forcing_ratio",
        "teacher_forcing_ratio_end",
        "soft_beam_eos_weight",
        "soft_beam_prob",
    ):
        require(0 <= getattr(cfg, option) <= 1, option, "lie in [0, 1]")
    require(0 <= cfg.label_smoothing < 1, "label_smoothing", "lie in [0, 1)")
    require(
        1 <= size <= writable,
        "soft_beam_size",
        f"lie in [1, {writable}] (the vocabulary of {vocabulary} less bos, pad and eos)",
    )
    for option in ("soft_beam_epsilon", "soft_beam_epsilon_end", "soft_beam_temperature"):
        require(0 < getattr(cfg, option) < math.inf, option, "be positive and finite")
    require(cfg.soft_beam_candidates >= size, "soft_beam_candidates", f"be at least --soft-beam-size {size}")
    require(cfg.soft_beam_hypotheses >= 2, "soft_beam_hypotheses", "be at least 2")
    require(
        0 <= cfg.soft_beam_backward_epsilon < math.inf, "soft_beam_backward_epsilon", "be at least 0 and finite"
    )
    require(
        cfg.soft_beam_brevity_smoothing is None or 0 <= cfg.soft_beam_brevity_smoothing < math.inf,
        "soft_beam_brevity_smoothing",
        "be at least 0 and finite",
    )
    for option in (
        "soft_beam_score_grad_clip",
        "soft_beam_horizon",
        "soft_beam_max_len",
        "soft_beam_prefix_size",
        "soft_beam_start_update",
    ):
        require(getattr(cfg, option) >= 0, option, "be at least 0")
    for option, known in (
        ("soft_beam_relaxation", RELAXATIONS),
        ("soft_beam_objective", OBJECTIVES),
        ("soft_beam_detach", DETACH),
        ("soft_beam_post_process", POST_PROCESSES),
        ("soft_beam_cost_scale", COST_SCALES),
    ):
        require(str(getattr(cfg, option)) in known, option, f"be one of {', '.join(known)}")
    require(
        str(cfg.soft_beam_relaxation) != "softmax_k" or str(cfg.soft_beam_cost_scale) == "none",
        "soft_beam_cost_scale",
        "be none with --soft-beam-relaxation softmax_k, which has no cost",
    )
    require(
        str(cfg.soft_beam_objective) != "risk" or cfg.soft_beam_max_len != 1,
        "soft_beam_max_len",
        "be 0 or at least 2 with --soft-beam-objective risk, which compares hypotheses",
    )
    for (option, choice), others in WITHOUT_EFFECT.items():
        for other in others if str(getattr(cfg, option)) == choice else ():
            value, neutral = getattr(cfg, other), getattr(SoftBeamConfig, other)
            value = value if isinstance(value, int | float | None) else str(value)
            unset = "left out" if neutral is None else neutral
            require(value == neutral, other, f"be {unset} with --{option.replace('_', '-')} {choice}")


def _schedule(cfg: SoftBeamConfig, option: str) -> Schedule:
    return Schedule(
        "--" + option.replace("_", "-"),
        getattr(cfg, option),
        getattr(cfg, option + "_end"),
        getattr(cfg, option + "_updates"),
        str(getattr(cfg, option + "_schedule")),
    )


@register_criterion("soft_beam", dataclass=SoftBeamConfig)
class SoftBeamCriterion(FairseqCriterion):
    """Mixes the teacher-forcing loss with the loss of a soft beam search.

    Args:
        task: a fairseq task with a target dictionary, such as ``translation``.
        cfg: the options.

    Raises:
        ValueError: if an option is out of range, or targets are padded on the left or start with a language's
            token that the beam is not told of, or languages have words of their own.
    """

    def __init__(self, task: Any, cfg: SoftBeamConfig) -> None:
        super().__init__(task)
        targets = _target_dictionaries(task)
        target = targets[0]
        check_config(cfg, min(map(len, targets)))
        _warn_of_processes_that_are_alone()
        options = getattr(task, "cfg", None) or getattr(task, "args", None)  # of tasks without a dataclass
        if utils.eval_bool(str(getattr(options, "left_pad_target", False))):
            raise ValueError("soft_beam wants targets padded on the right, got --left-pad-target True")
        if _starts_with_language(options) and cfg.soft_beam_prefix_size < 1:
            raise ValueError(
                "--soft-beam-prefix-size must be at least 1 where targets start with a language's token "
                f"(--decoder-langtok), got {cfg.soft_beam_prefix_size}"
            )
        self.rho = _schedule(cfg, "teacher_forcing_ratio")
        self.epsilon = _schedule(cfg, "soft_beam_epsilon")
        self.start_update, self.prob, self.seed = cfg.soft_beam_start_update, cfg.soft_beam_prob, cfg.seed
        self.label_smoothing, self.prefix_size = cfg.label_smoothing, cfg.soft_beam_prefix_size
        self.sentence_avg = cfg.sentence_avg
        self.num_updates: int | None = None
        self.unsynchronised_wrapper: str | None = None
        _on_train_step(task, self._before_batch)
        always_beam = (self.rho.start, self.rho.at(None), self.start_update, self.prob) == (0, 0, 0, 1)
        if cfg.label_smoothing > 0 and always_beam and str(cfg.soft_beam_objective) == "risk":
            _warn_once(
                "--label-smoothing has no effect on the risk, and with --teacher-forcing-ratio 0 none at all"
            )
        post_process = _post_process(targets, str(cfg.soft_beam_post_process))
        self.words = None if post_process == "none" else WordJoiner(target.symbols, post_process)
        brevity_smoothing = cfg.soft_beam_brevity_smoothing
        if brevity_smoothing is None:
            brevity_smoothing = 0.0 if self.words is None else 1.0
        never_beam = (self.rho.start, self.rho.at(None)) == (1, 1)
        if str(cfg.soft_beam_objective) == "risk" and not never_beam:
            logger.info(
                f"soft_beam: BLEU with post-process {post_process}, brevity smoothing {brevity_smoothing:g}"
            )
        self.beam = BeamConfig(
            size=cfg.soft_beam_size,
            epsilon=cfg.soft_beam_epsilon,
            relaxation=str(cfg.soft_beam_relaxation),
            cost_scale=str(cfg.soft_beam_cost_scale),
            backward_epsilon=cfg.soft_beam_backward_epsilon,
            num_candidates=cfg.soft_beam_candidates,
            eos=target.eos(),
            unk=target.unk(),
            never=(target.pad(), target.bos()),
            label_smoothing=cfg.label_smoothing,
            score_grad_bound=cfg.soft_beam_score_grad_clip,
            detach=str(cfg.soft_beam_detach),
            horizon=cfg.soft_beam_horizon,
            recompute=cfg.soft_beam_recompute,
            objective=str(cfg.soft_beam_objective),
            max_len=cfg.soft_beam_max_len,
            eos_weight=cfg.soft_beam_eos_weight,
            hypotheses=cfg.soft_beam_hypotheses,
            temperature=cfg.soft_beam_temperature,
            words=self.words,
            brevity_smoothing=brevity_smoothing,
        )

    def set_num_updates(self, num_updates: int) -> None:
        """Sets the number of updates that are done; to be called before every update, as under fairseq it is.

        Before the first call schedules stand at their end.
        """
        self.num_updates = num_updates

    def _before_batch(self, model: Any, num_updates: int) -> None:
        self.set_num_updates(num_updates)
        self.unsynchronised_wrapper = _unsynchronised_wrapper(model)

    def rho_and_epsilon(self) -> tuple[float, float]:
        """Rho and epsilon of this batch; rho is 1 for a batch without a beam.

        Every process and every batch of an update draws the same, and a resumed run what it would have drawn.
        """
        done = self.num_updates
        if done is not None and not self.training:
            done += 1  # since then, one update more
        since_start = None if done is None else done - self.start_update
        if since_start is not None and since_start < 0:
            return 1.0, self.epsilon.start
        if self.training and done is None and 0 < self.prob < 1:
            raise ValueError("--soft-beam-prob draws by the number of updates: set_num_updates was not called")
        if self.training and random.Random(f"{self.seed} {done}").random() >= self.prob:
            return 1.0, self.epsilon.at(since_start)
        return self.rho.at(since_start), self.epsilon.at(since_start)

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
            ValueError: if a target does not end with eos, or has nothing after its prefix.
            FloatingPointError: if a loss is not finite, or the beam meets a NaN (on an accelerator, where
                reading a number would make the host wait, an assertion on the device).  fairseq itself stops
                at gradients that are not finite, but not in validation, after which it writes checkpoints.
        """
        if not reduce:
            raise ValueError("soft_beam returns one loss per batch: reduce must be True, got False")
        if self.training and not hasattr(model, "module"):
            _refuse_wrapper(
                self.unsynchronised_wrapper,
                "a task that trains the parts of its model, such as a language pair,",
            )
        rho, epsilon = self.rho_and_epsilon()
        target = sample["target"]
        sample_size = target.size(0) if self.sentence_avg else sample["ntokens"]
        logging_output: dict[str, Any] = {
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample_size,
        }
        loss: Any = 0.0
        ratios = (self.rho.start, self.rho.at(None))
        if min(ratios) < 1:
            _refuse_sharding(model)
        if 0 in ratios:
            _refuse_ddp(model, "--teacher-forcing-ratio 0, also at an end of its schedule,")
        if min(ratios) < 1 and getattr(getattr(model, "decoder", None), "decoder_layerdrop", 0) > 0:
            _refuse_ddp(
                model, "--decoder-layerdrop, which drops other layers in the beam than in teacher forcing,"
            )
        with _encoder_output(model) as encoder_outs:
            if rho > 0 or not self.training:  # checkpoints may be chosen by it: validation always logs it
                teacher_forcing, likelihood = self.teacher_forcing(model, sample)
                _require_finite("teacher-forcing loss", teacher_forcing)
                logging_output["teacher_forcing_loss"] = likelihood.detach()
                loss = loss + rho * teacher_forcing
            else:
                model.encoder(**_encoder_input(sample))
        if rho < 1:
            soft_beam, stats = self.soft_beam(model, encoder_outs[0], sample, epsilon)
            _require_finite("soft beam's loss", soft_beam)
            logging_output.update(self._loggable(soft_beam, stats))
            loss = loss + (1 - rho) * soft_beam
        for name, schedule, value in (("rho", self.rho, rho), ("epsilon", self.epsilon, epsilon)):
            if schedule.kind != "constant":
                logging_output[name] = value * target.size(0)
        logging_output["loss"] = loss.detach()
        return loss, sample_size, logging_output

    def teacher_forcing(self, model: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of the gold tokens given the gold tokens before them, and their negative log-likelihood."""
        net_output = model(**sample["net_input"])
        if getattr(model.decoder, "adaptive_softmax", None) is not None:
            lprobs = output_lprobs(model.decoder, net_output[0])  # fairseq's own has no gradient
        else:
            lprobs = model.get_normalized_probs(net_output, log_probs=True)
        lprobs, target = lprobs.view(-1, lprobs.size(-1)), sample["target"].view(-1)
        if self.label_smoothing > 0:
            loss: tuple[Tensor, Tensor] = label_smoothed_nll_loss(
                lprobs, target, self.label_smoothing, ignore_index=self.padding_idx
            )
            return loss
        likelihood = F.nll_loss(lprobs, target, ignore_index=self.padding_idx, reduction="sum")
        return likelihood, likelihood

    def soft_beam(
        self, model: nn.Module, encoder_out: Any, sample: dict[str, Any], epsilon: float
    ) -> tuple[Tensor, BeamStats]:
        """The loss of a soft beam search: see :mod:`fairseq_softtopk.beam.loss`."""
        target = sample["target"][:, self.prefix_size :]
        lengths = target.ne(self.padding_idx).sum(1)
        _require(lengths > 0, "a target has nothing after --soft-beam-prefix-size tokens", ValueError)
        last = target.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
        complaint = "targets must end with eos, but some end otherwise, such as with a language's token"
        _require(last == self.beam.eos, complaint, ValueError)
        decoder = _CheckedSteps(step_decoder_for(model))
        _warn_of_own_forward(model)
        if self.words is not None:
            self.words.to(target.device)  # fairseq-validate leaves criterions where they are
        # Hypotheses may be longer than the gold sentence, but not than what the decoder has positions for.
        max_len = int(min(self.beam.max_len or math.inf, model.decoder.max_positions() - self.prefix_size))
        losses, stats = soft_beam_loss(
            decoder,
            encoder_out,
            first=sample["net_input"]["prev_output_tokens"][:, : self.prefix_size + 1],
            gold=target,
            lengths=lengths,
            config=replace(self.beam, epsilon=epsilon, max_len=max_len),
        )
        return losses.sum(), stats

    def _loggable(self, soft_beam: Tensor, stats: BeamStats) -> dict[str, Tensor]:
        """The sums to log; the backward pass fills in those of the gradient, before fairseq reads them."""
        loss = {"gold": "soft_beam_loss", "risk": "soft_beam_risk"}[self.beam.objective]
        return {
            loss: soft_beam.detach(),
            **{f"beam_{name}": value for name, value in stats._asdict().items() if name != "score_grad"},
            **{f"score_grad_{name}": value for name, value in stats.score_grad._asdict().items()},
        }

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Aggregates what :meth:`forward` logged; losses in bits, as fairseq logs them."""

        def total(key: str) -> float:
            return float(sum(log.get(key, 0) for log in logging_outputs))

        def log_mean(name: str, key: str, count: float, scale: float = 1.0, digits: int = 3) -> None:
            if count > 0 and any(key in log for log in logging_outputs):
                metrics.log_scalar(name, total(key) / count * scale, count, round=digits)

        ntokens, nsentences = total("ntokens"), total("nsentences")
        bits = 1 / math.log(2)
        log_mean("loss", "loss", total("sample_size"), bits)
        log_mean("teacher_forcing_loss", "teacher_forcing_loss", ntokens, bits)
        log_mean("soft_beam_loss", "soft_beam_loss", total("beam_gold_tokens"), bits)  # with a max_len, not all
        log_mean("soft_beam_risk", "soft_beam_risk", total("beam_tokens"))
        if any("teacher_forcing_loss" in log for log in logging_outputs):
            metrics.log_derived("ppl", _perplexity)
        selections = total("beam_selections")
        log_mean("sharpness", "beam_sharpness", selections)
        log_mean("agreement", "beam_agreement", selections)
        log_mean("gold_rank", "beam_gold_rank", total("beam_gold_tokens"), digits=1)
        log_mean("gold_on_beam", "beam_gold_on_beam", total("beam_sentences"))
        if any("soft_beam_risk" in log for log in logging_outputs):
            log_mean("beam_bleu", "beam_bleu", total("beam_sentences"), 100.0, digits=2)
        log_mean("score_grad_norm", "score_grad_norm", total("score_grad_total"))
        log_mean("score_grad_clipped", "score_grad_clipped", total("score_grad_total"))
        log_mean("rho", "rho", nsentences)
        log_mean("epsilon", "epsilon", nsentences, digits=5)
        if selections > 0:
            _warn_of_averages(total("beam_sharpness") / selections)

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


def _perplexity(meters: Any) -> float:
    """Teacher forcing's; NaN in an interval without any, where fairseq keeps the name of what it has logged."""
    bits = meters["teacher_forcing_loss"].avg
    return math.nan if bits is None else utils.get_perplexity(bits)


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _warn_of_processes_that_are_alone() -> None:
    """The processes of torchrun know of each other only if fairseq sees several devices, or is told to."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if (
        "RANK" in os.environ
        and processes != "1"
        and not (distributed.is_available() and distributed.is_initialized())
    ):
        _warn_once(
            f"this is one of {processes} processes, and each trains a model of its own: give fairseq "
            f"--distributed-world-size {processes} --distributed-rank $RANK --distributed-init-method env:// "
            "--distributed-no-spawn"
        )


def _warn_of_own_forward(model: nn.Module) -> None:
    """The beam calls a model's encoder and decoder, and nothing else that its forward pass may do."""
    while hasattr(model, "module"):  # what the trainer has put around it
        model = model.module
    for method in ("forward", "get_normalized_probs"):
        written_in = getattr(type(model), method).__module__
        if written_in.partition(".")[0] not in ("fairseq", "fairseq_softtopk"):
            _warn_once(
                f"{type(model).__name__} has its own {method}: the beam calls its encoder and its decoder, and "
                f"nothing else that {method} does"
            )


def _starts_with_language(options: Any) -> bool:
    """Whether the targets of ``translation_multi_simple_epoch`` start with the token of a language."""
    _, decoders = (getattr(options, "langtoks", None) or {}).get("main", (None, None))
    return bool(decoders) and not getattr(options, "lang_tok_replacing_bos_eos", False)


def _target_dictionaries(task: Any) -> list[Any]:
    """The dictionaries of a task's target languages."""
    pairs, dictionaries = getattr(task, "lang_pairs", None) or [], getattr(task, "dicts", None) or {}
    targets = {pair.partition("-")[2] for pair in pairs}
    own = [dictionary for language, dictionary in dictionaries.items() if language in targets]
    return own or [task.target_dictionary]


def _post_process(targets: list[Any], wanted: str) -> str:
    """What joins the tokens of these dictionaries; ``"auto"``: nothing, unless they are all the same."""
    symbols = targets[0].symbols
    one_dictionary = all(other.symbols == symbols for other in targets)
    if wanted == "auto":
        return find_post_process(symbols) if one_dictionary else "none"
    if wanted != "none" and not one_dictionary:
        raise ValueError(
            "--soft-beam-post-process must be none where target languages have dictionaries of their own, "
            f"got {wanted}"
        )
    return wanted


def _warn_of_averages(sharpness: float) -> None:
    if sharpness < LOW_SHARPNESS:
        _warn_once(
            f"the beams of soft_beam are averages (sharpness, the largest part of a beam, is below "
            f"{LOW_SHARPNESS}): lower --soft-beam-epsilon, or leave --soft-beam-cost-scale at none"
        )


def _on_train_step(task: Any, listener: Callable[[Any, int], None]) -> None:
    """Tells the listener, before every batch that ``task`` trains on, the model and how many updates are done.

    fairseq tells models and tasks, but not criterions.
    """
    train_step = getattr(task, "train_step", None)
    if train_step is None:
        return
    train_step = getattr(train_step, "without_listener", train_step)  # of a criterion before this one

    @wraps(train_step)
    def listening(
        sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, *args: Any, **kwargs: Any
    ) -> Any:
        listener(model, update_num)
        return train_step(sample, model, criterion, optimizer, update_num, *args, **kwargs)

    listening.without_listener = train_step  # type: ignore[attr-defined]
    task.train_step = listening


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
        # A logit that is NaN or +inf makes NaN of its whole log-softmax: one entry per beam tells.  With an
        # adaptive softmax, of its cluster: of others the selection complains.
        fine = ~lprobs.detach()[..., 0].isnan()
        _require(
            fine,
            f"the model's log-probabilities at step {self._steps} of the beam search contain NaN; {BROKEN}",
        )
        return lprobs, state


def _require_finite(name: str, loss: Tensor) -> None:
    value = loss.item() if watched(loss) else "not finite"
    _require(loss.detach().isfinite(), f"the {name} of a batch is {value}; {BROKEN}")


def _require(fine: Tensor, complaint: str, error: type[Exception] = FloatingPointError) -> None:
    """Stops where a tensor says that something is not fine, without waiting for an accelerator."""
    complaint = f"soft_beam: {complaint}"
    if not watched(fine):
        torch._assert_async(fine.all(), complaint)
    elif not bool(fine.all()):
        raise error(complaint)


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


def _refuse_ddp(model: nn.Module, what: str) -> None:
    """Refuses ``what`` under a wrapper that would not synchronise all gradients of it."""
    _refuse_wrapper(_unsynchronised_wrapper(model), what)


def _refuse_wrapper(wrapper: str | None, what: str) -> None:
    if wrapper is not None:
        raise ValueError(
            f"{what} wants --ddp-backend legacy_ddp with several processes: under {wrapper} "
            "gradients would stay unsynchronised"
        )


def _unsynchronised_wrapper(model: nn.Module) -> str | None:
    """The name of what the trainer has put around the model, if it synchronises only what it sees.

    PyTorch's DDP, SlowMo and sharding act on what runs through their own forward; ``legacy_ddp`` is told when
    to reduce the gradients, wherever they come from.
    """
    if not hasattr(model, "module") or hasattr(model, "all_reduce_grads"):
        return None
    *_, innermost = _wrappers(model)
    return type(innermost).__name__


def _refuse_sharding(model: nn.Module) -> None:
    """The beam calls parts of the model outside of ``model(...)``, where none of them has all its weights."""
    if any(isinstance(wrapper, FullyShardedDataParallel) for wrapper in _wrappers(model)):
        raise ValueError(
            "the beam cannot train with --ddp-backend fully_sharded, which has all weights only in the model's "
            "own forward pass: use legacy_ddp"
        )


def _wrappers(model: Any) -> Iterator[nn.Module]:
    """What the trainer has put around the model, from the outside."""
    while hasattr(model, "module"):
        yield model
        model = model.module
