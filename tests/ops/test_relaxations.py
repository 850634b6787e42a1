import math
from functools import partial
from itertools import permutations

import numpy as np
import ot
import pytest
import torch

from fairseq_softtopk.ops import neuralsort, relax_subset, sinkhorn_sort, softmax_k

RANKED = [softmax_k, neuralsort, partial(sinkhorn_sort, epsilon=0.05)]
ALL = [*RANKED, relax_subset]
MASKABLE = [softmax_k, neuralsort, relax_subset]
WITH_TEMPERATURE = [softmax_k, neuralsort, relax_subset]


def scores_of(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def indicator(weights):
    """Of the elements, whatever the form of the weights."""
    return weights.sum(-1) if weights.dim() == 3 else weights


def naive_softmax_k(x, k, temperature):
    left, columns = list(range(len(x))), []
    for _ in range(k):
        total = sum(math.exp(x[i] / temperature) for i in left)
        columns.append([math.exp(x[i] / temperature) / total if i in left else 0.0 for i in range(len(x))])
        left.remove(max(left, key=lambda i: x[i]))
    return torch.tensor(columns, dtype=torch.float64).T


def naive_relax_subset(x, k, temperature):
    alpha, weights = list(x), [0.0] * len(x)
    for _ in range(k):
        total = sum(math.exp(a / temperature) for a in alpha)
        share = [math.exp(a / temperature) / total for a in alpha]
        weights = [w + p for w, p in zip(weights, share, strict=True)]
        alpha = [a + math.log(1 - p) if p < 1 else -math.inf for a, p in zip(alpha, share, strict=True)]
    return torch.tensor(weights, dtype=torch.float64)


def naive_neuralsort(x, k, temperature):
    n, columns = len(x), []
    for i in range(1, k + 1):
        logits = [((n + 1 - 2 * i) * a - sum(abs(a - b) for b in x)) / temperature for a in x]
        total = sum(math.exp(logit) for logit in logits)
        columns.append([math.exp(logit) / total for logit in logits])
    return torch.tensor(columns, dtype=torch.float64).T


NAIVE = [(softmax_k, naive_softmax_k), (relax_subset, naive_relax_subset), (neuralsort, naive_neuralsort)]


@pytest.mark.parametrize("relaxation, naive", NAIVE)
@pytest.mark.parametrize(
    "n, k, temperature", [(1, 1, 1.0), (5, 1, 0.3), (5, 5, 2.0), (9, 4, 0.7), (30, 6, 3.0)]
)
def test_is_what_the_paper_defines(relaxation, naive, n, k, temperature):
    scores = scores_of(3, n)
    weights = relaxation(scores, k, temperature=temperature)
    for row, expected in zip(weights, (naive(x.tolist(), k, temperature) for x in scores), strict=True):
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("epsilon", [0.3, 0.05, 0.01])
@pytest.mark.parametrize("solver", ["newton", "sinkhorn_log"])
def test_sinkhorn_sort_is_the_plan_of_pot(epsilon, solver):
    x, k = scores_of(7), 3
    squashed = torch.sigmoid((x - x.mean()) / x.std(correction=0))
    cost = ot.dist(squashed.unsqueeze(1), torch.linspace(1, 0, 7, dtype=torch.float64).unsqueeze(1))
    mass = torch.full((7,), 1 / 7, dtype=torch.float64)
    plan = ot.sinkhorn(mass, mass, cost, epsilon, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12)
    weights = sinkhorn_sort(
        x, k, epsilon=epsilon, solver=solver, max_iter=100 if solver == "newton" else 20_000
    )
    torch.testing.assert_close(weights, 7 * plan[:, :k], atol=1e-7, rtol=0)


@pytest.mark.parametrize("relaxation", RANKED)
def test_each_rank_sums_to_one(relaxation):
    weights = relaxation(scores_of(4, 11), 5)
    assert weights.shape == (4, 11, 5) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(-2), torch.ones(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 100.0])
def test_a_relaxed_subset_has_k_elements(temperature):
    weights = relax_subset(scores_of(4, 11), 5, temperature=temperature)
    torch.testing.assert_close(weights.sum(-1), torch.full((4,), 5.0, dtype=torch.float64))
    assert weights.min() >= 0


def test_neuralsort_is_unimodal():
    """Each rank has another largest element, at every temperature (Grover et al. 2019, Definition 1)."""
    for temperature in (0.1, 1.0, 10.0):
        weights = neuralsort(scores_of(4, 11), 11, temperature=temperature)
        assert torch.equal(weights.argmax(-2).sort().values, torch.arange(11).expand(4, 11))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("relaxation", ALL)
def test_the_hard_limit_is_topk(relaxation, largest):
    scores, k = torch.stack([torch.randperm(11) for _ in range(4)]).double(), 4
    cold = {"epsilon": 1e-4} if isinstance(relaxation, partial) else {"temperature": 1e-3}
    weights = relaxation(scores, k, largest=largest, **cold)
    order = scores.topk(k, largest=largest).indices
    expected = torch.zeros(4, 11, k, dtype=torch.float64).scatter(1, order.unsqueeze(1), 1.0)
    expected = expected.sum(-1) if relaxation is relax_subset else expected
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("relaxation", [relax_subset, neuralsort])
def test_samples_are_plackett_luce(relaxation):
    """Cold samples hit every element as often as drawing without replacement, by the weights exp(x), does."""
    x, k, draws = torch.tensor([1.0, 0.0, -0.5, 0.3], dtype=torch.float64), 2, 20_000
    weight, expected = x.exp().tolist(), torch.zeros(4, dtype=torch.float64)
    for first, second in permutations(range(4), 2):
        p = weight[first] / sum(weight) * weight[second] / (sum(weight) - weight[first])
        expected[first] += p
        expected[second] += p
    drawn = indicator(relaxation(x.expand(draws, 4), k, temperature=1e-4, sample=True)).mean(0)
    torch.testing.assert_close(drawn, expected, atol=5 * math.sqrt(0.25 / draws), rtol=0)


@pytest.mark.parametrize("relaxation", ALL)
def test_gradients(relaxation):
    assert torch.autograd.gradcheck(lambda x: relaxation(x, 2), scores_of(2, 5).requires_grad_())


def test_a_certain_element_leaves_no_infinity_behind():
    scores = torch.tensor([500.0, 0.0, -500.0], requires_grad=True)
    weights = relax_subset(scores, 2, temperature=0.5)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.0]))
    (gradient,) = torch.autograd.grad(weights[0] + 2 * weights[2], scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("relaxation", MASKABLE)
def test_masked_scores_have_no_weight_and_no_influence(relaxation):
    scores = scores_of(3, 8)
    scores[:, 2], scores[:, 5] = -math.inf, -math.inf
    left = [0, 1, 3, 4, 6, 7]
    weights = relaxation(scores.requires_grad_(), 3)
    torch.testing.assert_close(weights[:, left], relaxation(scores[:, left], 3))
    assert weights[:, [2, 5]].eq(0).all()
    (gradient,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), scores)
    assert gradient.isfinite().all() and gradient[:, [2, 5]].eq(0).all()


@pytest.mark.parametrize("relaxation", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_that_of_the_scores(relaxation, dtype):
    scores = torch.randn(3, 8).to(dtype)
    weights = relaxation(scores, 3)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, relaxation(scores.float(), 3).to(dtype))


@pytest.mark.parametrize("relaxation", ALL)
def test_any_dimension(relaxation):
    scores = scores_of(3, 6, 2)
    weights, last = relaxation(scores, 2, dim=1), relaxation(scores.transpose(1, 2), 2)
    torch.testing.assert_close(weights, last.transpose(1, 2) if relaxation is relax_subset else last)


@pytest.mark.parametrize("relaxation", ALL)
@pytest.mark.parametrize(
    "scores, k, message",
    [
        (torch.tensor(1.0), 1, "at least one dimension"),
        (torch.tensor([1, 2]), 1, "must be floating point, got torch.int64"),
        (torch.tensor([1.0, 2.0]), 3, r"k must lie in \[0, 2\], the number of scores, got 3"),
        (torch.tensor([1.0, 2.0]), 1.5, "k must be an integer, got 1.5"),
        (torch.tensor([1.0, 2.0]), None, "k must be an integer, got None"),
        (torch.tensor([1.0, 2.0]), torch.tensor(1), "k must be an int here"),
        (torch.tensor([1.0, math.nan]), 1, "scores contain NaN"),
        (torch.tensor([1.0, math.inf]), 1, "the infinity that no selection can avoid"),
        (torch.tensor([1.0, -math.inf]), 2, "k = 2 elements to select, but the mask leaves only 1"),
    ],
)
def test_bad_input_is_named(relaxation, scores, k, message):
    with pytest.raises(ValueError, match=message):
        relaxation(scores, k)


@pytest.mark.parametrize("relaxation", ALL)
@pytest.mark.parametrize("k", [2.0, np.int64(2)])
def test_k_is_any_whole_number(relaxation, k):
    scores = torch.randn(5)
    torch.testing.assert_close(relaxation(scores, k), relaxation(scores, 2), rtol=0, atol=0)


@pytest.mark.parametrize("relaxation", ALL)
def test_nothing_to_select_from(relaxation):
    weights = relaxation(torch.empty(2, 0), 0)
    assert weights.shape in ((2, 0), (2, 0, 0))


@pytest.mark.parametrize("relaxation", ALL)
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0, -7.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_have_equal_weights_and_a_bounded_gradient(relaxation, value, dtype):
    scores = torch.full((2, 100), value, dtype=dtype, requires_grad=True)
    weights = relaxation(scores, 9)
    if relaxation is not softmax_k:  # which breaks the tie
        torch.testing.assert_close(indicator(weights)[:, 0], torch.full((2,), 0.09, dtype=dtype))
    (gradient,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), scores)
    assert gradient.abs().max() < 100


@pytest.mark.parametrize("relaxation", WITH_TEMPERATURE)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_temperature_is_named(relaxation, temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
        relaxation(torch.randn(4), 2, temperature=temperature)


def test_sinkhorn_sort_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="knows no masked scores"):
        sinkhorn_sort(torch.tensor([1.0, 2.0, -math.inf]), 2)
    with pytest.raises(ValueError, match="epsilon must be positive and finite, got"):
        sinkhorn_sort(torch.randn(4), 2, epsilon=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e20, 1e30])
def test_sinkhorn_sort_has_no_unit(scale):
    scores = torch.tensor([1.0, 3.0, 2.0])
    torch.testing.assert_close(sinkhorn_sort(scores * scale, 2), sinkhorn_sort(scores, 2), atol=1e-5, rtol=1e-4)
