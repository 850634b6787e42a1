"""Which :class:`~fairseq_softtopk.beam.StepDecoder` drives which fairseq decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.models.lstm import LSTMDecoder
from fairseq.models.transformer import TransformerDecoderBase
from torch import nn

from ..beam import StepDecoder
from .lstm import LSTMStepDecoder
from .transformer import TransformerStepDecoder

_STEP_DECODERS: dict[type[nn.Module], Callable[[Any], StepDecoder]] = {
    LSTMDecoder: LSTMStepDecoder,
    TransformerDecoderBase: TransformerStepDecoder,
}


def register_step_decoder(decoder_class: type[nn.Module], step_decoder: Callable[[Any], StepDecoder]) -> None:
    """Lets ``soft_beam`` train models whose decoder is a ``decoder_class`` (or a subclass of it).

    Args:
        decoder_class: a fairseq decoder class.
        step_decoder: builds a :class:`~fairseq_softtopk.beam.StepDecoder` around such a decoder.
    """
    _STEP_DECODERS[decoder_class] = step_decoder


def step_decoder_for(model: nn.Module) -> StepDecoder:
    """The step decoder of an encoder-decoder model.

    Raises:
        ValueError: if no step decoder is registered for the model's decoder.
    """
    decoder = getattr(model, "decoder", None)
    for decoder_class in type(decoder).__mro__:
        if decoder_class in _STEP_DECODERS:
            return _STEP_DECODERS[decoder_class](decoder)
    known = ", ".join(sorted(cls.__name__ for cls in _STEP_DECODERS))
    raise ValueError(
        f"soft_beam cannot step the decoder {type(decoder).__name__} of {type(model).__name__}: it knows "
        f"{known}; implement fairseq_softtopk.beam.StepDecoder for it and call "
        "fairseq_softtopk.decoders.register_step_decoder"
    )
