"""The end of a decoder step: from features to log-probabilities, for every fairseq decoder alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fairseq.modules import AdaptiveSoftmax
from torch import Tensor, nn


def output_lprobs(decoder: nn.Module, features: Tensor) -> Tensor:
    """Log-probabilities of the next token.

    Args:
        decoder: a fairseq decoder with an ``output_layer`` and an ``adaptive_softmax``, which may be None.
        features: (bsz, beams, H).

    Returns:
        (bsz, beams, V), float32 or wider: fairseq's own would take float64 down to float32.
    """
    if decoder.adaptive_softmax is not None:
        return _adaptive_lprobs(decoder.adaptive_softmax, features)
    return _log_softmax(decoder.output_layer(features))


def _adaptive_lprobs(adaptive: AdaptiveSoftmax, features: Tensor) -> Tensor:
    """The whole distribution; ``AdaptiveSoftmax.get_log_prob`` works in place and has no gradient."""
    features = adaptive.dropout_module(features)
    shortlist, *priors = _log_softmax(adaptive.head(features)).split(
        [adaptive.cutoff[0]] + [1] * len(adaptive.tail), dim=-1
    )
    tails = [prior + _log_softmax(tail(features)) for prior, tail in zip(priors, adaptive.tail, strict=True)]
    return torch.cat([shortlist, *tails], dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
