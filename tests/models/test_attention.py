import pytest
import torch
from fairseq.models.lstm import AttentionLayer

from fairseq_softtopk.models.attention import (
    BeamAttentionLayer,
    DotAttentionLayer,
    MLPAttentionLayer,
)
from fairseq_softtopk.models.relaxation import Relaxation

HIDDEN, SOURCE = 6, 8
MASK = torch.tensor([[False] * 3] * 4 + [[True, False, True]])


def make_layer(score):
    """The layer, and a source of 5 x 3 states (and keys) for it."""
    relaxation = Relaxation("soft_topk", 3)
    if score == "dot":
        return DotAttentionLayer(AttentionLayer(HIDDEN, HIDDEN, 5), relaxation), torch.randn(5, 3, HIDDEN)
    stock = AttentionLayer(HIDDEN, SOURCE, 5)
    if score == "mlp":
        return MLPAttentionLayer(stock, relaxation), torch.randn(5, 3, SOURCE + HIDDEN)
    return BeamAttentionLayer(stock, relaxation), torch.randn(5, 3, SOURCE)


def test_softmax_is_the_stock_layer():
    stock = AttentionLayer(HIDDEN, SOURCE, HIDDEN)
    source, queries = torch.randn(5, 3, SOURCE), torch.randn(3, HIDDEN)
    for got, expected in zip(
        BeamAttentionLayer(stock)(queries, source, MASK), stock(queries, source, MASK), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("score", ["general", "dot", "mlp"])
def test_is_what_its_formula_says_one_position_at_a_time(score):
    layer, source = make_layer(score)
    queries = torch.randn(3, HIDDEN)
    output, weights = layer(queries, source, MASK)
    for sentence in range(3):
        s, real = queries[sentence], [j for j in range(5) if not MASK[j, sentence]]
        scores = []
        for j in real:
            h = source[j, sentence]
            if score == "general":
                scores.append(layer.input_proj(s) @ h)
            elif score == "dot":
                scores.append(s @ h)
            else:
                scores.append(layer.score_proj(torch.tanh(layer.input_proj(s) + h[SOURCE:]))[0])
        expected = Relaxation("soft_topk", 3)(torch.stack(scores))
        torch.testing.assert_close(weights[real, sentence], expected)
        states = source[real, sentence, : layer.output_proj.in_features - HIDDEN]
        attended = torch.tanh(layer.output_proj(torch.cat((expected @ states, s))))
        torch.testing.assert_close(output[sentence], attended)


@pytest.mark.parametrize("score", ["general", "dot", "mlp"])
def test_beams_attend_as_if_the_source_were_repeated(score):
    layer, source = make_layer(score)
    queries = torch.randn(3 * 4, HIDDEN)
    got = layer(queries, source, MASK)
    expected = layer(queries, source.repeat_interleave(4, 1), MASK.repeat_interleave(4, 1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_dot_wants_states_of_one_size():
    with pytest.raises(ValueError, match="an encoder output of 8 and --decoder-hidden-size 6"):
        DotAttentionLayer(AttentionLayer(6, 8, 6), Relaxation())
