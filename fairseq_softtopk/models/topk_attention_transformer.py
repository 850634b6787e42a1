"""The architecture ``topk_attention_transformer``: each head of a cross-attention looks at k source tokens."""

from argparse import Namespace
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase

from .multihead_attention import TopKMultiheadAttention
from .relaxation import Relaxation, RelaxationConfig


@register_model("topk_attention_transformer")
class TopKAttentionTransformerModel(TransformerModel):
    """fairseq's Transformer with :class:`.multihead_attention.TopKMultiheadAttention` on the source."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """The options of fairseq's ``transformer``, and those of :class:`.relaxation.RelaxationConfig`."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, RelaxationConfig())

    @classmethod
    def build_model(cls, args: Namespace, task: Any) -> "TopKAttentionTransformerModel":
        """Builds fairseq's Transformer and exchanges the attention of its decoder's layers to the source.

        Raises:
            ValueError: if an option is out of range, or there is no cross-attention of fairseq's own, or one
                within the self-attention.
            ImportError: if the relaxation needs a package that is not there.
        """
        if getattr(args, "cross_self_attention", False):
            raise ValueError(
                "topk_attention_transformer does not go with --cross-self-attention, which attends to the "
                "source within the self-attention"
            )
        relaxation = Relaxation.from_args(args)
        model: TopKAttentionTransformerModel = super().build_model(args, task)
        for layer in model.decoder.layers.children():  # an iteration over the layers is LayerDrop's
            if not isinstance(layer, TransformerDecoderLayerBase) or layer.encoder_attn is None:
                raise ValueError(
                    "topk_attention_transformer wants the decoder's layers as fairseq builds them, with "
                    f"cross-attention and without --ddp-backend fully_sharded, got {type(layer).__name__}"
                )
            layer.encoder_attn = TopKMultiheadAttention(layer.encoder_attn, relaxation)
        return model


@register_model_architecture("topk_attention_transformer", "topk_attention_transformer")
def topk_attention_transformer(args: Namespace) -> None:
    """The sizes of fairseq's ``transformer``."""
    base_architecture(args)


@register_model_architecture("topk_attention_transformer", "topk_attention_transformer_tiny")
def topk_attention_transformer_tiny(args: Namespace) -> None:
    """4 layers of 128, normalised first, as Wu et al. (2021) have for Multi30k: for two CPU cores."""
    args.encoder_layers = getattr(args, "encoder_layers", 4)
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 128)
    args.encoder_ffn_embed_dim = getattr(args, "encoder_ffn_embed_dim", 256)
    args.encoder_attention_heads = getattr(args, "encoder_attention_heads", 4)
    args.encoder_normalize_before = getattr(args, "encoder_normalize_before", True)
    args.decoder_layers = getattr(args, "decoder_layers", 4)
    args.decoder_embed_dim = getattr(args, "decoder_embed_dim", 128)
    args.decoder_ffn_embed_dim = getattr(args, "decoder_ffn_embed_dim", 256)
    args.decoder_attention_heads = getattr(args, "decoder_attention_heads", 4)
    args.decoder_normalize_before = getattr(args, "decoder_normalize_before", True)
    base_architecture(args)
