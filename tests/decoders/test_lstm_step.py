import pytest
import torch
from fairseq.models.lstm import LSTMDecoder

from fairseq_softtopk.decoders import register_step_decoder, registry, step_decoder_for

MODELS = [
    ("lstm", {}),
    ("lstm", {"encoder_layers": 3, "decoder_layers": 3, "encoder_bidirectional": True}),
    ("lstm", {"decoder_attention": "0", "decoder_out_embed_dim": 6}),
    ("lstm", {"share_decoder_input_output_embed": True}),
    ("topk_attention", {"encoder_bidirectional": True}),
    ("topk_attention", {"attention_relaxation": "softmax"}),
]


@pytest.mark.parametrize("arch, options", MODELS)
def test_steps_equal_the_full_forward_pass(make_model, make_sample, arch, options):
    model, sample = make_model(arch, **options), make_sample([(5, 7), (3, 4), (6, 5)])
    net_input = sample["net_input"]
    expected = model.get_normalized_probs(model(**net_input), log_probs=True)

    decoder = step_decoder_for(model)
    state = decoder.start(model.encoder(net_input["src_tokens"], net_input["src_lengths"]))
    tokens = net_input["prev_output_tokens"]
    for step in range(tokens.size(1)):
        lprobs, state = decoder.step(decoder.embed(tokens[:, step : step + 1]), state)
        torch.testing.assert_close(lprobs[:, 0], expected[:, step].double(), atol=1e-5, rtol=0)


def test_a_one_hot_mixture_is_a_reordering_of_the_beams(make_model, make_sample):
    model, sample = make_model("topk_attention"), make_sample([(5, 7), (3, 4)])
    decoder = step_decoder_for(model)
    state = decoder.start(model.encoder(sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"]))
    _, state = decoder.step(decoder.embed(torch.full((2, 1), 2)), state)
    state = decoder.mix(state, torch.ones(2, 1, 3).double())
    _, state = decoder.step(decoder.embed(torch.tensor([[5, 6, 7], [8, 9, 10]])), state)

    order = torch.tensor([2, 0, 0])
    one_hot = torch.nn.functional.one_hot(order, 3).double().T.expand(2, 3, 3)
    same_token = torch.full((2, 3), 4)
    got, _ = decoder.step(decoder.embed(same_token), decoder.mix(state, one_hot))
    expected, _ = decoder.step(decoder.embed(same_token), state)
    torch.testing.assert_close(got, expected[:, order])


def test_mixed_embeddings_are_the_weighted_sum(make_model):
    model = make_model()
    tokens, weights = torch.randint(4, 16, (2, 5)), torch.rand(2, 5, 3, dtype=torch.float64)
    got = step_decoder_for(model).mix_embeddings(tokens, weights)
    expected = torch.einsum("bnk,bne->bke", weights, model.decoder.embed_tokens(tokens))
    torch.testing.assert_close(got, expected)


def test_an_unknown_decoder_gets_an_error_that_says_what_to_do():
    class Odd(torch.nn.Module):
        decoder = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"Linear of Odd: it knows LSTMDecoder, .*; implement .*StepDecoder"):
        step_decoder_for(Odd())


@pytest.mark.parametrize(
    "method", ["forward", "extract_features", "get_normalized_probs", "get_normalized_probs_scriptable"]
)
def test_a_decoder_that_computes_something_else_is_refused(make_model, method):
    def own(self, *args, **kwargs):
        return getattr(LSTMDecoder, method)(self, *args, **kwargs)

    model = make_model()
    model.decoder.__class__ = type("Own", (LSTMDecoder,), {method: own})
    with pytest.raises(ValueError, match=f"a LSTMDecoder as fairseq wrote it, but Own has its own {method}: "):
        step_decoder_for(model)


def test_a_decoder_with_an_output_layer_of_its_own_is_followed(make_model, make_sample, make_criterion):
    class Scaled(LSTMDecoder):
        def output_layer(self, x):
            return 3 * super().output_layer(x)

    model, sample = make_model(), make_sample([(4, 1)])  # one gold token: the beam's first step is the gold one
    model.decoder.__class__ = Scaled
    losses = [make_criterion(teacher_forcing_ratio=rho)(model, sample)[0] for rho in (0.0, 1.0)]
    torch.testing.assert_close(*losses, check_dtype=False)


def test_an_unknown_attention_is_refused(make_model):
    model = make_model()
    model.decoder.attention = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="AttentionLayer or a BeamAttentionLayer, got Linear"):
        step_decoder_for(model)


def test_a_decoder_of_ones_own_can_be_registered(monkeypatch):
    class Mine(torch.nn.Module):
        pass

    monkeypatch.setattr(registry, "_STEP_DECODERS", dict(registry._STEP_DECODERS))
    register_step_decoder(Mine, lambda decoder: ("steps", decoder))
    model = torch.nn.Module()
    model.decoder = Mine()
    assert step_decoder_for(model) == ("steps", model.decoder)
