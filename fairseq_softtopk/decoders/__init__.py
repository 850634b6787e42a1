"""How the soft beam search drives a fairseq decoder."""

from .registry import register_step_decoder, step_decoder_for

__all__ = ["register_step_decoder", "step_decoder_for"]
