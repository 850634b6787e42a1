import dataclasses

import pytest
import torch

from fairseq_softtopk.beam.selection import RELAXATIONS, SelectionConfig, beam_weights, select

SOFT = SelectionConfig(size=4, epsilon=0.5)


def best_first(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).sort(descending=True).values.requires_grad_()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_every_relaxation_tends_to_the_hard_choice(relaxation):
    chosen = select(best_first(3, 20), SelectionConfig(4, 1e-6, relaxation))
    torch.testing.assert_close(chosen.weights, torch.eye(20, 4).double().expand(3, 20, 4))
    assert torch.equal(chosen.origin, torch.arange(4).expand(3, 4))
    assert chosen.sharpness.eq(1).all() and chosen.agreement.eq(1).all()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_what_every_relaxation_passes_on(relaxation):
    """Columns sum to 1; straight-through is hard forward and soft backward; the hard choice has no gradient."""
    scores = best_first(3, 20)
    weights = select(scores, dataclasses.replace(SOFT, relaxation=relaxation)).weights
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 4).double())
    assert weights.requires_grad == (relaxation != "hard")
    hard = relaxation in ("hard", "straight_through")
    assert hard == torch.equal(weights.detach(), torch.eye(20, 4).double().expand(3, 20, 4))
    if relaxation == "straight_through":
        incoming = torch.randn_like(weights)
        soft = select(scores, SOFT).weights
        grads = [torch.autograd.grad(value, scores, incoming)[0] for value in (weights, soft)]
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("relaxation", ["soft_topk", "softmax_k", "straight_through"])
def test_backward_epsilon_changes_the_gradient_and_nothing_else(relaxation):
    scores = best_first(3, 20)
    incoming = torch.randn(3, 20, 4).double()
    config = SelectionConfig(4, 0.1, relaxation)
    plain, both, soft = (
        select(scores, dataclasses.replace(config, **change)).weights
        for change in ({}, {"backward_epsilon": 1.0}, {"epsilon": 1.0})
    )
    torch.testing.assert_close(both, plain)
    grads = [torch.autograd.grad(value, scores, incoming)[0] for value in (both, soft, plain)]
    torch.testing.assert_close(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


def test_softmax_k_equals_the_loop_over_ranks():
    scores = best_first(1, 7)
    weights = select(scores, SelectionConfig(3, 0.5, "softmax_k")).weights[0]
    for rank in range(3):
        expected = torch.cat([torch.zeros(rank).double(), torch.softmax(scores[0, rank:] / 0.5, dim=0)])
        torch.testing.assert_close(weights[:, rank], expected)


def test_beam_weights_are_the_sums_over_a_beams_candidates():
    weights, beams = torch.rand(2, 6, 3), torch.tensor([[0, 1, 1, 3, 0, 1], [2, 2, 2, 2, 2, 2]])
    got = beam_weights(weights, beams, 4)
    for sentence in range(2):
        for beam in range(4):
            expected = weights[sentence, beams[sentence] == beam].sum(0)
            torch.testing.assert_close(got[sentence, beam], expected)
