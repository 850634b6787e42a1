"""The attention layer of ``topk_attention``, over one or several beams of a sentence.

    w = softmax(f + ln A),      A = soft_topk(f, k, epsilon)        (paper, Appendix I.3)

A is the SOFT top-k indicator of the attention scores f over the real source positions; its logarithm
comes from the solver's exponent, so that a weight may be as small as it likes.
"""

from __future__ import annotations

import math

import torch
from fairseq.models.lstm import AttentionLayer
from torch import Tensor, nn

from ..ops import log_soft_topk


class BeamAttentionLayer(AttentionLayer):
    """fairseq's dot-product attention, with any number of queries per sentence.

    The beams of a sentence attend to the same source: it is never repeated.

    Args:
        attention: the layer whose projections it takes over.
    """

    def __init__(self, attention: AttentionLayer) -> None:
        nn.Module.__init__(self)
        self.input_proj, self.output_proj = attention.input_proj, attention.output_proj

    def forward(
        self, input: Tensor, source_hids: Tensor, encoder_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attends once.

        Args:
            input: (bsz x beams, H), the decoder's hidden states, the beams of a sentence side by side.
            source_hids: (srclen, bsz, C).
            encoder_padding_mask: (srclen, bsz), True at padding.

        Returns:
            The attention outputs (bsz x beams, H) and the weights (srclen, bsz x beams).
        """
        source = source_hids.transpose(0, 1)  # (bsz, srclen, C)
        queries = self.input_proj(input).view(source.size(0), -1, source.size(2))
        scores = queries @ source.transpose(1, 2)  # (bsz, beams, srclen)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if encoder_padding_mask is not None:
            scores = scores.masked_fill(encoder_padding_mask.t().unsqueeze(1), -math.inf)
        weights = self.attend(scores).to(source.dtype)
        context = (weights @ source).flatten(0, 1)  # (bsz x beams, C)
        output = torch.tanh(self.output_proj(torch.cat((context, input), dim=1)))
        return output, weights.flatten(0, 1).t()

    def attend(self, scores: Tensor) -> Tensor:
        """Weights of scores (..., srclen), ``-inf`` at padding; they sum to 1 over the source."""
        return torch.softmax(scores, dim=-1)


class TopKAttentionLayer(BeamAttentionLayer):
    """Attention that looks at k source positions.

    Args:
        attention: the layer whose projections it takes over.
        k: how many positions to attend to; a source shorter than k gets a plain softmax.
        epsilon: entropic weight of the selection, in units of the attention score.
    """

    def __init__(self, attention: AttentionLayer, k: int, epsilon: float) -> None:
        super().__init__(attention)
        self.k, self.epsilon = k, epsilon

    def attend(self, scores: Tensor) -> Tensor:
        """``softmax(f + ln A)``."""
        k = (scores != -math.inf).sum(-1).clamp(max=self.k)
        return torch.softmax(scores + log_soft_topk(scores, k, epsilon=self.epsilon), dim=-1)
