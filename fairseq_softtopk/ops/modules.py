"""The operators as ``torch.nn`` modules, for models that are built from parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .sorted_topk import sorted_soft_topk
from .topk import soft_topk


class _Operator(nn.Module):
    """An operator with all its arguments but the scores fixed."""

    operator: ClassVar[Callable[..., Tensor]]

    def __init__(self, k: int | Tensor, *, epsilon: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__()
        inspect.signature(self.operator).bind(None, k, epsilon=epsilon, **options)  # no option is lost
        for name, value in (("k", k), ("epsilon", epsilon)):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.options = options

    def forward(self, scores: Tensor) -> Tensor:
        """The weights of scores of any shape."""
        return self.operator(scores, self.k, epsilon=self.epsilon, **self.options)

    def extra_repr(self) -> str:
        """What ``print`` shows between the parentheses."""
        arguments = {"k": self.k, "epsilon": self.epsilon, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


class SoftTopK(_Operator):
    """:func:`soft_topk` as a module.

    Args:
        k: how many to select; a tensor becomes a buffer.
        epsilon: entropic weight; a ``nn.Parameter`` is learned, another tensor becomes a buffer.
        **options: the other keyword arguments of :func:`soft_topk`.

    Raises:
        TypeError: if there is no such option.
    """

    operator = staticmethod(soft_topk)


class SortedSoftTopK(_Operator):
    """:func:`sorted_soft_topk` as a module.

    Args:
        k: how many ranks.
        epsilon: entropic weight; a ``nn.Parameter`` is learned, another tensor becomes a buffer.
        **options: the other keyword arguments of :func:`sorted_soft_topk`.

    Raises:
        TypeError: if there is no such option.
    """

    operator = staticmethod(sorted_soft_topk)
