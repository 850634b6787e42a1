import pytest
import torch

from fairseq_softtopk.beam.gradient import ScoreGradBound


def backward(bound, incoming, weights, live=(True, True, True), rows=(0, 1, 2)):
    """The gradients of three sentences' scores, of which ``incoming`` comes through the watched ones."""
    watcher = ScoreGradBound(bound, torch.device("cpu"))
    scores = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    watched = watcher.watch(scores, torch.tensor(live), torch.tensor(rows))
    # Something else uses the scores too, and gives them a gradient of 1 that no bound concerns.
    losses = (
        torch.zeros(3).double().index_add(0, torch.tensor(rows), (watched * incoming).sum(1) + scores.sum(1))
    )
    watcher.take_unit(losses)
    (losses * weights).sum().backward()
    return scores.grad - weights[list(rows)].unsqueeze(1), watcher.stats


INCOMING = torch.tensor([[3.0, 0, 4, 0], [0.03, 0, 0.04, 0], [0, 0, 0, 5]]).double()  # norms 5, 0.05, 5


@pytest.mark.parametrize("weights", [(1.0, 1, 1), (0.2, 8, 1e-3)])
def test_the_norm_is_at_most_the_bound_times_the_gradient_of_the_loss(weights):
    weights = torch.tensor(weights).double()
    got, stats = backward(0.5, INCOMING, weights)
    expected = torch.tensor([[0.3, 0, 0.4, 0], [0.03, 0, 0.04, 0], [0, 0, 0, 0.5]]).double()
    torch.testing.assert_close(got, expected * weights.unsqueeze(1))
    assert stats.clipped == 2 and stats.total == 3
    assert float(stats.norm) == pytest.approx(10.05)


def test_a_gradient_whose_square_overflows_is_cut_like_others():
    watcher = ScoreGradBound(0.5, torch.device("cpu"))
    scores = torch.zeros(1, 2, requires_grad=True)
    loss = (watcher.watch(scores, torch.tensor([True]), torch.tensor([0])) * torch.tensor([[3e19, 4e19]])).sum(
        1
    )
    watcher.take_unit(loss)
    loss.sum().backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[0.3, 0.4]]))
    assert float(watcher.stats.norm) == pytest.approx(5e19)


def test_sentences_may_be_some_of_the_batch_in_any_order():
    weights = torch.tensor([0.2, 8, 1e-3]).double()
    got, _ = backward(0.5, INCOMING, weights, rows=(2, 0, 1))
    expected = torch.tensor([[0.3, 0, 0.4, 0], [0.03, 0, 0.04, 0], [0, 0, 0, 0.5]]).double()
    torch.testing.assert_close(got, expected * weights[[2, 0, 1]].unsqueeze(1))


def test_no_bound_only_counts():
    got, stats = backward(0.0, INCOMING, torch.ones(3).double())
    torch.testing.assert_close(got, INCOMING)
    assert stats.clipped == 0 and float(stats.norm) == pytest.approx(10.05)


def test_sentences_that_are_over_or_weigh_nothing_are_not_counted():
    got, stats = backward(0.5, INCOMING, torch.tensor([1.0, 1, 0]).double(), live=(False, True, True))
    torch.testing.assert_close(got[2], torch.zeros(4).double())
    assert stats.total == 1 and float(stats.norm) == pytest.approx(0.05)
