"""The warning of a solver that stopped before it had solved its problem."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

INTERNAL = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class _Text(str):
    """Equal to any other, so that Python, which shows a text once per place, takes all residuals for one."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Text)

    def __hash__(self) -> int:
        return hash(_Text)


def warn_residual(residual: float, steps: int) -> None:
    """Warns with the residual, once per place that called an operator of this package.

    Args:
        residual: the largest error of a marginal, relative to it.
        steps: the steps that were taken.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INTERNAL):
        level, frame = level + 1, frame.f_back
    text = f"the transport problem is not solved: after {steps} steps a marginal is off by {residual:.1e}"
    warnings.warn(_Text(text), RuntimeWarning, stacklevel=level)
