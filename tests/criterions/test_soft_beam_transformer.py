import pytest
import torch

LENGTHS = [(5, 4), (3, 6), (2, 1), (4, 2)]


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("options", [{}, {"cross_self_attention": True}])
def test_trains_a_transformer(make_model, make_sample, make_criterion, rho, options):
    model = make_model("transformer", decoder_normalize_before=True, **options).float()
    sample = make_sample(LENGTHS)
    criterion = make_criterion(teacher_forcing_ratio=rho)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.03), []
    for _ in range(30):
        optimizer.zero_grad()
        loss, size, _ = criterion(model, sample)
        loss.backward()
        losses.append(float(loss.detach()) / size)
        optimizer.step()
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_are_finite_in_low_precision(make_model, make_sample, make_criterion, dtype):
    model, sample = make_model("transformer"), make_sample(LENGTHS)
    expected = make_criterion()(model, sample)[0]
    loss = make_criterion()(model.to(dtype), sample)[0]
    loss.backward()
    torch.testing.assert_close(loss.float(), expected.float(), rtol=0.05, atol=0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_gradients_are_finite_under_autocast(make_model, make_sample, make_criterion):
    model, sample = make_model("transformer").float(), make_sample(LENGTHS)
    expected = make_criterion()(model, sample)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = make_criterion()(model, sample)[0]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_an_adaptive_softmax_is_the_distribution_of_both_losses(make_model, make_sample, make_criterion):
    model = make_model("transformer", adaptive_softmax_cutoff="6,10", adaptive_softmax_factor=2)
    sample = make_sample(LENGTHS)
    loss, _, logged = make_criterion()(model, sample)
    loss.backward()
    assert all(
        p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.decoder.adaptive_softmax.parameters()
    )
    with torch.no_grad():
        lprobs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
    expected = torch.nn.functional.nll_loss(
        lprobs.flatten(0, 1), sample["target"].flatten(), ignore_index=1, reduction="sum"
    )
    torch.testing.assert_close(logged["teacher_forcing_loss"], expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", ["gold", "risk"])
def test_a_hypothesis_is_not_longer_than_there_are_positions(
    make_model, make_sample, make_criterion, objective
):
    model = make_model("transformer", decoder_learned_pos=True, max_target_positions=10)
    loss, _, _ = make_criterion(soft_beam_objective=objective)(model, make_sample([(4, 10), (3, 4)]))
    loss.backward()
    assert loss.isfinite()
