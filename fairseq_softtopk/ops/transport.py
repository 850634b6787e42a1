"""Entropic optimal transport between many elements and few anchors.

A plan with the row marginals r and the column marginals c that minimises
``sum_ij C_ij P_ij + epsilon sum_ij P_ij ln P_ij`` (paper, eq. 2) has rows that are a softmax over m anchors,

    P_ij = r_i softmax_j(L_ij + zeta_j),        L = -C / epsilon,

so that only m potentials zeta per problem remain: Newton's method finds them (:mod:`.semidual`).  Sinkhorn's
algorithm, which the paper uses, scales rows and columns in turn.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .problem import (
    Problem,
    apply,
    batch_first,
    check_contents,
    check_epsilon,
    check_solver,
    refuse_k,
    require,
    watched,
)
from .residual import warn_residual
from .semidual import coupling, solve_laplacian, solve_potentials

NEWTON_STEPS, NEWTON_TOLERANCE = 100, 1e-9
SINKHORN_STEPS, SINKHORN_TOLERANCE = 200, 1e-3
# From one weight of the entropy to the next, on the way from a flat plan to the one that is wanted.
ANNEALING = 4.0
# What the sums of row and column marginals may differ by, relative to them.
SAME_SUM = 1e-5


class Transport(NamedTuple):
    """A transport plan and how good it is.

    Attributes:
        plan: P, (..., n, m).
        row_potentials: alpha, (..., n), in units of the cost.
        col_potentials: beta, (..., m): ``P_ij = r_i exp((alpha_i + beta_j - C_ij) / epsilon)``, up to the
            rounding of the dtype of the cost, over epsilon.
        residual: (...,) largest error of a row or column sum, relative to its marginal.
        iterations: (), steps taken.
        converged: (...,) whether the residual is within the tolerance.
    """

    plan: Tensor
    row_potentials: Tensor
    col_potentials: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor


def solve_transport(
    cost: Tensor,
    row_marginals: Tensor,
    col_marginals: Tensor,
    epsilon: float | Tensor,
    *,
    solver: str = "newton",
    max_iter: int | None = None,
    tol: float | None = None,
) -> Transport:
    r"""Solves entropic optimal transport problems (paper, eq. 2) and says how well.

    .. math::
        \min_{P \ge 0} \sum_{ij} C_{ij} P_{ij} + \epsilon \sum_{ij} P_{ij} \ln P_{ij}, \quad
        P \mathbf 1 = r, \; P^\top \mathbf 1 = c.

    The plan is differentiable in the cost, the marginals and epsilon, by implicit differentiation (paper,
    Theorem 3), to any order; a marginal of 0 has the gradient 0, not that of its one side.  The potentials and
    what follows them are not differentiable.

    Args:
        cost: C, (..., n, m), finite; meant for few columns, as Newton's method inverts m x m matrices.
        row_marginals: r, (..., n), not negative; rows of mass 0 stay empty.
        col_marginals: c, (..., m), not negative, of the same sum as r.  What its sum is off by in rounding,
            1e-5 of it at most, is taken from or given to all columns in proportion.
        epsilon: entropic weight in units of the cost; a number or a tensor that broadcasts to (...,).
        solver: ``"newton"`` (exact, in float64), ``"sinkhorn"`` or ``"sinkhorn_log"`` (paper, Algorithm 1, in
            the precision of the cost), which ends with right columns and leaves the error in the rows; its
            gradient (Algorithm 4) takes the marginals for those of the plan.
        max_iter: steps at most; by default 100 for Newton's method at each level of its annealing, 200 for
            Sinkhorn's.
        tol: the relative error of a marginal that counts as converged; by default 1e-9 for Newton's method,
            1e-3 for Sinkhorn's, which stops early only at a tolerance that is given.

    Returns:
        The plan in the dtype of the cost, and its :class:`Transport`.

    Raises:
        ValueError: if an argument is out of range or the marginals do not have the same sum; if ``"sinkhorn"``
            underflows (use ``"sinkhorn_log"``).

    Warns:
        RuntimeWarning: if a problem has not converged.

    Note:
        Unlike the operators, it reads numbers from an accelerator while it solves.
    """
    check_solver(solver, max_iter, tol)
    if not cost.is_floating_point():
        raise ValueError(f"cost must be floating point, got {cost.dtype}")
    matching = cost.dim() >= 2 and cost.shape[-2:] == (row_marginals.size(-1), col_marginals.size(-1))
    batches = cost.shape[:-2], row_marginals.shape[:-1], col_marginals.shape[:-1]
    shape = _common(*batches) if matching and 0 not in cost.shape[-2:] else None
    if shape is None:
        raise ValueError(
            f"cost must be (..., n, m), not empty, for marginals (..., n) of rows and (..., m) of columns, got "
            f"{tuple(cost.shape)}, {tuple(row_marginals.shape)}, {tuple(col_marginals.shape)}"
        )
    dtype = torch.float64 if solver == "newton" else cost.dtype
    weight = torch.as_tensor(epsilon, dtype=dtype, device=cost.device)
    if _common(weight.shape, shape) != shape:
        raise ValueError(
            f"epsilon must be one number or one per problem, {tuple(shape)}, got {tuple(weight.shape)}"
        )
    weight = weight[..., None, None]
    rows, cols = row_marginals.to(dtype).expand(*shape, -1), col_marginals.to(dtype).expand(*shape, -1)
    excess = rows.detach().sum(-1, keepdim=True) / cols.detach().sum(-1, keepdim=True)
    cols = cols * excess.where((excess - 1).abs() <= SAME_SUM, 1.0)
    smallest = torch.finfo(dtype).tiny
    logits = -cost.to(dtype).expand(*shape, -1, -1) / weight.clamp(min=smallest)
    plan, zeta, residual, iterations = _plan(logits, rows, cols, weight, solver, max_iter, tol, selecting=False)
    weight = weight.detach()[..., 0]
    log_norm = (logits.detach() + zeta.unsqueeze(-2)).logsumexp(-1)
    surplus = (plan.detach().sum(-1) / rows.detach()).masked_fill(rows == 0, 1.0).log()
    return Transport(
        plan.to(cost.dtype),
        ((surplus - log_norm) * weight).to(cost.dtype),
        (zeta * weight).to(cost.dtype),
        residual,
        iterations,
        residual <= _tolerance(solver, tol),
    )


def _common(*shapes: torch.Size) -> torch.Size | None:
    """The shape that these broadcast to, or None."""
    try:
        return torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call, no-any-return]
    except RuntimeError:
        return None


def plan_by_sinkhorn(
    problem: Problem, anchors: int, largest: bool, solver: str, max_iter: int | None, tol: float | None
) -> Tensor:
    """The plan (..., n, anchors) of a top-k problem as the paper solves it; its last column is the rest."""
    scores = problem.scores
    alive = scores != -math.inf
    counts = torch.full_like(scores[..., :1], problem.k) if problem.counts is None else problem.counts
    counts = counts.to(scores.dtype).expand(*scores.shape[:-1], 1)
    # The paper's anchors: the smallest scores go to 0, the largest to the last anchor.
    places = torch.arange(anchors, dtype=scores.dtype, device=scores.device)
    places = places.flip(0) if largest else places
    original = (scores if largest else -scores).masked_fill(~alive, 0.0)
    cost = (original.unsqueeze(-1) - places / problem.unit.unsqueeze(-1)).square()
    row_mass = alive.to(scores.dtype)
    ranks = counts if anchors == 2 else torch.ones_like(counts).expand(*scores.shape[:-1], anchors - 1)
    col_mass = torch.cat([ranks, row_mass.sum(-1, keepdim=True) - counts], dim=-1)
    weight = (problem.epsilon / problem.unit).unsqueeze(-1)
    return _plan(-cost / weight, row_mass, col_mass, weight, solver, max_iter, tol, selecting=True)[0]


def _tolerance(solver: str, tol: float | None) -> float:
    return tol if tol is not None else NEWTON_TOLERANCE if solver == "newton" else SINKHORN_TOLERANCE


def _plan(
    logits: Tensor,
    row_mass: Tensor,
    col_mass: Tensor,
    epsilon: Tensor,
    solver: str,
    max_iter: int | None,
    tol: float | None,
    selecting: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plan (..., n, m), zeta (..., m), residual (...,), iterations (); warns if the plan is not good enough.

    With ``selecting`` the problem is that of a top-k operator, and its errors speak of scores and k.
    """
    steps = max_iter or (NEWTON_STEPS if solver == "newton" else SINKHORN_STEPS)
    accepted = _tolerance(solver, tol)
    early = accepted if solver == "newton" or tol is not None else 0.0
    plan, zeta, residual, iterations = apply(
        _Plan,
        _solve_opaque,
        logits,
        row_mass,
        col_mass,
        epsilon.detach(),
        solver,
        steps,
        early,
        accepted,
        selecting,
    )
    return plan, zeta, residual, iterations


class _Plan(torch.autograd.Function):
    """Implicit differentiation of the marginals of a plan (paper, Theorem 3 and Algorithm 4).

    With ``T(G) = P * (G - sum_j P_ij G_ij / r_i)``, the derivative of a softmax, a gradient G of the plan
    becomes ``T(G - u)`` for the logits, where ``H u = sum_i T(G)_i``; u for c; and
    ``sum_j P_ij (G_ij - u_j) / r_i`` for r.  After Sinkhorn's algorithm H is that of Algorithm 4, which is the
    same if it has converged.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        row_mass: Tensor,
        col_mass: Tensor,
        epsilon: Tensor,
        solver: str,
        steps: int,
        early: float,
        accepted: float,
        selecting: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        solve = _solve_opaque if torch.compiler.is_compiling() else _solve
        return solve(logits, row_mass, col_mass, epsilon, solver, steps, early, accepted, selecting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        plan, zeta, residual, iterations = output
        ctx.mark_non_differentiable(zeta, residual, iterations)
        row_mass, col_mass, solver = inputs[1], inputs[2], inputs[4]
        ctx.save_for_backward(plan, row_mass, None if solver == "newton" else col_mass)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, row_mass, col_mass = ctx.saved_tensors
        with torch.autocast(plan.device.type, enabled=False):
            for_logits, for_rows, for_cols = plan_vjp(plan, row_mass, grads[0], col_mass)
        return for_logits, for_rows, for_cols, None, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        tensors = len(arguments) - 5  # before the settings of the solver
        batched = batch_first(info, in_dims, arguments)
        full = [value.expand(info.batch_size, *value.shape[1:]) for value in batched[:tensors]]
        return _Plan.apply(*full, *batched[tensors:]), (0, 0, 0, None)  # type: ignore[no-untyped-call]


def plan_vjp(
    plan: Tensor, row_mass: Tensor, grad: Tensor, col_mass: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to logits (..., n, m), row mass (..., n) and column mass (..., m).

    Args:
        plan: P, (..., n, m).
        row_mass: r, (..., n).
        grad: G, (..., n, m).
        col_mass: None, or c, (..., m), for the paper's Algorithm 4 to the letter: with c on the diagonal of H,
            and a multiplier of 0 for the last column, whatever the sums of the plan are.
    """
    share = plan / row_mass.unsqueeze(-1).clamp(min=torch.finfo(plan.dtype).tiny)
    pulled = (plan * (grad - (share * grad).sum(-1, keepdim=True))).sum(-2)
    if col_mass is None:
        multiplier = solve_laplacian(coupling(plan, share), pulled)
        # Across every cut of the columns H u = pulled keeps the step of u below the range of G.  The bound
        # says nothing of a plan that is solved; of another, it removes a division of errors by almost nothing.
        spread = (grad.amax((-1, -2)) - grad.amin((-1, -2))).detach().unsqueeze(-1) * (plan.size(-1) - 1)
        multiplier = torch.maximum(torch.minimum(multiplier.nan_to_num(), spread), -spread)
    else:
        matrix = torch.diag_embed(col_mass) - share.transpose(-1, -2) @ plan
        solution, _ = torch.linalg.solve_ex(matrix[..., :-1, :-1], pulled[..., :-1, None])
        # What is hard to the last bit is singular, and has no gradient.
        solution = solution.squeeze(-1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        multiplier = torch.nn.functional.pad(solution, (0, 1))
    rest = grad - multiplier.unsqueeze(-2)
    for_rows = (share * rest).sum(-1)
    return plan * (rest - for_rows.unsqueeze(-1)), for_rows, multiplier


@torch.library.custom_op("fairseq_softtopk::plan", mutates_args=())
def _solve_opaque(
    logits: Tensor,
    row_mass: Tensor,
    col_mass: Tensor,
    epsilon: Tensor,
    solver: str,
    steps: int,
    early: float,
    accepted: float,
    selecting: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_solve` as one node of a compiled graph."""
    logits, row_mass, col_mass = logits.contiguous(), row_mass.contiguous(), col_mass.contiguous()
    return _solve(logits, row_mass, col_mass, epsilon, solver, steps, early, accepted, selecting)


@_solve_opaque.register_fake
def _(
    logits: Tensor,
    row_mass: Tensor,
    col_mass: Tensor,
    epsilon: Tensor,
    solver: str,
    steps: int,
    early: float,
    accepted: float,
    selecting: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    iterations = torch.empty((), dtype=torch.long, device="cpu")
    plan, zeta = logits.new_empty(logits.shape), col_mass.new_empty(col_mass.shape)
    return plan, zeta, logits.new_empty(logits.shape[:-2]), iterations


# For exported programs, in which only the operator is left.
_solve_opaque.register_autograd(_Plan.backward, setup_context=_Plan.setup_context)


def _solve(
    logits: Tensor,
    row_mass: Tensor,
    col_mass: Tensor,
    epsilon: Tensor,
    solver: str,
    steps: int,
    early: float,
    accepted: float,
    selecting: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plan, zeta, residual and number of iterations of a batch of problems."""
    _check(logits, row_mass, col_mass, epsilon, selecting)
    with torch.autocast(logits.device.type, enabled=False):  # it would multiply matrices in half precision
        if solver == "newton":
            plan, zeta, iterations = _newton(logits, row_mass, col_mass, steps, early)
        else:
            log_domain = solver == "sinkhorn_log"
            plan, zeta, iterations = _sinkhorn(logits, row_mass, col_mass, log_domain, steps, early)
    empty = row_mass.sum(-1, keepdim=True) == 0
    plan, zeta = plan.masked_fill(empty.unsqueeze(-1), 0.0), zeta.masked_fill(empty, 0.0)
    require(plan.isfinite(), _complain_of_underflow)
    residual = torch.maximum(_residual(plan.sum(-1), row_mass), _residual(plan.sum(-2), col_mass))
    if residual.numel() and watched(residual) and not float(residual.max()) <= accepted:
        warn_residual(float(residual.max()), iterations)
    return plan, zeta, residual, torch.tensor(iterations, device="cpu")


def _check(logits: Tensor, row_mass: Tensor, col_mass: Tensor, epsilon: Tensor, selecting: bool) -> None:
    """An error for a problem that has no solution."""
    check_epsilon(epsilon)
    total, other = row_mass.sum(-1), col_mass.sum(-1)
    same = (total - other).abs() <= SAME_SUM * total
    # A comparison with NaN is false.
    bounded = logits.amax((-1, -2)) - logits.amin((-1, -2)) < math.inf
    fine = same & (row_mass >= 0).all(-1) & (col_mass >= 0).all(-1) & bounded

    def complain() -> NoReturn:
        if selecting:
            # The smallest logit of an element is as good as its score here: a mask is a row without mass.
            masked = row_mass == 0
            scores = logits.amin(-1).nan_to_num(nan=math.nan, neginf=math.inf).masked_fill(masked, -math.inf)
            wanted = col_mass[..., :-1].sum(-1, keepdim=True)
            wrong = wanted[(wanted < 0) | (wanted > logits.size(-2))]
            if wrong.numel():
                refuse_k(int(wrong[0]), logits.size(-2))
            if bool((scores == math.inf).any()):
                raise ValueError(
                    "scores contain the infinity that no selection can avoid (mask with -inf if largest=True, "
                    f"+inf if largest=False), or their cost overflows {logits.dtype}"
                )
            check_contents(scores, wanted.long())
        if not bool(bounded.all()):
            raise ValueError("the cost must be finite, and so must the differences of cost / epsilon")
        for name, mass in (("row", row_mass), ("column", col_mass)):
            if not bool((mass >= 0).all()):
                raise ValueError(
                    f"the {name} marginals must not be negative, got {mass[~(mass >= 0)][0].item()}"
                )
        raise ValueError(
            f"the marginals must have the same sum, got {total[~same][0].item()} for the rows "
            f"and {other[~same][0].item()} for the columns"
        )

    require(fine, complain)


def _complain_of_underflow() -> NoReturn:
    raise ValueError('exp(-cost / epsilon) underflows: use solver="sinkhorn_log", or "newton"')


def _residual(sums: Tensor, marginals: Tensor) -> Tensor:
    """The largest error relative to a marginal, (...,); where a marginal is 0 the plan is exact."""
    error = (sums - marginals).abs() / marginals.clamp(min=torch.finfo(sums.dtype).tiny)
    return error.masked_fill(marginals == 0, 0.0).amax(-1)


def _newton(
    logits: Tensor, row_mass: Tensor, col_mass: Tensor, steps: int, tol: float
) -> tuple[Tensor, Tensor, int]:
    """Newton's method along a path from the flat plan of a large epsilon to the plan that is wanted."""
    spread = logits.amax((-1, -2)) - logits.amin((-1, -2))
    flatness = (spread / ANNEALING).clamp(min=1.0)[..., None]
    zeta = torch.zeros_like(col_mass).masked_fill(col_mass == 0, -math.inf)
    unit = col_mass.masked_fill(col_mass == 0, math.inf).amin(-1, keepdim=True)
    rows, cols = row_mass / unit, col_mass / unit
    total = 0
    while True:
        last = bool((flatness == 1).all())
        measure = partial(_measure, logits / flatness.unsqueeze(-1), rows)
        level = solve_potentials(measure, cols, zeta, logits.size(-2), steps, tol if last else 1e-2)
        total += level.iterations
        if last:
            return transport_plan(logits, row_mass, level.zeta), level.zeta, total
        flatter = (flatness / ANNEALING).clamp(min=1.0)
        zeta = level.zeta * (flatness / flatter)
        flatness = flatter


def _measure(logits: Tensor, row_mass: Tensor, zeta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`solve_potentials` wants to know of the plan at zeta."""
    shifted = logits + zeta.unsqueeze(-2)
    norm = shifted.logsumexp(-1, keepdim=True)
    share = (shifted - norm).exp()
    plan = share * row_mass.unsqueeze(-1)
    return -(row_mass * norm.squeeze(-1)).sum(-1), plan.sum(-2), coupling(plan, share)


def _sinkhorn(
    logits: Tensor, row_mass: Tensor, col_mass: Tensor, log_domain: bool, steps: int, tol: float
) -> tuple[Tensor, Tensor, int]:
    """The paper's Algorithm 1: rows and columns are scaled in turn, columns last."""
    if log_domain:
        log_rows, log_cols = row_mass.log(), col_mass.log()
        zeta = torch.zeros_like(col_mass)
        for step in range(1, steps + 1):
            row = log_rows - (logits + zeta.unsqueeze(-2)).logsumexp(-1)
            zeta = log_cols - (logits + row.unsqueeze(-1)).logsumexp(-2)
            if tol and step < steps and _row_error(logits, row, zeta, row_mass) <= tol:
                break
        return (logits + row.unsqueeze(-1) + zeta.unsqueeze(-2)).exp(), zeta, step
    kernel = logits.exp()
    col = torch.full_like(col_mass, 1 / col_mass.size(-1))
    for step in range(1, steps + 1):
        row = row_mass / (kernel @ col.unsqueeze(-1)).squeeze(-1)
        col = col_mass / (row.unsqueeze(-2) @ kernel).squeeze(-2)
        if tol and step < steps and _row_error(logits, row.log(), col.log(), row_mass) <= tol:
            break
    plan = kernel * row.unsqueeze(-1) * col.unsqueeze(-2)
    return plan, col.log(), step


def _row_error(logits: Tensor, row: Tensor, zeta: Tensor, row_mass: Tensor) -> float:
    plan = (logits + row.unsqueeze(-1) + zeta.unsqueeze(-2)).exp()
    return float(_residual(plan.sum(-1), row_mass).max())


def transport_plan(logits: Tensor, row_mass: Tensor, zeta: Tensor) -> Tensor:
    """``P_ij = r_i softmax_j(L_ij + zeta_j)``.

    Args:
        logits: (..., n, m).
        row_mass: (..., n).
        zeta: (..., m).
    """
    return torch.softmax(logits + zeta.unsqueeze(-2), dim=-1) * row_mass.unsqueeze(-1)
