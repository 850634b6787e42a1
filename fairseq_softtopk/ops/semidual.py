"""Newton's method on the semi-dual of an entropic transport problem.

With the rows of the plan eliminated (see :mod:`.transport`) the potentials zeta of the columns maximise

    D(zeta) = sum_j c_j zeta_j - sum_i r_i logsumexp_j(L_ij + zeta_j),

which is concave.  Its gradient is ``c - sum_i P_i``, the error of the columns, and its Hessian minus
``H = diag(sum_i P_i) - sum_i P_i P_i^T / r_i``: a graph Laplacian whose weights say how much two columns
share, and the matrix that the paper's Algorithm 4 inverts in the backward pass: one routine serves both passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import watched

# Where the host must not wait for the device, this many steps are taken and none is looked at.
BLIND_STEPS = 30
MAX_STEP = 4.0
NEAR = 1e-6


class Potentials(NamedTuple):
    """A solution of the semi-dual.

    Attributes:
        zeta: (..., m) column potentials, in units of epsilon.
        residual: (...,) the largest relative error of a column sum.
        iterations: Newton steps taken.
    """

    zeta: Tensor
    residual: Tensor
    iterations: int


Measure = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def solve_potentials(
    measure: Measure, col_mass: Tensor, start: Tensor, rows: int, steps: int, tol: float
) -> Potentials:
    """Maximises the semi-dual by Newton's method with back-tracking, every problem at its own pace.

    Args:
        measure: zeta (..., m) -> the value of D without its linear term (...,), the column sums (..., m), the
            coupling (..., m, m), see :func:`coupling`.
        col_mass: (..., m), 0 or at least 1, with the same sum as the rows.
        start: (..., m); ``-inf`` closes a column, whose mass must be 0.
        rows: how many rows were summed.
        steps: at most; on an accelerator ``BLIND_STEPS`` of them are taken and none is looked at.
        tol: the relative error of a column sum at which to stop.
    """
    # The column sums are known up to rounding; a curvature below that must not magnify it.
    floor = max(1e-12, 1e-15 * rows) * torch.eye(start.size(-1), dtype=start.dtype, device=start.device)
    scale = col_mass.masked_fill(col_mass == 0, 1.0)

    def look(zeta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The value, the residual, the gradient and the matrix of Newton's method."""
        value, sums, matrix = measure(zeta)
        gradient = col_mass - sums
        value = value + (col_mass * zeta.masked_fill(col_mass == 0, 0.0)).sum(-1)
        return value, (gradient / scale).abs().amax(-1), gradient, matrix

    zeta = start
    value, residual, gradient, matrix = look(zeta)
    better, size = torch.ones_like(value, dtype=torch.bool), torch.ones_like(value)
    steps = steps if watched(start) else min(steps, BLIND_STEPS)
    for taken in range(steps):
        if watched(start) and bool((residual <= tol).all()):
            return Potentials(zeta, residual, taken)
        step = solve_laplacian(matrix + floor, gradient)
        size = torch.where(better, _first_size(step), size / 2)
        gain = (gradient * step).sum(-1)
        trial = zeta + size.unsqueeze(-1) * step
        trial_value, trial_residual, trial_gradient, trial_matrix = look(trial)
        # D is only known up to rounding: close to the optimum the residual decides.
        closer = trial_residual <= residual.clamp(max=NEAR)
        better = (trial_value >= value + 1e-4 * size * gain) | closer
        value, residual = torch.where(better, trial_value, value), torch.where(better, trial_residual, residual)
        row = better.unsqueeze(-1)
        zeta, gradient = torch.where(row, trial, zeta), torch.where(row, trial_gradient, gradient)
        matrix = torch.where(row.unsqueeze(-1), trial_matrix, matrix)
    return Potentials(zeta, residual, steps)


def _first_size(step: Tensor) -> Tensor:
    """1, or less: a potential is a logarithm, and a longer step leaves the region where it was computed."""
    return MAX_STEP / step.abs().amax(-1).clamp(min=MAX_STEP)


def coupling(plan: Tensor, share: Tensor) -> Tensor:
    """H = ``diag(sum_i P_i) - sum_i P_i P_i^T / r_i``, (..., m, m).

    Args:
        plan: P, (..., n, m).
        share: P / r, (..., n, m).
    """
    return as_laplacian(share.transpose(-1, -2) @ plan)


def as_laplacian(products: Tensor) -> Tensor:
    """The matrix with these off-diagonal entries, negated, and rows that sum to zero.

    The diagonal of ``products`` is not looked at: the sum is right to the last bit however small it is.
    """
    apart = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
    return torch.diag_embed(apart.sum(-1)) - apart


def solve_laplacian(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solves ``matrix @ u = rhs`` for a symmetric matrix with zero row sums and a ``rhs`` of sum zero.

    At small epsilon the entries span hundreds of orders of magnitude, down to 0 where a column
    is hard: the matrix is scaled to unit diagonal, its null vector is filled in, and what
    cannot move gets an exact zero.

    Args:
        matrix: (..., m, m).
        rhs: (..., m); the solution has its dtype, and is computed in float64.
    """
    dtype, matrix, rhs = rhs.dtype, matrix.double(), rhs.double()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    movable = diagonal > torch.finfo(matrix.dtype).tiny
    root = diagonal.where(movable, 1.0).sqrt()
    null = root * movable
    null = null / null.norm(dim=-1, keepdim=True).clamp(min=1.0e-150)
    scaled = matrix / (root.unsqueeze(-1) * root.unsqueeze(-2))
    scaled = scaled + null.unsqueeze(-1) * null.unsqueeze(-2)
    ridge = torch.where(movable, 1e-13, 1.0)
    # solve() would wait for the device, to learn whether the matrix is singular: with the ridge it is not.
    solution: Tensor = torch.linalg.solve_ex(scaled + torch.diag_embed(ridge), (rhs / root).unsqueeze(-1))[0]
    return (solution.squeeze(-1) / root).where(movable, 0.0).to(dtype)
