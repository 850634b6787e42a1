"""The warning of a solver that stopped before it had solved its problem."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import torch

INTERNAL = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class _Text(str):
    """Equal to that of any residual of the same order, as Python shows a text once per place."""

    order: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Text) and self.order == other.order

    def __hash__(self) -> int:
        return self.order


def warn_residual(residual: float, steps: int) -> None:
    """Warns with the residual, once per power of ten of it and per place that called an operator.

    Args:
        residual: the largest error of a marginal, relative to it.
        steps: the steps that were taken.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INTERNAL):
        level, frame = level + 1, frame.f_back
    text = _Text(
        f"the transport problem is not solved: after {steps} steps a marginal is off by {residual:.1e}"
    )
    text.order = math.floor(math.log10(residual)) if math.isfinite(residual) else 1000
    warnings.warn(text, RuntimeWarning, stacklevel=level)
