import math

import pytest
import torch
from fairseq.models.lstm import AttentionLayer

from fairseq_softtopk.models.attention import BeamAttentionLayer, TopKAttentionLayer
from fairseq_softtopk.ops import soft_topk


def make_layer(k=3, epsilon=0.1):
    return TopKAttentionLayer(AttentionLayer(6, 8, 6), k, epsilon)


def test_is_the_softmax_of_the_scores_plus_the_log_indicator():
    scores = torch.randn(4, 1, 9, dtype=torch.float64)
    indicator = soft_topk(scores, 3, epsilon=0.5)
    expected = torch.softmax(scores + indicator.log(), dim=-1)
    torch.testing.assert_close(make_layer(epsilon=0.5).attend(scores), expected)


def test_small_epsilon_attends_to_exactly_k():
    scores = torch.randn(4, 2, 9)
    weights = make_layer(k=3, epsilon=1e-6).attend(scores)
    assert (weights > 1e-30).sum(-1).eq(3).all()
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(3).indices, True)
    expected = torch.softmax(scores.masked_fill(~kept, -math.inf), dim=-1)
    torch.testing.assert_close(weights, expected)


def test_padding_has_no_weight_and_a_short_source_gets_plain_softmax():
    scores = torch.randn(3, 1, 6)
    scores[1, :, 4:], scores[2, :, 2:] = -math.inf, -math.inf
    weights = make_layer(k=3).attend(scores)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 1))
    assert weights[1, :, 4:].eq(0).all() and weights[2, :, 2:].eq(0).all()
    torch.testing.assert_close(weights[2], torch.softmax(scores[2], dim=-1))  # two tokens, k = 3
    torch.testing.assert_close(weights[1, :, :4], make_layer(k=3).attend(scores[1, :, :4]))


def test_softmax_relaxation_is_the_stock_layer():
    stock = AttentionLayer(6, 8, 6)
    source, queries = torch.randn(5, 3, 8), torch.randn(3, 6)
    mask = torch.tensor([[False] * 3] * 4 + [[True, False, True]])
    for got, expected in zip(
        BeamAttentionLayer(stock)(queries, source, mask), stock(queries, source, mask), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_beams_attend_as_if_the_source_were_repeated():
    layer, source, mask = make_layer(), torch.randn(5, 3, 8), torch.zeros(5, 3, dtype=torch.bool)
    queries = torch.randn(3 * 4, 6)
    got = layer(queries, source, mask)
    expected = layer(queries, source.repeat_interleave(4, 1), mask.repeat_interleave(4, 1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_incremental_decoding_equals_the_full_forward_pass(make_model, make_sample):
    model, sample = (
        make_model("topk_attention", encoder_bidirectional=True).eval(),
        make_sample([(6, 7), (3, 5)]),
    )
    net_input, state = sample["net_input"], {}
    expected, attention = model(**net_input)
    encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    tokens = net_input["prev_output_tokens"]
    for step in range(tokens.size(1)):
        got, step_attention = model.decoder(tokens[:, : step + 1], encoder_out, incremental_state=state)
        torch.testing.assert_close(got[:, 0], expected[:, step])
        torch.testing.assert_close(step_attention[:, 0], attention[:, step])


def test_the_shorter_source_is_not_disturbed_by_its_padding(make_model, make_sample):
    model, sample = make_model("topk_attention").eval(), make_sample([(6, 4), (2, 4)])
    net_input = sample["net_input"]
    row = int(net_input["src_lengths"].argmin())
    source = net_input["src_tokens"][row]
    alone, _ = model(
        source[source != 1][None], torch.tensor([2]), net_input["prev_output_tokens"][row : row + 1]
    )
    torch.testing.assert_close(model(**net_input)[0][row], alone[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention_top_k": 0}, "--attention-top-k must be at least 1, got 0"),
        ({"attention_epsilon": 0.0}, "--attention-epsilon must be positive and finite, got 0.0"),
        ({"attention_relaxation": "sparsemax"}, "--attention-relaxation must be one of soft_topk, softmax"),
    ],
)
def test_bad_options_name_the_value(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        make_model("topk_attention", **options)
