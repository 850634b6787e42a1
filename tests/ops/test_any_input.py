"""Nothing but numbers comes out for finite scores of any magnitude, dtype and epsilon: 2,400 examples."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fairseq_softtopk.ops import log_soft_topk, soft_topk, sorted_soft_topk

FUZZ = settings(max_examples=600, deadline=None, derandomize=True)
# What PyTorch 2.5 compiles turns subnormal numbers off for the whole process.
floats = partial(st.floats, allow_subnormal=False)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@st.composite
def problems(draw):
    """Two problems: numbers of one magnitude or of all, constants, ties, one huge outlier; k and epsilon."""
    n, dtype = draw(st.integers(1, 12)), draw(st.sampled_from(DTYPES))
    magnitude = 10.0 ** draw(floats(-30, 30))
    unit = floats(-1, 1)
    kind = draw(st.sampled_from(["one", "all", "constant", "ties", "outlier"]))
    number = {
        "one": unit.map(lambda u: u * magnitude),
        "all": st.tuples(unit, floats(-30, 30)).map(lambda pair: pair[0] * 10.0 ** pair[1]),
        "constant": st.just(magnitude),
        "ties": st.integers(-1, 1).map(lambda u: u * magnitude),
        "outlier": unit,
    }[kind]
    scores = torch.tensor(draw(st.lists(number, min_size=2 * n, max_size=2 * n)), dtype=torch.float64)
    if kind == "outlier":
        scores[0] = magnitude * draw(st.sampled_from([-1, 1]))
    most = torch.finfo(dtype).max
    scores = scores.clamp(-most, most).to(dtype).view(2, n).requires_grad_()
    return scores, draw(st.integers(0, n)), 10.0 ** draw(floats(-8, 4))


OPTIONS = st.fixed_dictionaries(
    {"largest": st.booleans(), "cost_scale": st.sampled_from(["none", "max", "batch_max"])}
)


def check_gradient(scores, weights, rank, slope):
    """The gradient of the weights of the element of one rank, which is at most ``slope`` in size.

    Only float16 may overflow, and only where the slope is beyond its largest number.
    """
    at = scores.detach().sort(-1, descending=True).indices[:, rank]
    (gradient,) = torch.autograd.grad(weights[torch.arange(2), at].sum(), scores)
    assert not gradient.isnan().any()
    if scores.dtype != torch.float16 or slope <= torch.finfo(torch.float16).max:
        assert gradient.isfinite().all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
@FUZZ
@given(problems(), OPTIONS)
def test_soft_topk(problem, options):
    scores, k, epsilon = problem
    weights = soft_topk(scores, k, epsilon=epsilon, **options)
    assert weights.dtype == scores.dtype and ((weights >= 0) & (weights <= 1)).all()
    rounding = torch.finfo(scores.dtype).eps + 1e-6 * (scores.dtype != torch.float64)
    assert (weights.double().sum(-1) - k).abs().max() <= scores.size(-1) * rounding * 4
    rank = max(k, 1) - 1 if options["largest"] else -max(k, 1)
    check_gradient(scores, weights, rank, 1 / (2 * epsilon))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@FUZZ
@given(problems(), OPTIONS)
def test_log_soft_topk(problem, options):
    scores, k, epsilon = problem
    logs = log_soft_topk(scores, k, epsilon=epsilon, **options)
    assert logs.dtype == scores.dtype and not logs.isnan().any() and (logs <= 0).all()
    # ln A > -1e30 - ln n, the largest slope that is looked at: only k = 0, and float16 beyond its end, are -inf
    if k and scores.dtype != torch.float16:
        assert logs.isfinite().all()
    weights = soft_topk(scores.detach(), k, epsilon=epsilon, **options)
    rounding = 2 * torch.finfo(scores.dtype).eps + 1e-5 * (scores.dtype != torch.float64)
    finite = logs.double().exp().masked_fill(logs == -math.inf, 0.0)
    # exp multiplies the rounding of ln A by |ln A| A, which is at most 1 / e
    torch.testing.assert_close(finite, weights.double(), atol=rounding, rtol=0)
    if k:
        (gradient,) = torch.autograd.grad(logs.masked_fill(logs.isinf(), 0.0).sum(), scores)
        assert not gradient.isnan().any()
        if scores.dtype != torch.float16:
            assert gradient.isfinite().all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
@FUZZ
@given(problems(), OPTIONS)
def test_sorted_soft_topk(problem, options):
    scores, k, epsilon = problem
    weights = sorted_soft_topk(scores, k, epsilon=epsilon, **options)
    assert weights.dtype == scores.dtype and ((weights >= 0) & (weights <= 1)).all()
    rounding = scores.size(-1) * torch.finfo(scores.dtype).eps + 1e-8
    torch.testing.assert_close(weights.double().sum(1), torch.ones(2, k).double(), atol=rounding, rtol=0)
    if k:
        rank = k - 1 if options["largest"] else -k
        check_gradient(scores, weights, rank, 2 * k / epsilon)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@FUZZ
@given(problems(), st.booleans())
def test_epsilon_as_a_tensor_that_requires_a_gradient(problem, by_rank):
    scores, k, epsilon = problem
    weight = torch.tensor([epsilon, 1.0], dtype=torch.float64, requires_grad=True)
    operator = sorted_soft_topk if by_rank else soft_topk
    weights = operator(scores, k, epsilon=weight)
    for_scores, for_epsilon = torch.autograd.grad(weights.square().sum(), (scores, weight), allow_unused=True)
    assert not weights.isnan().any()
    for gradient in (for_scores, for_epsilon):
        assert gradient is None or not gradient.isnan().any()
    if for_epsilon is not None and scores.dtype != torch.float16:
        assert for_epsilon.isfinite().all()
