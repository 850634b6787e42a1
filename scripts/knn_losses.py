"""What ``knn.py`` trains features with: how near a template is, by each relaxation, and the losses of that."""

from __future__ import annotations

import warnings
from functools import partial

from torch import Tensor

from fairseq_softtopk.ops import neuralsort, relax_subset, sinkhorn_sort, soft_topk, softmax_k

# Temperatures, or entropic weights, that --tune tries, of distances in units of the largest of a query.
GRIDS = {
    "softmax_k": (0.01, 0.03, 0.1, 0.3),
    "relax_subset": (0.01, 0.03, 0.1, 0.3),
    "neuralsort": (0.1, 0.3, 1.0, 3.0),
    "neuralsort_sampled": (0.1, 0.3, 1.0, 3.0),
    "sinkhorn_sort": (0.001, 0.003, 0.01, 0.03),
    "soft_topk": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    "soft_topk_200": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}
# What is taken without --tune: of soft_topk the best of 0.001, 0.01 and 0.1 on the digits' validation images;
# the others are not tuned.
DEFAULT = {
    "softmax_k": 0.03,
    "relax_subset": 0.03,
    "neuralsort": 1.0,
    "neuralsort_sampled": 1.0,
    "sinkhorn_sort": 0.01,
    "soft_topk": 0.01,
    "soft_topk_200": 0.01,
}
LOSSES = ("share", "cross_entropy")


def nearness(distances: Tensor, method: str, k: int, temperature: float) -> Tensor:
    """How much each template is one of the k nearest, (q, t), rows summing to k.

    Args:
        distances: (q, t), squared distances; they have no scale, so they are divided by a query's largest.
        method: one of ``GRIDS``.
        k: how many neighbours.
        temperature: of the relaxation, or its entropic weight.
    """
    if method == "soft_topk":
        return soft_topk(distances, k, epsilon=temperature, largest=False, cost_scale="max")
    if method == "soft_topk_200":
        with warnings.catch_warnings():  # that is the point
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            return soft_topk(
                distances, k, epsilon=temperature, largest=False, cost_scale="max", solver="sinkhorn_log"
            )
    scaled = distances / distances.detach().amax(1, keepdim=True).clamp(min=1e-12)
    if method == "sinkhorn_sort":
        with warnings.catch_warnings():  # 200 steps are what its users take
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            ranks = sinkhorn_sort(scaled, k, epsilon=temperature, largest=False, solver="sinkhorn_log")
        return ranks.sum(-1)
    relaxations = {
        "softmax_k": softmax_k,
        "relax_subset": partial(relax_subset, sample=True),
        "neuralsort": neuralsort,
        "neuralsort_sampled": partial(neuralsort, sample=True),
    }
    weights: Tensor = relaxations[method](scaled, k, temperature=temperature, largest=False)
    return weights if method == "relax_subset" else weights.sum(-1)


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
