"""The warning of a solver that stopped before it had solved its problem."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

INTERNAL = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def warn_residual(residual: float, steps: int) -> None:
    """Warns with the residual, once per place that called an operator of this package.

    Args:
        residual: the largest error of a marginal, relative to it.
        steps: the steps that were taken.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INTERNAL):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"the transport problem is not solved: after {steps} steps a marginal is off by {residual:.1e}",
        RuntimeWarning,
        stacklevel=level - 1,
    )
