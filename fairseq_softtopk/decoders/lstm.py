"""One step of fairseq's LSTM decoder on embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fairseq.models.lstm import AttentionLayer, LSTMDecoder
from torch import Tensor

from ..models.attention import BeamAttentionLayer
from .checks import require_methods_of
from .mixing import mix_beams, mix_embeddings
from .output import output_lprobs

EncoderOut = tuple[Tensor, Tensor, Tensor, Tensor | None]


class LSTMState(NamedTuple):
    """The whole recurrent state of bsz x beams hypotheses, and what they attend to.

    Attributes:
        hiddens: per layer, (bsz, beams, H).
        cells: per layer, (bsz, beams, H).
        input_feed: (bsz, beams, H), the last attention output.
        encoder_out: fairseq's four encoder outputs, shared by the beams of a sentence.
    """

    hiddens: list[Tensor]
    cells: list[Tensor]
    input_feed: Tensor
    encoder_out: EncoderOut


class LSTMStepDecoder:
    """Drives an ``LSTMDecoder``, or a subclass with the same loop (``topk_attention`` is one).

    ``LSTMDecoder.forward`` takes token ids and has no hook for a single step, so :meth:`step` follows the
    body of its loop; a test holds the two against each other.

    Raises:
        ValueError: if the decoder has a loop or an output of its own, or its attention is neither fairseq's nor
            this package's.
    """

    def __init__(self, decoder: LSTMDecoder) -> None:
        probabilities = ("get_normalized_probs", "get_normalized_probs_scriptable")
        require_methods_of(decoder, LSTMDecoder, "forward", "extract_features", *probabilities)
        self.decoder = decoder
        self.attention = decoder.attention
        if type(self.attention) is AttentionLayer:  # a subclass computes something else
            self.attention = BeamAttentionLayer(self.attention)
        elif not isinstance(self.attention, BeamAttentionLayer | None):
            raise ValueError(
                "soft_beam steps LSTM decoders with fairseq's AttentionLayer or a BeamAttentionLayer, got "
                f"{type(self.attention).__name__}"
            )

    def start(self, encoder_out: EncoderOut) -> LSTMState:
        """The encoder's final states, through the decoder's projections if it has them."""
        decoder = self.decoder
        hiddens, cells = encoder_out[1].unbind(0), encoder_out[2].unbind(0)
        if decoder.encoder_hidden_proj is not None:
            hiddens = [decoder.encoder_hidden_proj(hidden) for hidden in hiddens]
            cells = [decoder.encoder_cell_proj(cell) for cell in cells]
        feed = hiddens[0].new_zeros(hiddens[0].size(0), decoder.hidden_size)
        return LSTMState(
            [hidden.unsqueeze(1) for hidden in hiddens],
            [cell.unsqueeze(1) for cell in cells],
            feed.unsqueeze(1),
            encoder_out,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (bsz, beams, E)."""
        return self.decoder.embed_tokens(tokens)

    def mix_embeddings(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Mixed embeddings (bsz, k, E)."""
        return mix_embeddings(self.decoder.embed_tokens, tokens, weights)

    def step(self, embeddings: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """The body of ``LSTMDecoder.extract_features``, then the output layer."""
        decoder, (bsz, beams, _) = self.decoder, embeddings.shape
        feed = state.input_feed.flatten(0, 1)
        x = torch.cat((decoder.dropout_in_module(embeddings).flatten(0, 1), feed), dim=1)
        hiddens, cells = [], []
        for rnn, hidden, cell in zip(decoder.layers, state.hiddens, state.cells, strict=True):
            new_hidden, new_cell = rnn(x, (hidden.flatten(0, 1), cell.flatten(0, 1)))
            x = decoder.dropout_out_module(new_hidden)
            if decoder.residuals:
                x = x + hidden.flatten(0, 1)
            hiddens.append(new_hidden.view(bsz, beams, -1))
            cells.append(new_cell.view(bsz, beams, -1))
        if self.attention is not None:
            out, _ = self.attention(new_hidden, state.encoder_out[0], state.encoder_out[3])
        else:
            out = new_hidden
        feed = decoder.dropout_out_module(out)
        feed = feed.view(bsz, beams, -1)
        return self._lprobs(feed), LSTMState(hiddens, cells, feed, state.encoder_out)

    def mix(self, state: LSTMState, weights: Tensor) -> LSTMState:
        """Mixes hidden states, cells and the input feed; the encoder output is the sentence's own."""
        return LSTMState(
            [mix_beams(hidden, weights) for hidden in state.hiddens],
            [mix_beams(cell, weights) for cell in state.cells],
            mix_beams(state.input_feed, weights),
            state.encoder_out,
        )

    def keep(self, state: LSTMState, sentences: Tensor) -> LSTMState:
        """The recurrent states and the encoder outputs of these sentences."""
        outputs, hiddens, cells, padding_mask = state.encoder_out
        encoder_out = (
            outputs[:, sentences],
            hiddens[:, sentences],
            cells[:, sentences],
            None if padding_mask is None else padding_mask[:, sentences],
        )
        return LSTMState(
            [hidden[sentences] for hidden in state.hiddens],
            [cell[sentences] for cell in state.cells],
            state.input_feed[sentences],
            encoder_out,
        )

    def detach(self, state: LSTMState) -> LSTMState:
        """Detaches the recurrent state; the encoder output keeps its gradient."""
        return LSTMState(
            [hidden.detach() for hidden in state.hiddens],
            [cell.detach() for cell in state.cells],
            state.input_feed.detach(),
            state.encoder_out,
        )

    def _lprobs(self, features: Tensor) -> Tensor:
        decoder = self.decoder
        if hasattr(decoder, "additional_fc") and decoder.adaptive_softmax is None:
            features = decoder.dropout_out_module(decoder.additional_fc(features))
        return output_lprobs(decoder, features)
