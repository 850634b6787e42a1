"""The attention layers of the LSTM architecture, over one or several beams of a sentence.

With h_j the encoder's state at position j, and s the decoder's state, the score of j is

    general: s^T W h_j      dot: s^T h_j      (Luong et al. 2015, eq. 8)
    mlp:     v^T tanh(W s + U h_j)            (Bahdanau et al. 2015, Appendix A.1.2)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fairseq.models import FairseqEncoder
from fairseq.models.lstm import AttentionLayer, LSTMEncoder
from torch import Tensor, nn

from .relaxation import Relaxation

SCORES = ("general", "dot", "mlp")


class BeamAttentionLayer(AttentionLayer):
    """fairseq's attention (``general``), with any number of queries per sentence, and any relaxation.

    The beams of a sentence attend to the same source: it is never repeated.

    Args:
        attention: the layer whose projections it takes over.
        relaxation: from scores to weights; a softmax if there is none.
    """

    def __init__(self, attention: AttentionLayer, relaxation: Relaxation | None = None) -> None:
        nn.Module.__init__(self)
        self.input_proj, self.output_proj = attention.input_proj, attention.output_proj
        self.relaxation = Relaxation() if relaxation is None else relaxation

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
        scores, source = self.score(input.unflatten(0, (source.size(0), -1)), source)  # (bsz, beams, srclen)
        if encoder_padding_mask is not None:
            scores = scores.masked_fill(encoder_padding_mask.t().unsqueeze(1), -math.inf)
        weights = self.relaxation(scores).to(source.dtype)
        context = (weights @ source).flatten(0, 1)  # (bsz x beams, C)
        output = torch.tanh(self.output_proj(torch.cat((context, input), dim=1)))
        return output, weights.flatten(0, 1).t()

    def score(self, input: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (bsz, beams, srclen) of (bsz, beams, H) and (bsz, srclen, C), and the source to average."""
        return self.input_proj(input) @ source.transpose(1, 2), source


class DotAttentionLayer(BeamAttentionLayer):
    """Attention whose score is the scalar product of the two states, which must have the same size.

    Args:
        attention: the layer whose output projection it takes over.
        relaxation: from scores to weights.

    Raises:
        ValueError: if the encoder's and the decoder's states have different sizes.
    """

    def __init__(self, attention: AttentionLayer, relaxation: Relaxation) -> None:
        query_dim, source_dim = attention.input_proj.in_features, attention.input_proj.out_features
        if query_dim != source_dim:
            raise ValueError(
                "--attention-score dot wants encoder and decoder states of one size, got an encoder output of "
                f"{source_dim} and --decoder-hidden-size {query_dim}"
            )
        super().__init__(attention, relaxation)
        del self.input_proj

    def score(self, input: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`BeamAttentionLayer`."""
        return input @ source.transpose(1, 2), source


class MLPAttentionLayer(BeamAttentionLayer):
    """Attention whose score is a network with one hidden layer, as wide as the decoder's state.

    Its source is the output of a :class:`KeyedEncoder`, which holds U: U h_j is computed once per sentence.

    Args:
        attention: the layer whose output projection it takes over.
        relaxation: from scores to weights.
    """

    def __init__(self, attention: AttentionLayer, relaxation: Relaxation) -> None:
        super().__init__(attention, relaxation)
        hidden_dim = attention.input_proj.in_features
        self.input_proj = _linear(hidden_dim, hidden_dim)
        self.score_proj = _linear(hidden_dim, 1)
        self.hidden_dim = hidden_dim

    def score(self, input: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`BeamAttentionLayer`; the source (bsz, srclen, C + H) holds the keys, too."""
        source, keys = source.split((source.size(2) - self.hidden_dim, self.hidden_dim), dim=2)
        hidden = torch.tanh(self.input_proj(input).unsqueeze(2) + keys.unsqueeze(1))  # (bsz, beams, srclen, H)
        return self.score_proj(hidden).squeeze(3), source


class SourceSideEncoder(LSTMEncoder):
    """fairseq's encoder, with its output on the side on which the source is padded.

    ``LSTMEncoder`` moves the padding from the left to the right and leaves it there, where alignments that are
    read against the source are off by it.

    Args:
        encoder: the encoder whose parameters it takes over.
    """

    def __init__(self, encoder: LSTMEncoder) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(encoder))

    def forward(
        self, src_tokens: Tensor, src_lengths: Tensor, enforce_sorted: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the encoder returns, with position j that of source token j."""
        states, hiddens, cells, padding_mask = super().forward(src_tokens, src_lengths, enforce_sorted)
        on_the_left = src_tokens.eq(self.padding_idx).long().cumprod(1).sum(1)  # (bsz,)
        positions = torch.arange(len(states), device=states.device).unsqueeze(1)
        moved = (positions - on_the_left) % len(states)  # (srclen, bsz)
        states = states.gather(0, moved.unsqueeze(2).expand_as(states))
        return states, hiddens, cells, padding_mask.gather(0, moved)


class KeyedEncoder(FairseqEncoder):
    """An LSTM encoder whose output (srclen, bsz, C + keys_dim) holds U h_j beside each h_j.

    Args:
        encoder: fairseq's ``LSTMEncoder``.
        keys_dim: size of a key.
    """

    def __init__(self, encoder: FairseqEncoder, keys_dim: int) -> None:
        super().__init__(encoder.dictionary)
        self.encoder = encoder
        self.keys_proj = _linear(encoder.output_units, keys_dim)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """What the encoder returns, with the keys."""
        states, *others = self.encoder(*args, **kwargs)
        return torch.cat((states, self.keys_proj(states)), dim=2), *others

    def reorder_encoder_out(self, encoder_out: tuple[Tensor, ...], new_order: Tensor) -> tuple[Tensor, ...]:
        """Sentences in another order, as the encoder does it."""
        reordered: tuple[Tensor, ...] = self.encoder.reorder_encoder_out(encoder_out, new_order)
        return reordered

    def max_positions(self) -> Any:
        """Longest source that the encoder takes."""
        return self.encoder.max_positions()


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """Without a bias, and with the initial weights of fairseq's LSTM."""
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.uniform_(linear.weight, -0.1, 0.1)
    return linear
