"""The architecture ``topk_attention``: fairseq's LSTM with an attention that looks at k source tokens."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.models import register_model, register_model_architecture
from fairseq.models.lstm import LSTMModel, base_architecture
from omegaconf import II, DictConfig, OmegaConf

from ..options import with_help
from .attention import (
    SCORES,
    BeamAttentionLayer,
    DotAttentionLayer,
    KeyedEncoder,
    MLPAttentionLayer,
    SourceSideEncoder,
)
from .relaxation import Relaxation, RelaxationConfig


@dataclass
class TopKAttentionConfig(RelaxationConfig):
    """Options of ``--arch topk_attention``: those of fairseq's ``lstm``, with its defaults, and its own."""

    attention_score: ChoiceEnum(SCORES) = with_help(  # type: ignore[valid-type]
        "general",
        "general: one matrix between the two states, as in fairseq's lstm (Luong et al. 2015); dot: their "
        "scalar product; mlp: a network with a hidden layer (Bahdanau et al. 2015)",
    )
    dropout: Optional[float] = with_help(None, "dropout probability")
    encoder_embed_dim: Optional[int] = with_help(None, "encoder embedding dimension")
    encoder_embed_path: Optional[str] = with_help(None, "path to pre-trained encoder embedding")
    encoder_freeze_embed: bool = with_help(False, "freeze encoder embeddings")
    encoder_hidden_size: Optional[int] = with_help(None, "encoder hidden size")
    encoder_layers: Optional[int] = with_help(None, "number of encoder layers")
    encoder_bidirectional: bool = with_help(False, "make all layers of encoder bidirectional")
    decoder_embed_dim: Optional[int] = with_help(None, "decoder embedding dimension")
    decoder_embed_path: Optional[str] = with_help(None, "path to pre-trained decoder embedding")
    decoder_freeze_embed: bool = with_help(False, "freeze decoder embeddings")
    decoder_hidden_size: Optional[int] = with_help(None, "decoder hidden size")
    decoder_layers: Optional[int] = with_help(None, "number of decoder layers")
    decoder_out_embed_dim: Optional[int] = with_help(None, "decoder output embedding dimension")
    decoder_attention: Optional[str] = with_help(None, "must be True: without attention, use --arch lstm")
    adaptive_softmax_cutoff: Optional[str] = with_help(
        None, "comma separated list of adaptive softmax cutoff points, for --criterion adaptive_loss"
    )
    share_decoder_input_output_embed: bool = with_help(False, "share decoder input and output embeddings")
    share_all_embeddings: bool = with_help(
        False, "share encoder, decoder and output embeddings (joint dictionary, equal sizes)"
    )
    encoder_dropout_in: Optional[float] = with_help(None, "dropout of the encoder's input embedding")
    encoder_dropout_out: Optional[float] = with_help(None, "dropout of the encoder's output")
    decoder_dropout_in: Optional[float] = with_help(None, "dropout of the decoder's input embedding")
    decoder_dropout_out: Optional[float] = with_help(None, "dropout of the decoder's output")
    criterion_name: Optional[str] = II("criterion._name")


@register_model("topk_attention", dataclass=TopKAttentionConfig)
class TopKAttentionModel(LSTMModel):
    """fairseq's LSTM encoder-decoder with an attention layer of :mod:`.attention`."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Takes the options from the dataclass, where ``LSTMModel`` would add its own."""
        super(LSTMModel, cls).add_args(parser)

    @classmethod
    def build_model(cls, cfg: DictConfig | Namespace | TopKAttentionConfig, task: Any) -> "TopKAttentionModel":
        """Builds fairseq's LSTM and exchanges its attention layer.

        Raises:
            ValueError: if an option is out of range, or a preset comes from Hydra, which does not fill it in.
            ImportError: if the relaxation needs a package that is not there.
        """
        options = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else vars(cfg)
        args = Namespace(**{k: v for k, v in options.items() if v is not None})
        name = getattr(args, "_name", "topk_attention")
        sizes = Namespace()
        base_architecture(sizes)
        missing = [key for key, value in vars(sizes).items() if value is not None and not hasattr(args, key)]
        if name != "topk_attention" and missing:
            raise ValueError(
                f"presets are for the command line, got {name} without {missing[0]}: under Hydra, spell out "
                "its options with the name topk_attention"
            )
        args.criterion = getattr(args, "criterion_name", None)  # LSTMModel looks for adaptive_loss
        relaxation, score = Relaxation.from_args(args), str(getattr(args, "attention_score", "general"))
        if score not in SCORES:
            raise ValueError(f"--attention-score must be one of {', '.join(SCORES)}, got {score}")
        base_architecture(args)
        if not utils.eval_bool(args.decoder_attention):
            raise ValueError(f"--decoder-attention must be True, got {args.decoder_attention}: use --arch lstm")
        model: TopKAttentionModel = super().build_model(args, task)
        decoder = model.decoder
        layer = {"general": BeamAttentionLayer, "dot": DotAttentionLayer, "mlp": MLPAttentionLayer}[score]
        decoder.attention = layer(decoder.attention, relaxation)
        model.encoder = SourceSideEncoder(model.encoder)
        if score == "mlp":
            model.encoder = KeyedEncoder(model.encoder, decoder.hidden_size)
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


@register_model_architecture("topk_attention", "topk_attention_opennmt")
def topk_attention_opennmt(args: Namespace) -> None:
    """OpenNMT's default, with which the paper's Table 4 was made: 2 layers of 500, dropout between them 0.3.

    fairseq's dropout also acts on the encoder's outputs that the attention looks at, OpenNMT's does not.
    """
    args.dropout = getattr(args, "dropout", 0.3)
    args.encoder_dropout_in = getattr(args, "encoder_dropout_in", 0.0)
    args.decoder_dropout_in = getattr(args, "decoder_dropout_in", 0.0)
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 500)
    args.encoder_hidden_size = getattr(args, "encoder_hidden_size", 500)
    args.encoder_layers = getattr(args, "encoder_layers", 2)
    args.decoder_embed_dim = getattr(args, "decoder_embed_dim", 500)
    args.decoder_hidden_size = getattr(args, "decoder_hidden_size", 500)
    args.decoder_layers = getattr(args, "decoder_layers", 2)
    args.decoder_out_embed_dim = getattr(args, "decoder_out_embed_dim", 500)
    base_architecture(args)


@register_model_architecture("topk_attention", "topk_attention_bahdanau")
def topk_attention_bahdanau(args: Namespace) -> None:
    """The sizes of RNNsearch (Bahdanau et al. 2015), with which the paper's Table 2 was made.

    An LSTM for its GRU, a linear layer of 500 for its maxout layer, and a score of the state that the step
    leads to for one of the state that it starts from.
    """
    args.dropout = getattr(args, "dropout", 0.0)
    args.attention_score = getattr(args, "attention_score", "mlp")
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 620)
    args.encoder_hidden_size = getattr(args, "encoder_hidden_size", 1000)
    args.encoder_bidirectional = getattr(args, "encoder_bidirectional", True)
    args.decoder_embed_dim = getattr(args, "decoder_embed_dim", 620)
    args.decoder_hidden_size = getattr(args, "decoder_hidden_size", 1000)
    args.decoder_out_embed_dim = getattr(args, "decoder_out_embed_dim", 500)
    base_architecture(args)
