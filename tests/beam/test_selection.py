import pytest
import torch

from fairseq_softtopk.beam.candidates import Candidates
from fairseq_softtopk.beam.selection import RELAXATIONS, select


def candidates(scores: torch.Tensor) -> Candidates:
    """Candidates of two beams, best first."""
    scores = scores.sort(descending=True).values
    positions = torch.arange(scores.size(1)).expand_as(scores)
    return Candidates(scores, positions % 2, positions)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_every_relaxation_tends_to_the_hard_choice(relaxation):
    given = candidates(torch.randn(3, 20))
    chosen = select(given, 4, 1e-6, "none", relaxation)
    torch.testing.assert_close(chosen.weights, torch.eye(20, 4).expand(3, 20, 4))
    assert torch.equal(chosen.beams, given.beams[:, :4]) and torch.equal(chosen.scores, given.scores[:, :4])
    assert chosen.sharpness.eq(1).all() and chosen.agreement.eq(1).all()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_what_every_relaxation_passes_on(relaxation):
    """Columns sum to 1; straight-through is hard forward and soft backward; the hard choice has no gradient."""
    scores = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    weights = select(candidates(scores), 4, 0.5, "none", relaxation).weights
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 4).double())
    assert weights.requires_grad == (relaxation != "hard")
    hard = relaxation in ("hard", "straight_through")
    assert hard == torch.equal(weights.detach(), torch.eye(20, 4).double().expand(3, 20, 4))
    if relaxation == "straight_through":
        incoming = torch.randn_like(weights)
        soft = select(candidates(scores), 4, 0.5, "none").weights
        grads = [torch.autograd.grad(value, scores, incoming)[0] for value in (weights, soft)]
        torch.testing.assert_close(grads[0], grads[1])


def test_softmax_k_equals_the_loop_over_ranks():
    scores = torch.randn(1, 7).sort(descending=True).values
    weights = select(candidates(scores), 3, 0.5, "none", "softmax_k").weights[0]
    for rank in range(3):
        expected = torch.cat([torch.zeros(rank), torch.softmax(scores[0, rank:] / 0.5, dim=0)])
        torch.testing.assert_close(weights[:, rank], expected)
