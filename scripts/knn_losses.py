"""What ``knn.py`` trains features with: how near a template is, by each relaxation, and the losses of that."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

from torch import Tensor

from fairseq_softtopk.ops import neuralsort, relax_subset, sinkhorn_sort, soft_topk, softmax_k
from fairseq_softtopk.ops.problem import watched

# Temperatures, or entropic weights, that --tune tries; of distances whose mean is SCALE for a query.
GRIDS = {
    "softmax_k": (0.01, 0.03, 0.1, 0.3),
    "relax_subset": (0.3, 1.0, 3.0, 10.0),
    "neuralsort": (0.3, 1.0, 3.0, 10.0),
    "neuralsort_sampled": (0.3, 1.0, 3.0, 10.0),
    "sinkhorn_sort": (0.003, 0.01, 0.03, 0.1),
    "soft_topk": (0.03, 0.1, 0.3, 1.0),
    "soft_topk_200": (0.03, 0.1, 0.3, 1.0),
}
# What is taken without --tune.
DEFAULT = {
    "softmax_k": 0.1,
    "relax_subset": 0.3,
    "neuralsort": 1.0,
    "neuralsort_sampled": 3.0,
    "sinkhorn_sort": 0.01,
    "soft_topk": 0.03,
    "soft_topk_200": 0.03,
}
# Gumbel noise has a deviation of 1.3: distances must be large against it, or it alone chooses.
SCALE = {"relax_subset": 10.0, "neuralsort_sampled": 10.0}
LOSSES = ("share", "cross_entropy")
COST_SCALES = ("mean", "batch_max")


def nearness(distances: Tensor, method: str, k: int, temperature: float, cost_scale: str = "mean") -> Tensor:
    """How much each template is one of the k nearest, (q, t), rows summing to k.

    Args:
        distances: (q, t), squared distances.
        method: one of ``GRIDS``.
        k: how many neighbours.
        temperature: of the relaxation, or its entropic weight.
        cost_scale: ``"mean"``: distances are divided by the mean of a query, through which the gradient flows:
            without it every step would lengthen the features, on which nothing depends. ``"batch_max"``, of
            ``soft_topk`` and ``soft_topk_200`` only: as in the paper's code, the cost is divided by the largest
            of the batch, through which none flows.
    """
    if cost_scale == "batch_max":
        select = partial(soft_topk, k=k, epsilon=temperature, largest=False, cost_scale="batch_max")
        return select(distances) if method == "soft_topk" else _by_200_steps(select, distances)
    scaled = SCALE.get(method, 1.0) * distances / distances.mean(1, keepdim=True).clamp(min=1e-12)
    relax: Callable[[Tensor], Tensor] = {
        "softmax_k": lambda d: softmax_k(d, k, temperature=temperature, largest=False).sum(-1),
        "relax_subset": partial(relax_subset, k=k, temperature=temperature, largest=False, sample=True),
        "neuralsort": lambda d: neuralsort(d, k, temperature=temperature, largest=False).sum(-1),
        "neuralsort_sampled": lambda d: neuralsort(
            d, k, temperature=temperature, largest=False, sample=True
        ).sum(-1),
        "sinkhorn_sort": lambda d: _by_200_steps(
            partial(sinkhorn_sort, k=k, epsilon=temperature, largest=False), d
        ).sum(-1),
        "soft_topk": partial(soft_topk, k=k, epsilon=temperature, largest=False),
        "soft_topk_200": partial(_by_200_steps, partial(soft_topk, k=k, epsilon=temperature, largest=False)),
    }[method]
    return relax(scaled)


def _by_200_steps(operator: Callable[..., Tensor], distances: Tensor) -> Tensor:
    """What Sinkhorn's algorithm gives after 200 steps, which may be far from the solution: the point of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        if watched(distances):
            try:
                return operator(distances, solver="sinkhorn")
            except ValueError:  # it underflows, which an accelerator would only tell too late
                pass
        return operator(distances, solver="sinkhorn_log")  # ten times as slow


def knn_loss(nearness: Tensor, same_label: Tensor, k: int, loss: str) -> Tensor:
    """How wrong the labels of the k nearest templates are, mean over the queries.

    With the share ``p = (nearness * same_label).sum(1) / k`` of a query's neighbours that has its label,
    ``share`` is ``1 - p`` (Grover et al. 2019) and ``cross_entropy`` is ``-ln p``.

    Args:
        nearness: (q, t), rows summing to k.
        same_label: (q, t), 1 where query and template have the same label.
        k: how many neighbours.
        loss: one of ``LOSSES``.
    """
    share = (nearness * same_label).sum(1) / k
    if loss == "share":
        return 1 - share.mean()
    # A query without any neighbour of its own label has a loss of 7 nats, and no gradient.
    return -share.clamp(min=1e-3).log().mean()
