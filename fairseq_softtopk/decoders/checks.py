"""Whether a module computes what a step decoder takes it to compute."""

from __future__ import annotations

from torch import nn


def require_methods_of(module: nn.Module, base: type[nn.Module], *methods: str) -> None:
    """Raises a ``ValueError`` unless the module has these methods of the base, and not others of a subclass."""
    for method in methods:
        if getattr(type(module), method, None) is not getattr(base, method):
            raise ValueError(
                f"soft_beam steps a {base.__name__} as fairseq wrote it, but {type(module).__name__} has its "
                f"own {method}: implement fairseq_softtopk.beam.StepDecoder for the decoder and call "
                "fairseq_softtopk.decoders.register_step_decoder"
            )
