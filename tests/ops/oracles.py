"""The same plans by other people's solvers, or by the slowest method that cannot be wrong."""

import math

import mpmath
import numpy as np
import ot
import torch
from scipy.optimize import linprog


def sinkhorn_plan(
    scores: torch.Tensor, anchors: list[float], masses: list[float], epsilon: float, scale: str = "none"
) -> torch.Tensor:
    """n x m plan with rows that sum to 1 and columns that sum to ``masses``, from the paper's own cost."""
    x = scores.double().numpy()
    cost = (x[:, None] - np.asarray(anchors, dtype=float)[None, :]) ** 2
    if scale == "max":
        cost = cost / cost.max()
    return pot_plan(cost, np.ones(len(x)), np.asarray(masses, dtype=float), epsilon, 200_000, 1e-13)


def topk_plan(scores: torch.Tensor, k: int, epsilon: float, largest: bool, scale: str) -> torch.Tensor:
    """The indicator by POT: the selected elements go to anchor 1 (largest) or 0 (smallest)."""
    n = len(scores)
    anchors = [1.0, 0.0] if largest else [0.0, 1.0]
    return sinkhorn_plan(scores, anchors, [k, n - k], epsilon, scale)[:, 0]


def sorted_plan(scores: torch.Tensor, k: int, epsilon: float, largest: bool, scale: str) -> torch.Tensor:
    """The n x k sorted indicator by POT: rank 1 goes to anchor k (largest) or 0 (smallest)."""
    n = len(scores)
    anchors = list(range(k, -1, -1)) if largest else list(range(k + 1))
    return sinkhorn_plan(scores, anchors, [1] * k + [n - k], epsilon, scale)[:, :k]


def pot_plan(
    cost: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    epsilon: float,
    steps: int,
    stop: float,
    method: str = "sinkhorn_log",
) -> torch.Tensor:
    """POT's plan with marginals of any total; ``stop = 0`` takes all the steps."""
    total = rows.sum()
    plan = ot.bregman.sinkhorn(
        rows / total,
        cols / cols.sum(),
        cost,
        epsilon,
        method=method,
        numItermax=steps,
        stopThr=stop,
        warn=False,
    )
    return torch.from_numpy(np.asarray(plan) * total)


def cost_of(scores: torch.Tensor, anchors: list[float]) -> np.ndarray:
    """C_ij = (x_i - b_j)^2."""
    return (scores.double().numpy()[:, None] - np.asarray(anchors, dtype=float)[None, :]) ** 2


def bisected_indicator(scores: torch.Tensor, k: int, epsilon: float) -> torch.Tensor:
    """``sigmoid((2 x_i - tau) / epsilon)`` of sum k, with tau by bisection in 80-bit floats."""
    x = 2 * scores.double().numpy().astype(np.longdouble)

    def indicator(tau: np.longdouble) -> np.ndarray:
        exponent = np.clip((tau - x) / np.longdouble(epsilon), -11000, 11000)  # exp ends at 11356
        return 1 / (1 + np.exp(exponent))

    reach = np.longdouble(epsilon) * (10 + np.log(np.longdouble(len(x))))
    low, high = x.min() - reach, x.max() + reach
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if indicator(middle).sum() > k else (low, middle)
    return torch.from_numpy(indicator(high).astype(np.float64))


def precise_indicator(scores: list[float], k: int, epsilon: float, digits: int = 50) -> list[float]:
    """The same with ``digits`` digits."""
    with mpmath.workdps(digits):
        x = [2 * mpmath.mpf(score) for score in scores]

        def indicator(tau: mpmath.mpf) -> list[mpmath.mpf]:
            return [1 / (1 + mpmath.exp((tau - score) / mpmath.mpf(epsilon))) for score in x]

        reach = mpmath.mpf(epsilon) * (10 + mpmath.log(len(x)))
        low, high = min(x) - reach, max(x) + reach
        for _ in range(int(digits * math.log2(10))):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(indicator(middle)) > k else (low, middle)
        return [float(value) for value in indicator(high)]


def linear_program(cost: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> torch.Tensor:
    """The plan without entropy, by a simplex-type solver."""
    n, m = cost.shape
    equations = np.zeros((n + m, n * m))
    for i in range(n):
        equations[i, i * m : (i + 1) * m] = 1
    for j in range(m):
        equations[n + j, j::m] = 1
    solution = linprog(cost.ravel(), A_eq=equations, b_eq=np.concatenate([rows, cols]), method="highs")
    assert solution.success, solution.message
    return torch.from_numpy(solution.x.reshape(n, m))


def algorithm_1(
    cost: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, epsilon: float, steps: int
) -> torch.Tensor:
    """The paper's Algorithm 1 for one problem, number by number: rows, then columns."""
    n, m = cost.shape
    kernel = [[math.exp(-float(cost[i, j]) / epsilon) for j in range(m)] for i in range(n)]
    q = [1 / m] * m
    for _ in range(steps):
        p = [float(rows[i]) / sum(kernel[i][j] * q[j] for j in range(m)) for i in range(n)]
        q = [float(cols[j]) / sum(kernel[i][j] * p[i] for i in range(n)) for j in range(m)]
    return torch.tensor([[p[i] * kernel[i][j] * q[j] for j in range(m)] for i in range(n)], dtype=torch.float64)


def algorithm_4(plan: torch.Tensor, epsilon: float) -> torch.Tensor:
    """dGamma_hl / dC_ij at [h, l, i, j] by the paper's Algorithm 4 (m = 2: Algorithm 3), entry by entry.

    Args:
        plan: Gamma, (n, m); its sums are the marginals mu and nu.
        epsilon: entropic weight.
    """
    n, m = plan.shape
    mu, nu = plan.sum(1), plan.sum(0)
    bar = plan[:, : m - 1]
    kappa = torch.diag(nu[: m - 1])
    for i in range(n):
        for j in range(m - 1):
            for l in range(m - 1):  # noqa: E741
                kappa[j, l] -= bar[i, j] * bar[i, l] / mu[i]
    inverse = torch.linalg.inv(kappa)
    scaled = bar / mu[:, None]
    h1 = torch.diag(1 / mu) + scaled @ inverse @ scaled.T
    h2 = torch.zeros(n, m, dtype=plan.dtype)
    h2[:, : m - 1] = -scaled @ inverse
    h4 = torch.zeros(m, m, dtype=plan.dtype)
    h4[: m - 1, : m - 1] = inverse
    jacobian = torch.zeros(n, m, n, m, dtype=plan.dtype)
    for h in range(n):
        for l in range(m):  # noqa: E741
            for i in range(n):
                for j in range(m):
                    alpha = (h1[h, i] + h2[h, j]) * plan[i, j]
                    beta = (h2[i, l] + h4[l, j]) * plan[i, j]
                    own = 1.0 if (h, l) == (i, j) else 0.0
                    jacobian[h, l, i, j] = plan[h, l] * (alpha + beta - own) / epsilon
    return jacobian
