"""What the operators share: their arguments, the masks and the meaning of epsilon.

Scores ``x`` are moved onto anchors ``b_j`` at the cost ``C_ij = (x_i - b_j)^2`` (paper, section 2).
Only the part ``2 x_i b_j`` of that cost matters: ``x_i^2`` is constant along a row, ``b_j^2`` along
a column, and the marginals absorb both.  So the plan depends on ``2 x_i / epsilon`` alone, and
selecting the smallest scores is selecting the largest of ``-x``.

**Who reads the data.**  ``k``, ``epsilon`` and shapes that Python knows are checked at once.  What only a look
at the tensors can tell (NaN, a mask that leaves too little, a tensor of k) is checked by the solver with
numbers that it has anyway.  On the CPU that is a ``ValueError`` which names the value.  On an accelerator,
where reading a number would make the host wait for the device, it is an assertion on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsFloat

import torch
from torch import Tensor

COST_SCALES = ("none", "max", "batch_max")
SOLVERS = ("newton", "sinkhorn", "sinkhorn_log")


@dataclass(frozen=True)
class Problem:
    """Scores ready to be solved: the largest win, the last dimension is the one to select from.

    Attributes:
        scores: (..., n), in the precision of the solver and in units of ``unit``; ``-inf`` is masked.
        epsilon: (..., 1), the entropic weight of the un-scaled cost; the leading dimensions broadcast.
        unit: (..., 1), a power of 2 near the root of what the cost is divided by.
        k: how many to select; the largest where there is one per problem.
        counts: None, or (..., 1): how many to select from each problem.
        check: whether the solver has to look at epsilon, which Python could not.
    """

    scores: Tensor
    epsilon: Tensor
    unit: Tensor
    k: int
    counts: Tensor | None = None
    check: bool = False

    def slopes(self, origin: Tensor) -> Tensor:
        """``2 (x_i - origin) / epsilon``, (..., n), 0 at masked entries, where no gradient may pass.

        Subtracting before scaling keeps every digit near the origin, (..., 1), which carries no gradient.
        """
        largest = torch.finfo(self.scores.dtype).max / 4  # as good as infinite, but sums stay finite
        return (distances(self.scores, origin) * (2 / self.epsilon)).clamp(-largest, largest)


def prepare(
    scores: Tensor,
    k: int | Tensor,
    anchors: int,
    epsilon: float | Tensor,
    dim: int,
    largest: bool,
    cost_scale: str,
    solver: str,
    max_iter: int | None,
    tol: float | None,
    dtype: torch.dtype,
) -> Problem:
    """Checks what Python knows of an operator's arguments, and brings them into the form of :class:`Problem`.

    Args:
        scores: the user's scores.
        k: how many to select, one number or one per problem.
        anchors: the anchors are 0, 1, ..., anchors - 1.
        epsilon: entropic weight, one number or one per problem.
        dim: the dimension to select from.
        largest: whether the largest scores are to be selected.
        cost_scale: what the cost is divided by, see :func:`soft_topk`.
        solver: the name of a solver.
        max_iter: its steps.
        tol: its tolerance.
        dtype: the precision to solve in.

    Raises:
        ValueError: for arguments outside their range.
    """
    if scores.dim() == 0:
        raise ValueError("scores must have at least one dimension, got a scalar")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if cost_scale not in COST_SCALES:
        raise ValueError(f"cost_scale must be one of {', '.join(COST_SCALES)}, got {cost_scale!r}")
    check_solver(solver, max_iter, tol)
    scores = scores.movedim(dim, -1).to(dtype)
    weight = _as_epsilon(epsilon, scores)
    unit = torch.ones_like(weight)
    if cost_scale != "none":
        # 2 x / (epsilon u^2) without u^2, which overflows; dividing by a power of 2 rounds nothing.
        distance = _largest_distance(scores.detach(), anchors - 1, largest, cost_scale)
        unit = distance / (2 * torch.frexp(distance).mantissa)
        scores = scores / unit
        weight = _within(torch.finfo(dtype), weight, weight * (distance / unit) * distance)
    counts = _as_counts(k, scores) if isinstance(k, Tensor) else None
    number = -1 if counts is not None else check_k(k, scores.size(-1))
    if counts is not None and scores.size(-1) == 0 and bool((counts != 0).any()):
        refuse_k(int(counts[counts != 0][0]), 0)
    scores = scores if largest else -scores
    return Problem(scores, weight, unit, number, counts, isinstance(epsilon, Tensor))


def in_order(scores: Tensor, dim: int, largest: bool) -> Tensor:
    """The user's scores (..., n), without gradient, the largest to be selected: what ``hard`` selects from.

    Those of a :class:`Problem` may have lost an order to their unit, where that is huge.
    """
    scores = scores.detach().movedim(dim, -1)
    return scores if largest else -scores


def distances(scores: Tensor, origin: Tensor) -> Tensor:
    """``x_i - origin``, (..., n), finite, and 0 at masked entries."""
    largest = torch.finfo(scores.dtype).max
    return (scores - origin).masked_fill(scores == -math.inf, 0.0).clamp(-largest, largest)


def check_solver(solver: str, max_iter: int | None, tol: float | None) -> None:
    """Raises an error for settings that no solver can follow."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")


def whole(k: object) -> int:
    """The int that k is, also of NumPy or as a float.

    Raises:
        ValueError: if it is not one whole number.
    """
    if not (isinstance(k, int) or _is_whole(k)):
        raise ValueError(f"k must be an integer, got {k}")
    return int(k)  # type: ignore[call-overload, no-any-return]


def check_k(k: object, n: int) -> int:
    """The int that k is; an error unless it is a number of elements of n."""
    number = whole(k)
    if not 0 <= number <= n:
        refuse_k(number, n)
    return number


def refuse_k(k: int, n: int) -> NoReturn:
    """Raises the error of a k that is not a number of elements of n."""
    raise ValueError(f"k must lie in [0, {n}], the number of scores, got {k}")


def _is_whole(k: object) -> bool:
    """Whether this is one whole number, also of NumPy and as a float."""
    return isinstance(k, SupportsFloat) and float(k).is_integer()


def _as_counts(k: Tensor, scores: Tensor) -> Tensor:
    """A tensor of k as integers that broadcast against scores (..., n)."""
    if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
        raise ValueError(f"k must be an integer, got a tensor of {k.dtype}")
    return _per_problem("k", k.to(scores.device, torch.long), scores)


def _as_epsilon(epsilon: float | Tensor, scores: Tensor) -> Tensor:
    """Epsilon as a tensor that broadcasts against scores (..., n)."""
    if isinstance(epsilon, Tensor):
        if epsilon.is_complex():
            raise ValueError(f"epsilon must be real, got a tensor of {epsilon.dtype}")
        epsilon = epsilon.to(torch.promote_types(epsilon.dtype, scores.dtype))
        return _per_problem("epsilon", _within(torch.finfo(scores.dtype), epsilon, epsilon).to(scores), scores)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a positive finite number, got {epsilon}")
    limits = torch.finfo(scores.dtype)
    # Not torch.full, which would compile a graph of its own for every epsilon.
    return (scores.new_ones((1,) * scores.dim()) * epsilon).clamp(limits.tiny, limits.max)


def _within(limits: torch.finfo, epsilon: Tensor, scaled: Tensor) -> Tensor:
    """A multiple of epsilon within the range of a dtype; epsilon itself where it is not positive and finite."""
    fine = (epsilon > 0) & epsilon.isfinite()
    return torch.where(fine, scaled.clamp(limits.tiny, limits.max), epsilon)


def _per_problem(name: str, value: Tensor, scores: Tensor) -> Tensor:
    """One number, or one per problem, with as many dimensions as scores (..., n) and the last of size 1."""
    batch = scores.shape[:-1]
    if value.dim() > len(batch) or any(
        a not in (1, b) for a, b in zip(value.shape[::-1], batch[::-1], strict=False)
    ):
        raise ValueError(
            f"{name} must be one number or one per problem, {tuple(batch)}, got {tuple(value.shape)}"
        )
    return value.reshape(*(1,) * (len(batch) - value.dim()), *value.shape, 1)


def _largest_distance(scores: Tensor, last_anchor: int, largest: bool, cost_scale: str) -> Tensor:
    """The largest ``|x_i - b_j|``, over each problem or over the batch; a constant, no gradient."""
    alive = scores != (-math.inf if largest else math.inf)
    distance = torch.maximum(scores.abs(), (scores - last_anchor).abs()).masked_fill(~alive, 0.0)
    if distance.numel() == 0:
        return distance.new_ones((1,) * distance.dim())
    top = distance.amax() if cost_scale == "batch_max" else distance.amax(-1, keepdim=True)
    # An infinity that should not be there stays one.
    top = top.masked_fill(top == 0, 1.0).clamp(max=torch.finfo(top.dtype).max)
    return top.expand(*scores.shape[:-1], 1)


def watched(tensor: Tensor) -> bool:
    """Whether a number may be read from a tensor without making the host wait for a device."""
    return tensor.device.type == "cpu"


def apply(
    function: type[torch.autograd.Function], opaque: Callable[..., Any], *arguments: Any
) -> tuple[Tensor, ...]:
    """``function.apply``, or in a compiled graph without gradients its ``opaque`` forward pass.

    PyTorch 2.5 cannot compile a Function with a ``setup_context`` where nothing needs a gradient.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if torch.compiler.is_compiling() and not differentiable:
        outputs: tuple[Tensor, ...] = opaque(*arguments)
        return outputs
    return function.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]


def batch_first(info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments of a vmap rule with the mapped dimension first, of size 1 in tensors that have none.

    Tensors keep as many dimensions as each other, so that they broadcast as they did before, and the first of
    them gets the full size.
    """
    values = []
    for value, dim in zip(arguments, in_dims, strict=True):
        if isinstance(value, Tensor):
            value = value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
        values.append(value)
    return [values[0].expand(info.batch_size, *values[0].shape[1:]), *values[1:]]


def require(fine: Tensor, complain: Callable[[], NoReturn]) -> None:
    """Stops where a tensor says that something is not fine.

    Args:
        fine: a boolean tensor of any shape.
        complain: raises the error; called only when something is wrong, and only on the CPU.
    """
    if watched(fine):
        if not bool(fine.all()):
            complain()
    else:
        message = "fairseq_softtopk: wrong scores, k, epsilon or cost; the same call on the CPU says which"
        torch._assert_async(fine.all(), message)


def check_epsilon(epsilon: Tensor) -> None:
    """An error unless every epsilon is positive and finite."""
    if epsilon.numel() == 0:
        return
    smallest, largest = torch.aminmax(epsilon)

    def complain() -> NoReturn:
        wrong = ~((epsilon > 0) & epsilon.isfinite())
        raise ValueError(f"epsilon must be positive and finite, got {epsilon[wrong][0].item()}")

    require((smallest > 0) & (largest < math.inf), complain)


def check_contents(scores: Tensor, k: Tensor | int) -> NoReturn:
    """Says why a problem has no solution.

    Raises:
        ValueError: scores hold a NaN or the wrong infinity, or fewer than k entries are not masked.
    """
    if bool(scores.isnan().any()):
        raise ValueError("scores contain NaN")
    if bool((scores == math.inf).any()):
        raise ValueError(
            "scores contain the infinity that no selection can avoid: "
            "mask with -inf when largest=True, with +inf when largest=False"
        )
    left = (scores != -math.inf).sum(-1, keepdim=True)
    wanted = torch.as_tensor(k, device=left.device).expand_as(left)
    missing = left < wanted
    raise ValueError(
        f"k = {int(wanted[missing][0])} elements to select, but the mask leaves only {int(left[missing][0])}"
    )
