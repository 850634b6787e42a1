"""Float64 throughout, with ``exact_softmax`` where digits are compared."""

import pytest
import torch
from fairseq.models.transformer import Embedding, TransformerDecoderBase
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase

from fairseq_softtopk.decoders import step_decoder_for

LENGTHS = [(5, 7), (3, 4), (6, 5)]
SCALES = {"scale_attn": True, "scale_heads": True, "scale_fc": True, "scale_resids": True}
MODELS = [
    ("transformer", {}),
    ("transformer", {"decoder_normalize_before": True, "encoder_normalize_before": True}),
    ("transformer", {"decoder_normalize_before": True, "no_decoder_final_norm": True}),
    ("transformer", {"decoder_learned_pos": True}),
    ("transformer", {"no_token_positional_embeddings": True, "activation_fn": "gelu"}),
    ("transformer", {"layernorm_embedding": True, "no_scale_embedding": True}),
    ("transformer", {"encoder_embed_dim": 12, "decoder_output_dim": 6}),
    ("transformer", {"share_decoder_input_output_embed": True}),
    ("transformer", {"share_all_embeddings": True, **SCALES}),
    ("transformer", {"adaptive_softmax_cutoff": "6,10", "adaptive_softmax_factor": 2}),
    ("transformer", {"no_cross_attention": True}),
    ("transformer", {"cross_self_attention": True}),
    (
        "transformer",
        {"cross_self_attention": True, "no_cross_attention": True, "decoder_normalize_before": True},
    ),
    ("transformer", {"checkpoint_activations": True}),
    ("transformer", {"decoder_layers": 1, "decoder_attention_heads": 1}),
    ("transformer_align", {}),
    ("topk_attention_transformer", {}),
    ("topk_attention_transformer", {"attention_relaxation": "entmax15"}),
]
STATES = [{}, {"cross_self_attention": True}]


def encode(model, sample):
    return model.encoder(sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"])


def full_pass(model, sample):
    """Log-probabilities (bsz, T, V) of fairseq's own decoder, in float64."""
    output = model(**sample["net_input"])
    if model.decoder.adaptive_softmax is not None:
        return model.get_normalized_probs(output, log_probs=True)
    return output[0].log_softmax(-1)


def walk(decoder, model, tokens, sample):
    """Log-probabilities (bsz, T, V) one step at a time, with one beam, and the last state."""
    state, lprobs = decoder.start(encode(model, sample)), []
    for step in range(tokens.size(1)):
        step_lprobs, state = decoder.step(decoder.embed(tokens[:, step : step + 1]), state)
        lprobs.append(step_lprobs)
    return torch.cat(lprobs, dim=1), state


def three_beams(model, sample):
    """A step decoder, and a state of three different beams after two tokens."""
    decoder, bsz = step_decoder_for(model), len(sample["target"])
    _, state = walk(decoder, model, torch.full((bsz, 1), 2), sample)
    state = decoder.mix(state, torch.ones(bsz, 1, 3))
    _, state = decoder.step(decoder.embed(torch.tensor([[5, 6, 7]] * bsz)), state)
    return decoder, state


def tensors(state):
    return [part for cache in [*state.caches, *state.source.caches] for part in cache]


@pytest.mark.parametrize("arch, options", MODELS)
def test_steps_equal_the_full_forward_pass(make_model, make_sample, exact_softmax, arch, options):
    model, sample = make_model(arch, **options), make_sample(LENGTHS)
    expected, tokens = full_pass(model, sample), sample["net_input"]["prev_output_tokens"]
    lprobs, _ = walk(step_decoder_for(model), model, tokens, sample)
    assert lprobs.dtype == torch.float64
    real = tokens != 1
    torch.testing.assert_close(lprobs[real], expected[real], atol=1e-10, rtol=0)


def test_embeddings_of_another_size_are_projected(make_model, make_sample, exact_softmax, task):
    model, sample = make_model("transformer"), make_sample(LENGTHS)
    cfg, embed_tokens = model.decoder.cfg, Embedding(len(task.target_dictionary), 6, padding_idx=1)
    model.decoder = TransformerDecoderBase(cfg, task.target_dictionary, embed_tokens).double()
    assert model.decoder.project_in_dim is not None
    tokens = sample["net_input"]["prev_output_tokens"]
    lprobs, _ = walk(step_decoder_for(model), model, tokens, sample)
    real = tokens != 1
    torch.testing.assert_close(lprobs[real], full_pass(model, sample)[real], atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"cross_self_attention": True}])
def test_steps_have_the_gradient_of_the_full_forward_pass(make_model, make_sample, exact_softmax, options):
    model, sample = make_model("transformer", **options), make_sample(LENGTHS)
    tokens = sample["net_input"]["prev_output_tokens"]
    weights = torch.rand(*tokens.shape, 16) * (tokens != 1).unsqueeze(-1)
    grads = []
    for lprobs in (full_pass(model, sample), walk(step_decoder_for(model), model, tokens, sample)[0]):
        model.zero_grad()
        (lprobs * weights).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_the_adaptive_softmax_has_a_gradient(make_model, make_sample):
    """That of fairseq's ``get_log_prob`` fails: it is computed in place."""
    model = make_model("transformer", adaptive_softmax_cutoff="6,10", adaptive_softmax_factor=2)
    decoder, state = three_beams(model, make_sample(LENGTHS))
    lprobs, _ = decoder.step(decoder.embed(torch.full((3, 3), 4)), state)
    torch.testing.assert_close(lprobs.exp().sum(-1), torch.ones(3, 3).double())
    lprobs[..., 15].sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.decoder.adaptive_softmax.tail[1].parameters())


@pytest.mark.parametrize("options", STATES)
def test_a_one_hot_mixture_is_a_reordering_of_the_beams(make_model, make_sample, exact_softmax, options):
    decoder, state = three_beams(make_model("transformer", **options), make_sample(LENGTHS))
    order = torch.tensor([2, 0, 0])
    one_hot = torch.nn.functional.one_hot(order, 3).double().T.expand(3, 3, 3)
    same_token = torch.full((3, 3), 4)
    got, _ = decoder.step(decoder.embed(same_token), decoder.mix(state, one_hot))
    expected, _ = decoder.step(decoder.embed(same_token), state)
    assert (expected[:, 0] - expected[:, 2]).abs().max() > 1e-4
    torch.testing.assert_close(got, expected[:, order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", STATES)
def test_a_mixture_is_the_weighted_sum_of_what_was_written(make_model, make_sample, options):
    sample = make_sample(LENGTHS)
    decoder, state = three_beams(make_model("transformer", **options), sample)
    weights = torch.rand(3, 3, 4, dtype=torch.float64)  # columns need not sum to 1 here
    mixed = decoder.mix(state, weights)
    srclen = 6 if options else 0
    for cache, new_cache in zip(state.caches, mixed.caches, strict=True):
        for part, new_part in zip(cache, new_cache, strict=True):
            assert new_part.shape == (3, 4, 2, srclen + 2, 4)
            expected = torch.einsum("bil,bihtd->blhtd", weights, part[..., srclen:, :])
            torch.testing.assert_close(new_part[..., srclen:, :], expected)
            for beam in range(4):
                assert torch.equal(new_part[:, beam, :, :srclen], part[:, 0, :, :srclen])


@pytest.mark.parametrize("options", STATES)
def test_gradients_pass_through_a_mixture(make_model, make_sample, exact_softmax, options):
    decoder, state = three_beams(
        make_model("transformer", **options).requires_grad_(False), make_sample(LENGTHS[:2])
    )

    def next_lprobs(weights, embeddings):
        _, mixed = decoder.step(embeddings, decoder.mix(state, weights))
        return decoder.step(embeddings, mixed)[0]

    weights = torch.rand(2, 3, 2, dtype=torch.float64).softmax(1).requires_grad_()
    embeddings = torch.rand(2, 2, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(next_lprobs, (weights, embeddings), fast_mode=True)


@pytest.mark.parametrize("options", STATES)
def test_a_state_is_never_modified(make_model, make_sample, options):
    decoder, state = three_beams(make_model("transformer", **options), make_sample(LENGTHS))
    before = [(part.clone(), part._version) for part in tensors(state)]
    embeddings, weights = decoder.embed(torch.full((3, 3), 4)), torch.rand(3, 3, 3).softmax(1)
    first = decoder.step(embeddings, decoder.mix(state, weights))[0]
    again = decoder.step(embeddings, decoder.mix(state, weights))[0]
    assert torch.equal(first, again) and state.num_steps == 2
    for part, (value, version) in zip(tensors(state), before, strict=True):
        assert torch.equal(part, value) and part._version == version


def test_the_source_is_projected_once_per_sentence(make_model, make_sample):
    model, sizes = make_model("transformer"), []
    for layer in model.decoder.layers:
        for projection in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
            projection.register_forward_hook(lambda _module, _args, output: sizes.append(output.shape))
    three_beams(model, make_sample(LENGTHS))
    assert sizes == [(6, 3, 8)] * 4


def test_layerdrop_draws_its_layers_once_per_search(make_model, make_sample, exact_softmax):
    model, sample = make_model("transformer", decoder_layers=6, decoder_layerdrop=0.5), make_sample(LENGTHS)
    tokens = sample["net_input"]["prev_output_tokens"]
    lprobs, state = walk(step_decoder_for(model), model, tokens, sample)
    assert 0 < len(state.layers) < 6
    model.decoder.layers = torch.nn.ModuleList(state.layers)
    real = tokens != 1
    torch.testing.assert_close(lprobs[real], full_pass(model, sample)[real], atol=1e-10, rtol=0)


def test_without_training_layerdrop_drops_nothing(make_model, make_sample):
    model = make_model("transformer", decoder_layerdrop=0.9).eval()
    assert len(step_decoder_for(model).start(encode(model, make_sample(LENGTHS))).layers) == 2


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_acts_in_training_only(make_model, make_sample, option):
    model = make_model("transformer", **{option: 0.5})
    decoder, state = three_beams(model, make_sample(LENGTHS))
    embeddings = decoder.embed(torch.full((3, 3), 4))
    assert not torch.equal(decoder.step(embeddings, state)[0], decoder.step(embeddings, state)[0])
    model.eval()
    assert torch.equal(decoder.step(embeddings, state)[0], decoder.step(embeddings, state)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", STATES)
def test_low_precision_stays_in_the_caches_and_widens_the_output(
    make_model, make_sample, dtype, autocast, options
):
    model, sample = make_model("transformer", **options), make_sample(LENGTHS)
    expected = walk(step_decoder_for(model), model, sample["net_input"]["prev_output_tokens"], sample)[0]
    model = model.float() if autocast else model.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        lprobs = walk(step_decoder_for(model), model, sample["net_input"]["prev_output_tokens"], sample)[0]
        _, state = three_beams(model, sample)
    assert lprobs.dtype == torch.float32
    assert {part.dtype for part in tensors(state)} == {dtype}
    assert (lprobs - expected).abs().max() < 50 * torch.finfo(dtype).eps


class OwnFeatures(TransformerDecoderBase):
    def extract_features(self, *args, **kwargs):
        return super().extract_features(*args, **kwargs)


class OwnLayer(TransformerDecoderLayerBase):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnAttention(MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    "part, own",
    [("decoder", OwnFeatures), ("decoder.layers.1", OwnLayer), ("decoder.layers.0.encoder_attn", OwnAttention)],
)
def test_what_computes_something_else_is_refused(make_model, part, own):
    model = make_model("transformer")
    model.get_submodule(part).__class__ = own
    with pytest.raises(
        ValueError, match=f"but {own.__name__} has its own (forward|extract_features): implement"
    ):
        step_decoder_for(model)


def test_what_is_only_built_differently_is_not_refused(make_model):
    class Built(TransformerDecoderBase):
        def build_decoder_layer(self, cfg, no_encoder_attn=False):
            return super().build_decoder_layer(cfg, no_encoder_attn)

    model = make_model("transformer")
    model.decoder.__class__ = Built
    assert step_decoder_for(model).decoder is model.decoder


def test_options_that_cannot_be_stepped_are_refused(make_model):
    with pytest.raises(ValueError, match=r"--quant-noise-pq .* must be 0 with soft_beam, got 0.1"):
        step_decoder_for(make_model("transformer", quant_noise_pq=0.1, quant_noise_pq_block_size=4))
    model = make_model("transformer")
    model.decoder.layers[0].self_attn.use_xformers = True
    with pytest.raises(ValueError, match="got an xFormers attention"):
        step_decoder_for(model)
    model = make_model("transformer")
    model.decoder.embed_tokens = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="rows of an Embedding, got Linear"):
        step_decoder_for(model)
