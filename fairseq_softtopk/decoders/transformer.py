"""One step of fairseq's Transformer decoder on embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from ..models.multihead_attention import TopKMultiheadAttention
from .checks import require_methods_of
from .mixing import mix_beams, mix_embeddings
from .output import output_lprobs

EncoderOut = dict[str, list[Tensor]]


class Cache(NamedTuple):
    """What one attention looks at.

    Attributes:
        keys: (..., heads, length, head_dim).
        values: likewise.
    """

    keys: Tensor
    values: Tensor

    def keep(self, sentences: Tensor) -> Cache:
        """That of some sentences, contiguous, as fairseq wants it."""
        return Cache(self.keys.index_select(0, sentences), self.values.index_select(0, sentences))


class Source(NamedTuple):
    """What the beams of a sentence share, computed once: it is never repeated, and never mixed.

    Attributes:
        encoder_out: (srclen, bsz, C).
        padding_mask: (bsz, srclen), True at padding, or None.
        caches: for the cross-attention of each layer, (bsz, heads, srclen, head_dim); None without one.
    """

    encoder_out: Tensor
    padding_mask: Tensor | None
    caches: list[Cache | None]


class TransformerState(NamedTuple):
    """What bsz x beams hypotheses have written, as a Transformer remembers it.

    Attributes:
        layers: the decoder's layers, less those that LayerDrop leaves out of this search.
        caches: for the self-attention of each layer, (bsz, beams, heads, length, head_dim).
        source: what they attend to.
        num_steps: how many tokens they have; with ``cross_self_attention`` the caches begin with the source.
    """

    layers: list[nn.Module]
    caches: list[Cache]
    source: Source
    num_steps: int


class TransformerStepDecoder:
    """Drives a ``TransformerDecoderBase``, or a subclass that changes how it is built but not what it computes.

    The layers are fairseq's own, each called with a cache of its own; :meth:`step` follows
    ``TransformerDecoderBase.extract_features_scriptable``, which takes token ids only, and a test holds the two
    against each other.  The state that is mixed (paper, eq. 10) is the key/value cache of every self-attention.

    Under ``--checkpoint-activations`` the steps keep their activations: fairseq's checkpoint has no gradient
    with respect to a cache.

    Raises:
        ValueError: if the decoder, one of its layers or an attention is not fairseq's own, or the weights are
            trained with quantization noise.
    """

    def __init__(self, decoder: TransformerDecoderBase) -> None:
        _check_decoder(decoder)
        self.decoder = decoder

    def start(self, encoder_out: EncoderOut) -> TransformerState:
        """Nothing is written yet; the cross-attentions project the source, once for all beams and steps."""
        decoder, source = self.decoder, encoder_out["encoder_out"][0]
        padding_mask = next(iter(encoder_out["encoder_padding_mask"]), None)
        layers = list(decoder.layers)  # LayerDrop draws anew at every iteration: one draw per search
        nothing = source.new_zeros(0, source.size(1), decoder.embed_dim)
        seen = source if decoder.cross_self_attention else nothing
        caches = [_project(layer.self_attn, seen) for layer in layers]
        cross = [
            None if layer.encoder_attn is None else _project(layer.encoder_attn, source) for layer in layers
        ]
        return TransformerState(
            layers,
            [Cache(cache.keys.unsqueeze(1), cache.values.unsqueeze(1)) for cache in caches],
            Source(source, padding_mask, cross),
            num_steps=0,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Word embeddings (bsz, beams, E), before their scale and position."""
        return self.decoder.embed_tokens(tokens)

    def mix_embeddings(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Mixed word embeddings (bsz, k, E), before their scale and position."""
        return mix_embeddings(self.decoder.embed_tokens, tokens, weights)

    def step(self, embeddings: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """The body of ``extract_features_scriptable`` for one position, then the output layer."""
        decoder, (bsz, beams, _) = self.decoder, embeddings.shape
        x = self._place(embeddings, state.num_steps).view(1, bsz * beams, -1)
        caches = []
        for layer, cache, cross in zip(state.layers, state.caches, state.source.caches, strict=True):
            x, cache = self._step_layer(layer, x, cache, cross, state.source)
            caches.append(cache)
        if decoder.layer_norm is not None:
            x = decoder.layer_norm(x)
        if decoder.project_out_dim is not None:
            x = decoder.project_out_dim(x)
        lprobs = output_lprobs(decoder, x.view(bsz, beams, -1))
        return lprobs, state._replace(caches=caches, num_steps=state.num_steps + 1)

    def mix(self, state: TransformerState, weights: Tensor) -> TransformerState:
        """Mixes the keys and values of what the beams have written; the source is the sentence's own."""
        srclen = state.source.encoder_out.size(0) if self.decoder.cross_self_attention else 0
        caches = [
            Cache(_mix_written(cache.keys, weights, srclen), _mix_written(cache.values, weights, srclen))
            for cache in state.caches
        ]
        return state._replace(caches=caches)

    def keep(self, state: TransformerState, sentences: Tensor) -> TransformerState:
        """What these sentences have written, and their sources."""
        encoder_out, padding_mask, caches = state.source
        source = Source(
            encoder_out[:, sentences],
            None if padding_mask is None else padding_mask[sentences],
            [None if cache is None else cache.keep(sentences) for cache in caches],
        )
        return state._replace(caches=[cache.keep(sentences) for cache in state.caches], source=source)

    def detach(self, state: TransformerState) -> TransformerState:
        """Detaches the caches of the self-attentions; the source keeps its gradient."""
        return state._replace(
            caches=[Cache(cache.keys.detach(), cache.values.detach()) for cache in state.caches]
        )

    def _place(self, embeddings: Tensor, num_steps: int) -> Tensor:
        """Layer inputs (bsz, beams, C): scaled embeddings at the position after ``num_steps`` tokens."""
        decoder = self.decoder
        x = decoder.embed_scale * embeddings
        if decoder.project_in_dim is not None:
            x = decoder.project_in_dim(x)
        if decoder.embed_positions is not None:
            # Of the tokens so far, a step asks for their number only.
            written = torch.zeros(1, num_steps + 1, dtype=torch.long, device=x.device)
            x = x + decoder.embed_positions(written, incremental_state={})
        if decoder.layernorm_embedding is not None:
            x = decoder.layernorm_embedding(x)
        return decoder.dropout_module(x)

    def _step_layer(
        self, layer: nn.Module, x: Tensor, cache: Cache, cross: Cache | None, source: Source
    ) -> tuple[Tensor, Cache]:
        """One layer on x (1, bsz x beams, C): its output, and its cache with one position more."""
        bsz, beams = cache.keys.shape[:2]
        written = [cache.keys.flatten(0, 1), cache.values.flatten(0, 1)]
        if self.decoder.cross_self_attention and source.padding_mask is not None:
            written.append(source.padding_mask.repeat_interleave(beams, dim=0))
        buffers: dict[str, dict[str, Tensor | None]] = {}
        # A checkpointed layer would hide its cache from autograd.
        forward = getattr(layer, "precheckpoint_forward", layer)
        x, _, _ = forward(
            x,
            encoder_out=source.encoder_out,
            encoder_padding_mask=source.padding_mask,
            incremental_state=buffers,
            prev_self_attn_state=written,
            prev_attn_state=cross,  # one per sentence: the attention sees that x has beams times as many
        )
        buffer = layer.self_attn._get_input_buffer(buffers)
        keys, values = buffer["prev_key"], buffer["prev_value"]
        return x, Cache(keys.unflatten(0, (bsz, beams)), values.unflatten(0, (bsz, beams)))


def _project(attention: MultiheadAttention, source: Tensor) -> Cache:
    """Keys and values (bsz, heads, length, head_dim) of (length, bsz, C)."""
    shape = (attention.num_heads, attention.head_dim)
    keys, values = attention.k_proj(source), attention.v_proj(source)
    return Cache(keys.unflatten(2, shape).permute(1, 2, 0, 3), values.unflatten(2, shape).permute(1, 2, 0, 3))


def _mix_written(cache: Tensor, weights: Tensor, srclen: int) -> Tensor:
    """Mixes (bsz, beams, heads, length, head_dim) but its first ``srclen`` positions, alike for all beams."""
    written = mix_beams(cache[:, :, :, srclen:], weights)
    if srclen == 0:
        return written
    source = cache[:, :1, :, :srclen].expand(-1, weights.size(2), -1, -1, -1)
    return torch.cat((source, written), dim=3)


def _check_decoder(decoder: TransformerDecoderBase) -> None:
    """Raises a ``ValueError`` for what would not compute what :meth:`TransformerStepDecoder.step` does."""
    require_methods_of(
        decoder,
        TransformerDecoderBase,
        "forward",
        "extract_features",
        "extract_features_scriptable",
        "output_layer",
        "get_normalized_probs",
        "get_normalized_probs_scriptable",
    )
    for layer in decoder.layers.children():  # an iteration over them is LayerDrop's
        require_methods_of(layer, TransformerDecoderLayerBase, "forward", "residual_connection")
        for attention in (layer.self_attn, layer.encoder_attn):
            if attention is not None and type(attention) is not TopKMultiheadAttention:
                require_methods_of(attention, MultiheadAttention, "forward", "apply_sparse_mask")
                if attention.use_xformers:
                    raise ValueError("soft_beam steps fairseq's own attention, got an xFormers attention")
    if not isinstance(decoder.embed_tokens, nn.Embedding):
        raise ValueError(
            f"soft_beam mixes the rows of an Embedding, got {type(decoder.embed_tokens).__name__} for the "
            "decoder's embed_tokens"
        )
    if decoder.cfg.quant_noise.pq > 0:
        raise ValueError(
            "--quant-noise-pq overwrites the weights at every call, and a beam search calls a layer once per "
            f"token: it must be 0 with soft_beam, got {decoder.cfg.quant_noise.pq}"
        )
