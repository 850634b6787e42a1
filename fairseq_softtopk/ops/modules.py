"""The operators as ``torch.nn`` modules, for models that are built from parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .sorted_topk import sorted_soft_topk
from .topk import soft_topk


class SoftTopK(nn.Module):
    """:func:`soft_topk` with its arguments fixed; ``forward`` takes scores and returns weights of their shape.

    Args:
        k: how many to select.
        **options: the keyword arguments of :func:`soft_topk`.
    """

    operator: ClassVar[Callable[..., Tensor]] = staticmethod(soft_topk)

    def __init__(self, k: int, **options: Any) -> None:
        super().__init__()
        self.k = k
        self.options = options

    def forward(self, scores: Tensor) -> Tensor:
        """The weights of scores (..., n)."""
        return self.operator(scores, self.k, **self.options)

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        return ", ".join([f"k={self.k}", *(f"{name}={value!r}" for name, value in self.options.items())])


class SortedSoftTopK(SoftTopK):
    """:func:`sorted_soft_topk` with its arguments fixed; ``forward`` returns weights (..., n, k).

    Args:
        k: how many ranks.
        **options: the keyword arguments of :func:`sorted_soft_topk`.
    """

    operator: ClassVar[Callable[..., Tensor]] = staticmethod(sorted_soft_topk)
