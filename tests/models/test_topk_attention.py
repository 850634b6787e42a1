import pytest
import torch
from fairseq import options
from fairseq.dataclass.configs import EMAConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import build_model
from fairseq.models.ema import EMA
from fairseq.utils import convert_padding_direction
from omegaconf import OmegaConf

import fairseq_softtopk.plugin  # noqa: F401  (registers the architectures)
from fairseq_softtopk.models.attention import MLPAttentionLayer
from fairseq_softtopk.models.relaxation import RELAXATIONS
from fairseq_softtopk.models.topk_attention import TopKAttentionConfig, TopKAttentionModel

TRANSFORMER = "topk_attention_transformer"
MODELS = [
    *[("topk_attention", {"attention_relaxation": kind}) for kind in RELAXATIONS],
    ("topk_attention", {"attention_score": "dot"}),
    ("topk_attention", {"attention_score": "mlp", "encoder_bidirectional": True}),
    ("topk_attention", {"encoder_bidirectional": True, "encoder_layers": 2, "decoder_layers": 2}),
    ("topk_attention", {"share_all_embeddings": True, "encoder_freeze_embed": True}),
    ("topk_attention", {"criterion_name": "adaptive_loss", "adaptive_softmax_cutoff": "6,10"}),
    *[(TRANSFORMER, {"attention_relaxation": kind}) for kind in RELAXATIONS],
    (TRANSFORMER, {"decoder_normalize_before": True, "share_all_embeddings": True}),
    (TRANSFORMER, {"encoder_embed_dim": 12, "checkpoint_activations": True}),
]


@pytest.mark.parametrize("arch, settings", MODELS)
def test_incremental_decoding_equals_the_full_forward_pass(
    make_model, make_sample, exact_softmax, arch, settings
):
    model, sample = make_model(arch, **settings).eval(), make_sample([(6, 7), (3, 5)])
    net_input, state = sample["net_input"], {}
    expected, attention = model(**net_input)
    encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    tokens = net_input["prev_output_tokens"]
    for step in range(tokens.size(1)):
        got, step_attention = model.decoder(tokens[:, : step + 1], encoder_out, incremental_state=state)
        if arch == TRANSFORMER:
            step_attention, whole = step_attention["attn"][0], attention["attn"][0]
        else:
            whole = attention
        written = tokens[:, step] != 1
        torch.testing.assert_close(got[written, 0], expected[written, step])
        torch.testing.assert_close(step_attention[written, 0], whole[written, step])


@pytest.mark.parametrize("arch, settings", MODELS)
def test_a_sentence_is_not_disturbed_by_its_padding(make_model, make_sample, arch, settings):
    model, sample = make_model(arch, **settings).eval(), make_sample([(6, 4), (2, 4)])
    net_input = sample["net_input"]
    row = int(net_input["src_lengths"].argmin())
    source = net_input["src_tokens"][row]
    alone, _ = model(
        source[source != 1][None], torch.tensor([2]), net_input["prev_output_tokens"][row : row + 1]
    )
    torch.testing.assert_close(model(**net_input)[0][row], alone[0])


@pytest.mark.parametrize("arch, settings", MODELS)
def test_every_parameter_has_a_gradient(make_model, make_sample, arch, settings):
    model, sample = make_model(arch, **settings), make_sample([(6, 7), (5, 5)])
    model(**sample["net_input"])[0].square().sum().backward()
    frozen = "embed_tokens" if settings.get("encoder_freeze_embed") else "adaptive_softmax"
    unused = [
        name
        for name, parameter in model.named_parameters()
        if frozen not in name
        and not name.startswith("encoder.layers.")  # of which stock fairseq 0.12.2 has a second, fused set
        and (parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any())
    ]
    assert not unused


@pytest.mark.parametrize("arch, stock", [("topk_attention", "lstm"), (TRANSFORMER, "transformer")])
def test_softmax_is_the_stock_model_and_takes_its_parameters(make_model, make_sample, arch, stock):
    expected, model = make_model(stock), make_model(arch, attention_relaxation="softmax")
    model.load_state_dict(expected.state_dict())
    sample = make_sample([(6, 7), (3, 5)])
    torch.testing.assert_close(model(**sample["net_input"])[0], expected(**sample["net_input"])[0])


@pytest.mark.parametrize("arch", ["topk_attention", TRANSFORMER])
def test_the_schedule_of_epsilon_is_that_of_the_updates(make_model, arch):
    schedule = {"attention_epsilon_schedule": "linear", "attention_epsilon": 1.0, "attention_epsilon_end": 0.5}
    model = make_model(arch, **schedule, attention_epsilon_updates=10)
    model.set_num_updates(4)  # as fairseq's trainer does
    loaded = make_model(arch, **schedule, attention_epsilon_updates=10)
    loaded.load_state_dict(model.state_dict())
    epsilons = [m.epsilon for net in (model, loaded) for m in net.modules() if hasattr(m, "epsilon")]
    assert len(epsilons) >= 2 and epsilons == pytest.approx([0.8] * len(epsilons))


@pytest.mark.parametrize("heads", [False, True])
def test_the_weights_of_a_transformer_are_those_of_its_heads(make_model, make_sample, heads):
    model, sample = make_model(TRANSFORMER, attention_epsilon=1e-7).eval(), make_sample([(6, 4), (5, 4)])
    seen = []
    layer = model.decoder.layers[-1].encoder_attn
    layer.relaxation.register_forward_hook(lambda module, scores, weights: seen.append(weights))
    states = model.encoder(sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"])
    source, mask = states["encoder_out"][0], states["encoder_padding_mask"][0]
    queries = torch.randn(4, 2, 8, dtype=torch.float64)
    _, weights = layer(queries, source, source, mask, static_kv=True, need_head_weights=heads)
    assert (seen[0] > 1e-6).sum(-1).eq(2).all()  # k for every head
    assert (seen[0] > 1e-6).any(1).sum(-1).gt(2).any()  # which do not look at the same positions
    torch.testing.assert_close(weights, seen[0].transpose(0, 1) if heads else seen[0].mean(1))


@pytest.mark.parametrize(
    "arch, layers, dropout", [("topk_attention_opennmt", 2, 0.3), ("topk_attention_bahdanau", 1, 0.0)]
)
def test_presets_build_from_the_command_line(task, arch, layers, dropout):
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, ["data-bin", "--arch", arch, "--attention-top-k", "3"])
    model = build_model(convert_namespace_to_omegaconf(args).model, task)
    decoder = model.decoder
    assert len(decoder.layers) == layers and decoder.dropout_out_module.p == dropout
    assert decoder.attention.relaxation.k == 3
    assert isinstance(decoder.attention, MLPAttentionLayer) == (arch == "topk_attention_bahdanau")


@pytest.mark.parametrize("criterion", ["adaptive_loss", "cross_entropy"])
def test_an_adaptive_softmax_is_built_for_its_criterion(task, criterion):
    parser = options.get_training_parser()
    arguments = ["data-bin", "--arch", "topk_attention", "--adaptive-softmax-cutoff", "6,10"]
    args = options.parse_args_and_arch(parser, [*arguments, "--criterion", criterion])
    model = build_model(convert_namespace_to_omegaconf(args).model, task)
    assert (model.decoder.adaptive_softmax is not None) == (criterion == "adaptive_loss")


@pytest.mark.parametrize("arch, settings", MODELS)
def test_attention_weights_stand_at_their_source_tokens(make_model, make_sample, arch, settings):
    """That is how ``--print-alignment`` reads them, whatever the side of the padding."""
    model, net_input = make_model(arch, **settings).eval(), make_sample([(6, 3), (4, 3), (2, 3)])["net_input"]

    def attention(source, lengths, target):
        extra = model(source, lengths, target)[1]
        return extra if torch.is_tensor(extra) else extra["attn"][0]  # (bsz, tgtlen, srclen)

    on_the_left, lengths, target = (
        net_input[key] for key in ("src_tokens", "src_lengths", "prev_output_tokens")
    )
    for source in (on_the_left, convert_padding_direction(on_the_left, 1, left_to_right=True)):
        together = attention(source, lengths, target)
        for row, tokens in enumerate(source):
            real = tokens != 1
            alone = attention(tokens[real][None], lengths[row, None], target[row, None])
            torch.testing.assert_close(together[row][:, real], alone[0], atol=1e-6, rtol=1e-6)
            assert (together[row][:, ~real] == 0).all()


def test_a_dataclass_builds_and_a_preset_of_hydra_is_refused(task):
    config = TopKAttentionConfig(attention_score="dot", encoder_hidden_size=8, decoder_hidden_size=8)
    model = TopKAttentionModel.build_model(config, task)
    assert type(model.decoder.attention).__name__ == "DotAttentionLayer"
    hydra = OmegaConf.create({"_name": "topk_attention_bahdanau", "encoder_hidden_size": None})
    with pytest.raises(ValueError, match="presets are for the command line, got topk_attention_bahdanau"):
        TopKAttentionModel.build_model(hydra, task)
    hydra = OmegaConf.create(
        {"_name": "topk_attention_opennmt", "encoder_hidden_size": 8, "decoder_hidden_size": 8}
    )
    with pytest.raises(ValueError, match="got topk_attention_opennmt without dropout: under Hydra"):
        TopKAttentionModel.build_model(hydra, task)


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("arch", ["topk_attention", TRANSFORMER])
def test_an_average_of_the_parameters_is_kept(make_model, arch, fp32):
    """``--store-ema``."""
    model = make_model(arch)
    ema = EMA(model, EMAConfig(store_ema=True, ema_decay=0.5, ema_fp32=fp32))
    before = model.decoder.embed_tokens.weight.clone()
    with torch.no_grad():
        model.decoder.embed_tokens.weight += 1
    model.set_num_updates(4)
    ema.step(model, updates=4)
    torch.testing.assert_close(ema.get_model().decoder.embed_tokens.weight, before + 0.5, check_dtype=False)
    state = model.state_dict()
    assert {value.item() for name, value in state.items() if name.endswith("_extra_state")} == {4}
    averaged = ema.get_model().state_dict()
    assert {value.item() for name, value in averaged.items() if name.endswith("_extra_state")} == {2}
    ema.step(model, updates=4)  # where a whole number would stay at 2
    ema.step(model, updates=4)
    averaged = ema.get_model().state_dict()
    assert {value.item() for name, value in averaged.items() if name.endswith("_extra_state")} == {3.5}
    make_model(arch).load_state_dict(ema.get_model().state_dict())


@pytest.mark.parametrize(
    "arch, settings, message",
    [
        (
            "topk_attention",
            {"attention_top_k": 0},
            "--attention-top-k must be a whole number, at least 1, got 0",
        ),
        ("topk_attention", {"decoder_attention": "False"}, "--decoder-attention must be True, got False"),
        ("topk_attention", {"attention_score": "cosine"}, "--attention-score must be one of general, dot, mlp"),
        (TRANSFORMER, {"attention_epsilon": 0.0}, "--attention-epsilon must be positive and finite, got 0.0"),
        (TRANSFORMER, {"no_cross_attention": True}, "wants the decoder's layers as fairseq builds them"),
        (TRANSFORMER, {"cross_self_attention": True}, "does not go with --cross-self-attention"),
    ],
)
def test_bad_options_name_the_value(make_model, arch, settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(arch, **settings)
