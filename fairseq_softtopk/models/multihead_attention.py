"""fairseq's cross-attention with a relaxation in the softmax's place, for every head by itself."""

from __future__ import annotations

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor

from .relaxation import Relaxation


class TopKMultiheadAttention(MultiheadAttention):
    """A cross-attention each of whose heads attends to k source positions.

    Args:
        attention: the layer whose projections it takes over.
        relaxation: from scores to weights.

    Raises:
        ValueError: if the layer is not a cross-attention as fairseq computes it itself.
    """

    def __init__(self, attention: MultiheadAttention, relaxation: Relaxation) -> None:
        if not attention.encoder_decoder_attention or attention.use_xformers:
            raise ValueError("topk_attention_transformer wants fairseq's own cross-attention")
        super().__init__(
            attention.embed_dim,
            attention.num_heads,
            kdim=attention.kdim,
            vdim=attention.vdim,
            encoder_decoder_attention=True,
        )
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", "dropout_module"):
            setattr(self, name, getattr(attention, name))
        self.relaxation = relaxation

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What ``MultiheadAttention.forward`` returns for the same arguments, shapes (length, bsz, C)."""
        # static_kv keeps fairseq off PyTorch's fused attention, which has no scores to return.
        scores, values = super().forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            incremental_state=incremental_state,
            static_kv=True,
            attn_mask=attn_mask,
            before_softmax=True,
        )  # (bsz x heads, tgt_len, srclen), (sentences x heads, srclen, head_dim)
        if before_softmax:
            return scores, values
        tgt_len, bsz, _ = query.shape
        scores = scores.unflatten(0, (bsz, self.num_heads))
        weights = self.relaxation(scores)
        values = values.unflatten(0, (-1, self.num_heads))
        # With several beams per sentence, these share its values.
        probabilities = self.dropout_module(weights.type_as(scores)).unflatten(0, (values.size(0), -1))
        attended = torch.einsum("bxhts,bhsd->bxthd", probabilities, values)
        output = self.out_proj(attended.flatten(0, 1).transpose(0, 1).reshape(tgt_len, bsz, self.embed_dim))
        if need_head_weights:
            return output, weights.transpose(0, 1)
        return output, weights.mean(1) if need_weights else None
