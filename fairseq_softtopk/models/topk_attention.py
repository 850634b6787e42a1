"""The architecture ``topk_attention``: fairseq's LSTM with an attention that looks at k source tokens."""

import math
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.lstm import LSTMModel, base_architecture
from omegaconf import DictConfig, OmegaConf

from .attention import BeamAttentionLayer, TopKAttentionLayer

RELAXATIONS = ("soft_topk", "softmax")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TopKAttentionConfig(FairseqDataclass):
    """Options of ``--arch topk_attention``: those of fairseq's ``lstm``, with its defaults, and three more."""

    attention_top_k: int = _option(5, "k: how many source tokens to attend to, at least 1")
    attention_epsilon: float = _option(
        0.1, "entropic weight of the selection, positive, in units of the attention score"
    )
    attention_relaxation: ChoiceEnum(RELAXATIONS) = _option(  # type: ignore[valid-type]
        "soft_topk", "soft_topk: attend to the k best; softmax: to all, as fairseq's lstm does"
    )
    dropout: Optional[float] = _option(None, "dropout probability")
    encoder_embed_dim: Optional[int] = _option(None, "encoder embedding dimension")
    encoder_embed_path: Optional[str] = _option(None, "path to pre-trained encoder embedding")
    encoder_freeze_embed: bool = _option(False, "freeze encoder embeddings")
    encoder_hidden_size: Optional[int] = _option(None, "encoder hidden size")
    encoder_layers: Optional[int] = _option(None, "number of encoder layers")
    encoder_bidirectional: bool = _option(False, "make all layers of encoder bidirectional")
    decoder_embed_dim: Optional[int] = _option(None, "decoder embedding dimension")
    decoder_embed_path: Optional[str] = _option(None, "path to pre-trained decoder embedding")
    decoder_freeze_embed: bool = _option(False, "freeze decoder embeddings")
    decoder_hidden_size: Optional[int] = _option(None, "decoder hidden size")
    decoder_layers: Optional[int] = _option(None, "number of decoder layers")
    decoder_out_embed_dim: Optional[int] = _option(None, "decoder output embedding dimension")
    share_decoder_input_output_embed: bool = _option(False, "share decoder input and output embeddings")
    share_all_embeddings: bool = _option(
        False, "share encoder, decoder and output embeddings (joint dictionary, equal sizes)"
    )
    encoder_dropout_in: Optional[float] = _option(None, "dropout of the encoder's input embedding")
    encoder_dropout_out: Optional[float] = _option(None, "dropout of the encoder's output")
    decoder_dropout_in: Optional[float] = _option(None, "dropout of the decoder's input embedding")
    decoder_dropout_out: Optional[float] = _option(None, "dropout of the decoder's output")


@register_model("topk_attention", dataclass=TopKAttentionConfig)
class TopKAttentionModel(LSTMModel):
    """fairseq's LSTM encoder-decoder with :class:`.attention.TopKAttentionLayer`."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Takes the options from the dataclass, where ``LSTMModel`` would add its own."""
        super(LSTMModel, cls).add_args(parser)

    @classmethod
    def build_model(cls, cfg: DictConfig | Namespace, task: Any) -> "TopKAttentionModel":
        """Builds fairseq's LSTM and gives its attention layer the top-k.

        Raises:
            ValueError: if an option is out of range.
        """
        options = vars(cfg) if isinstance(cfg, Namespace) else OmegaConf.to_container(cfg)
        args = Namespace(**{"criterion": None, **{k: v for k, v in options.items() if v is not None}})
        k, epsilon = args.attention_top_k, args.attention_epsilon
        relaxation = str(args.attention_relaxation)
        if k < 1:
            raise ValueError(f"--attention-top-k must be at least 1, got {k}")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"--attention-epsilon must be positive and finite, got {epsilon}")
        if relaxation not in RELAXATIONS:
            raise ValueError(
                f"--attention-relaxation must be one of {', '.join(RELAXATIONS)}, got {relaxation}"
            )
        model: TopKAttentionModel = super().build_model(args, task)
        attention = model.decoder.attention
        model.decoder.attention = (
            BeamAttentionLayer(attention)
            if relaxation == "softmax"
            else TopKAttentionLayer(attention, k, epsilon)
        )
        return model


@register_model_architecture("topk_attention", "topk_attention_tiny")
def topk_attention_tiny(args: Namespace) -> None:
    """One layer of 128 in each direction, a decoder of 256: trains in minutes on two CPU cores."""
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 256)
    args.encoder_hidden_size = getattr(args, "encoder_hidden_size", 128)
    args.encoder_bidirectional = getattr(args, "encoder_bidirectional", True)
    args.decoder_embed_dim = getattr(args, "decoder_embed_dim", 256)
    args.decoder_hidden_size = getattr(args, "decoder_hidden_size", 256)
    args.decoder_out_embed_dim = getattr(args, "decoder_out_embed_dim", 256)
    args.share_decoder_input_output_embed = getattr(args, "share_decoder_input_output_embed", True)
    base_architecture(args)
