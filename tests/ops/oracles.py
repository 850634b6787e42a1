"""The plan by somebody else's solver: POT's log-domain Sinkhorn, run to 1e-12."""

import numpy as np
import ot
import torch


def sinkhorn_plan(
    scores: torch.Tensor, anchors: list[float], masses: list[float], epsilon: float, scale: str = "none"
) -> torch.Tensor:
    """n x m plan with rows that sum to 1 and columns that sum to ``masses``, from the paper's own cost."""
    x = scores.double().numpy()
    cost = (x[:, None] - np.asarray(anchors, dtype=float)[None, :]) ** 2
    if scale == "max":
        cost = cost / cost.max()
    n = len(x)
    plan = ot.bregman.sinkhorn(
        np.full(n, 1 / n),
        np.asarray(masses, dtype=float) / n,
        cost,
        epsilon,
        method="sinkhorn_log",
        numItermax=200_000,
        stopThr=1e-13,
    )
    return torch.from_numpy(plan * n)


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
