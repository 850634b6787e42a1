import math
from argparse import Namespace

import entmax
import pytest
import torch

from fairseq_softtopk.models.relaxation import RELAXATIONS, Relaxation
from fairseq_softtopk.ops import soft_topk
from fairseq_softtopk.schedules import Schedule

EXACTLY_K = ["hard_topk", "soft_topk"]


def masked_scores():
    """Rows of 6, 4 and 2 real positions."""
    scores = torch.randn(3, 1, 6, dtype=torch.float64)
    scores[1, :, 4:], scores[2, :, 2:] = -math.inf, -math.inf
    return scores


def test_soft_topk_is_the_softmax_of_the_scores_plus_the_log_indicator():
    scores = torch.randn(4, 1, 9, dtype=torch.float64)
    indicator = soft_topk(scores, 3, epsilon=0.5)
    expected = torch.softmax(scores + indicator.log(), dim=-1)
    torch.testing.assert_close(Relaxation("soft_topk", 3, 0.5)(scores), expected)


def test_the_scale_of_the_cost_is_that_of_a_target_position():
    scores = masked_scores()
    expected = torch.softmax(scores + soft_topk(scores, 2, epsilon=0.3, cost_scale="max").log(), dim=-1)
    torch.testing.assert_close(Relaxation("soft_topk", 2, 0.3, "max")(scores)[:2], expected[:2])
    alone = Relaxation("soft_topk", 2, 0.3, "max")(scores[1:2, :, :4])
    torch.testing.assert_close(Relaxation("soft_topk", 2, 0.3, "max")(scores)[1:2, :, :4], alone)


@pytest.mark.parametrize("kind", RELAXATIONS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, "all padding"])
def test_a_score_that_overflowed_is_nan_in_its_own_row(kind, wrong):
    scores = torch.randn(3, 1, 9)
    expected = Relaxation(kind, 3)(scores)
    if wrong == "all padding":
        scores[1] = -math.inf
    else:
        scores[1, 0, 4] = wrong
    weights = Relaxation(kind, 3)(scores)
    assert weights[1].isnan().any()
    torch.testing.assert_close(weights[::2], expected[::2])


def test_nothing_is_read_from_a_device():
    assert Relaxation("soft_topk", 3)(torch.randn(2, 9, device="meta")).shape == (2, 9)


@pytest.mark.parametrize("kind", EXACTLY_K)
def test_attends_to_exactly_k_where_epsilon_is_small(kind):
    scores = torch.randn(4, 2, 9)
    weights = Relaxation(kind, 3, 1e-6)(scores)
    assert (weights > 1e-30).sum(-1).eq(3).all()
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(3).indices, True)
    expected = torch.softmax(scores.masked_fill(~kept, -math.inf), dim=-1)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("kind", ["sparsemax", "entmax15"])
def test_sparse_weights_are_those_of_the_library(kind):
    scores = torch.randn(4, 2, 9)
    torch.testing.assert_close(Relaxation(kind)(scores), getattr(entmax, kind)(scores, dim=-1))


@pytest.mark.parametrize("kind", RELAXATIONS)
def test_padding_has_no_weight_and_no_influence(kind):
    scores = masked_scores().requires_grad_()
    relaxation = Relaxation(kind, 3)
    weights = relaxation(scores)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 1, dtype=torch.float64))
    assert weights[scores == -math.inf].eq(0).all()
    for row, length in ((1, 4), (2, 2)):
        torch.testing.assert_close(weights[row, :, :length], relaxation(scores[row, :, :length]))
    (gradient,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), scores)
    assert gradient.isfinite().all() and gradient[scores == -math.inf].eq(0).all()
    assert gradient[scores > -math.inf].ne(0).any()


@pytest.mark.parametrize("kind", [*EXACTLY_K, "softmax"])
def test_a_source_shorter_than_k_gets_a_plain_softmax(kind):
    scores = masked_scores()[2]
    torch.testing.assert_close(Relaxation(kind, 3)(scores), torch.softmax(scores, dim=-1))


@pytest.mark.parametrize("kind", RELAXATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    scores = torch.randn(4, 9).to(dtype)
    weights = Relaxation(kind, 3)(scores)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, Relaxation(kind, 3)(scores.float()))


@pytest.mark.parametrize("kind", RELAXATIONS)
def test_gradients(kind):
    scores = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Relaxation(kind, 3, 0.5), scores)


def test_epsilon_follows_its_schedule():
    relaxation = Relaxation("soft_topk", 3, Schedule("--attention-epsilon", 1.0, 0.01, 100, "exponential"))
    scores, epsilons = torch.randn(2, 9), []
    for done in (0, 50, 100, 200):
        relaxation.set_num_updates(done)
        epsilons.append(relaxation.epsilon)
        torch.testing.assert_close(
            relaxation(scores), Relaxation("soft_topk", 3, relaxation.epsilon)(scores), rtol=0, atol=0
        )
    assert epsilons == pytest.approx([1.0, 0.1, 0.01, 0.01])


def test_the_number_of_updates_travels_with_the_parameters():
    schedule = Schedule("--attention-epsilon", 1.0, 0.1, 100, "linear")
    trained, loaded = Relaxation("soft_topk", 3, schedule), Relaxation("soft_topk", 3, schedule)
    trained.set_num_updates(50)
    loaded.load_state_dict(trained.state_dict())
    assert loaded.epsilon == trained.epsilon == pytest.approx(0.55)


@pytest.mark.parametrize("kind", RELAXATIONS)
def test_padding_has_no_weight_beside_scores_that_are_large(kind):
    weights = Relaxation(kind, 2)(torch.tensor([1e8, -1e8, -math.inf]))
    assert weights.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("soft_topk", 0, 0.1), "--attention-top-k must be a whole number, at least 1, got 0"),
        (("soft_topk", 2.7, 0.1), "--attention-top-k must be a whole number, at least 1, got 2.7"),
        (("hard_topk", 1, 0.1), "hard_topk wants --attention-top-k of at least 2"),
        (("soft_topk", 3, 0.0), "--attention-epsilon must be positive and finite, got 0.0"),
        (("soft_topk", 3, math.inf), "--attention-epsilon must be positive and finite, got inf"),
        (
            ("soft_topk", 3, Schedule("--attention-epsilon", 1.0, -0.1, 5, "linear")),
            "--attention-epsilon-end must be positive and finite, got -0.1",
        ),
        (
            ("softmax", 3, Schedule("--attention-epsilon", 1.0, 0.1, 5, "linear")),
            "--attention-epsilon-schedule wants --attention-relaxation soft_topk, got softmax",
        ),
        (
            ("softmax", 3, 0.1, "max"),
            "--attention-cost-scale wants --attention-relaxation soft_topk, got softmax",
        ),
        (("soft_topk", 3, 0.1, "batch_max"), "--attention-cost-scale must be one of none, max, got batch_max"),
        (("relu", 3, 0.1), "--attention-relaxation must be one of soft_topk, softmax, .*, got relu"),
    ],
)
def test_bad_options_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Relaxation(*arguments)


def test_the_end_of_a_schedule_wants_a_schedule():
    with pytest.raises(
        ValueError, match=r"--attention-epsilon-end wants an --attention-epsilon-schedule, got 0\.5"
    ):
        Relaxation.from_args(Namespace(attention_epsilon_end=0.5))


def test_says_which_package_is_missing(monkeypatch):
    monkeypatch.setattr("fairseq_softtopk.models.relaxation.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--attention-relaxation entmax15 needs the package entmax"):
        Relaxation("entmax15")


@pytest.mark.parametrize(
    "kind, unused",
    [("soft_topk", 0), ("hard_topk", 1), ("softmax", 2), ("sparsemax", 2), ("entmax15", 2)],
)
def test_options_without_effect_are_warned_of(kind, unused, caplog):
    Relaxation.from_args(Namespace(attention_relaxation=kind))
    assert not caplog.messages
    relaxation = Relaxation.from_args(
        Namespace(attention_relaxation=kind, attention_top_k=3, attention_epsilon=0.5)
    )
    ignored = ["--attention-top-k", "--attention-epsilon"][2 - unused :]
    assert [message.split()[0] for message in caplog.messages] == ignored
    assert all(f"no effect with --attention-relaxation {kind}" in message for message in caplog.messages)
    shown = [name for name in ("k=3", "epsilon=0.5") if name in repr(relaxation)]
    assert len(shown) == 2 - unused
