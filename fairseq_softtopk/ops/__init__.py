"""Differentiable top-k selection by entropic optimal transport, in pure PyTorch.

============================  ==========================================================
:func:`soft_topk`             relaxes the 0/1 indicator of the k largest scores
:func:`log_soft_topk`         its logarithm, accurate where the indicator underflows
:func:`sorted_soft_topk`      relaxes the n x k permutation matrix of ``torch.topk(..., sorted=True)``
============================  ==========================================================

Reference:
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020 (arXiv 2002.06504).
"""

from .modules import SoftTopK, SortedSoftTopK
from .relaxations import neuralsort, relax_subset, sinkhorn_sort, softmax_k
from .sorted_topk import sorted_soft_topk
from .topk import log_soft_topk, soft_topk
from .transport import Transport, solve_transport

__all__ = [
    "SoftTopK",
    "SortedSoftTopK",
    "Transport",
    "log_soft_topk",
    "neuralsort",
    "relax_subset",
    "sinkhorn_sort",
    "soft_topk",
    "softmax_k",
    "solve_transport",
    "sorted_soft_topk",
]
