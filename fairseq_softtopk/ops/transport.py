"""Entropic optimal transport between many elements and few anchors, solved by Newton's method.

At the optimum every row of the plan is a softmax over the m anchors,

    P_ij = r_i softmax_j(L_ij + zeta_j),        L = -C / epsilon,

so that only m potentials zeta per problem remain.  They maximise the concave semi-dual

    D(zeta) = sum_j c_j zeta_j - sum_i r_i logsumexp_j(L_ij + zeta_j),

whose gradient is ``c - sum_i P_i`` (the column residual) and whose Hessian is minus
``H = diag(sum_i P_i) - sum_i P_i P_i^T / r_i``: the matrix K that the paper's Algorithm 4 inverts in
the backward pass, so one routine serves both passes.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-9
MAX_ITER = 100
MAX_HALVINGS = 30
MAX_STEP = 4.0
NEAR = 1e-6


class Potentials(NamedTuple):
    """A solution of the semi-dual.

    Attributes:
        zeta: (..., m) column potentials, in units of epsilon.
        residual: (...,) largest absolute difference between a column sum and its marginal.
        iterations: Newton steps taken.
    """

    zeta: Tensor
    residual: Tensor
    iterations: int


def transport_plan(logits: Tensor, row_mass: Tensor, zeta: Tensor) -> Tensor:
    """``P_ij = r_i softmax_j(L_ij + zeta_j)``.

    Args:
        logits: (..., n, m).
        row_mass: (..., n).
        zeta: (..., m).
    """
    return torch.softmax(logits + zeta.unsqueeze(-2), dim=-1) * row_mass.unsqueeze(-1)


def solve_potentials(logits: Tensor, row_mass: Tensor, col_mass: Tensor, start: Tensor) -> Potentials:
    """Maximises the semi-dual by Newton's method, with step halving.

    Args:
        logits: (..., n, m), finite, float64.
        row_mass: (..., n), non-negative; rows of mass 0 are left out.
        col_mass: (..., m), non-negative, with the same sum as ``row_mass``.
        start: (..., m); ``-inf`` closes a column, whose mass must be 0.
    """
    zeta = start
    value, plan = _semi_dual(logits, row_mass, col_mass, zeta)
    # The column sums are known up to rounding; a curvature below that must not magnify it.
    eye = torch.eye(logits.size(-1), dtype=logits.dtype, device=logits.device)
    floor = max(1e-12, 1e-15 * logits.size(-2)) * eye
    for iteration in range(MAX_ITER + 1):
        gradient = col_mass - plan.sum(-2)
        residual = gradient.abs().amax(-1)
        if iteration == MAX_ITER or bool((residual <= TOLERANCE).all()):
            break
        step = _solve_laplacian(_hessian(plan, row_mass) + floor, gradient)
        gain = (gradient * step).sum(-1, keepdim=True)
        # A potential is a logarithm: a longer step than this is leaving the region where it was computed.
        size = MAX_STEP / step.abs().amax(-1, keepdim=True).clamp(min=MAX_STEP)
        for _ in range(MAX_HALVINGS):
            trial_value, trial_plan = _semi_dual(logits, row_mass, col_mass, zeta + size * step)
            # D is only known up to rounding: close to the optimum the residual decides.
            trial_residual = (col_mass - trial_plan.sum(-2)).abs().amax(-1)
            closer = trial_residual <= residual.clamp(max=NEAR)
            enough = (trial_value >= value + 1e-4 * (size * gain).squeeze(-1)) | closer
            if bool(enough.all()):
                break
            size = torch.where(enough.unsqueeze(-1), size, size / 2)
        zeta = torch.where(enough.unsqueeze(-1), zeta + size * step, zeta)
        value = torch.where(enough, trial_value, value)
        plan = torch.where(enough[..., None, None], trial_plan, plan)
    return Potentials(zeta, residual, iteration)


def column_potentials(logits: Tensor, row_mass: Tensor, col_mass: Tensor, start: Tensor) -> Tensor:
    """The potentials of :func:`solve_potentials` as a differentiable function of ``logits``."""
    zeta: Tensor = _ColumnPotentials.apply(  # type: ignore[no-untyped-call]
        logits, row_mass, col_mass, start
    )
    return zeta


class _ColumnPotentials(torch.autograd.Function):
    """Implicit differentiation of ``sum_i P_ij = c_j`` (paper, Theorem 3).

    ``H dzeta = -sum_i (diag(P_i) - P_i P_i^T / r_i) dL_i``; the backward pass applies the transpose.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row_mass: Tensor, col_mass: Tensor, start: Tensor) -> Tensor:
        zeta, residual, iterations = solve_potentials(logits, row_mass, col_mass, start)
        # A NaN is left to the caller, who can say what is wrong with the scores.
        if bool((residual > TOLERANCE).any()):
            warnings.warn(
                f"the transport problem did not converge in {iterations} Newton steps: a column sum "
                f"is off by {residual.max().item():.1e}",
                RuntimeWarning,
                stacklevel=2,
            )
        ctx.save_for_backward(logits, row_mass, zeta)
        return zeta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, row_mass, zeta = ctx.saved_tensors
        plan = transport_plan(logits, row_mass, zeta)
        step = _solve_laplacian(_hessian(plan, row_mass), grads[0]).unsqueeze(-2)
        share = (plan * step).sum(-1, keepdim=True)
        share = share / row_mass.unsqueeze(-1).clamp(min=torch.finfo(plan.dtype).tiny)
        return plan * (share - step), None, None, None


def _semi_dual(logits: Tensor, row_mass: Tensor, col_mass: Tensor, zeta: Tensor) -> tuple[Tensor, Tensor]:
    """The value of D (...,) and the plan (..., n, m) at zeta."""
    shifted = logits + zeta.unsqueeze(-2)
    norm = shifted.logsumexp(-1, keepdim=True)
    gain = (col_mass * zeta.masked_fill(col_mass == 0, 0.0)).sum(-1)
    value = gain - (row_mass * norm.squeeze(-1)).sum(-1)
    return value, (shifted - norm).exp() * row_mass.unsqueeze(-1)


def _hessian(plan: Tensor, row_mass: Tensor) -> Tensor:
    """``diag(sum_i P_i) - sum_i P_i P_i^T / r_i``, (..., m, m)."""
    rows = plan / row_mass.unsqueeze(-1).clamp(min=torch.finfo(plan.dtype).tiny)
    coupling = rows.transpose(-1, -2) @ plan
    # Off the diagonal only, so that rows sum to zero to the last bit however small they are.
    coupling = coupling - torch.diag_embed(coupling.diagonal(dim1=-2, dim2=-1))
    return torch.diag_embed(coupling.sum(-1)) - coupling


def _solve_laplacian(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solves ``matrix @ u = rhs`` for a symmetric matrix with zero row sums and a ``rhs`` of sum zero.

    At small epsilon the entries span hundreds of orders of magnitude, down to 0 where a column
    is hard: the matrix is scaled to unit diagonal, its null vector is filled in, and what
    cannot move gets an exact zero.

    Args:
        matrix: (..., m, m).
        rhs: (..., m).
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    movable = diagonal > torch.finfo(matrix.dtype).tiny
    root = diagonal.where(movable, 1.0).sqrt()
    null = root * movable
    null = null / null.norm(dim=-1, keepdim=True).clamp(min=1.0e-150)
    scaled = matrix / (root.unsqueeze(-1) * root.unsqueeze(-2))
    scaled = scaled + null.unsqueeze(-1) * null.unsqueeze(-2)
    ridge = torch.where(movable, 1e-13, 1.0)
    solution: Tensor = torch.linalg.solve(scaled + torch.diag_embed(ridge), (rhs / root).unsqueeze(-1))
    return (solution.squeeze(-1) / root).where(movable, 0.0)
