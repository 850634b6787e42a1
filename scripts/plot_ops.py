"""Draws what the operators compute: ``python scripts/plot_ops.py [FIGURE...] --out FOLDER``.

=============  =============================================================================
``plans``      transport plans of seven scores, hard and soft (after the paper's Figure 2)
``epsilon``    plan and weights of 50 scores, from hard to soft (after Figure 3)
``gradients``  which way a loss on the weights pushes the scores (after Figure 7)
``error``      error and time of the solvers against epsilon
=============  =============================================================================

Without names it draws all of them, ``FOLDER/plans.png`` and so on; ``error`` takes a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq_softtopk.ops import soft_topk, sorted_soft_topk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#808080"  # fit for the colour-blind

PLAN_SCORES = [0.4, 0.7, 2.3, 1.9, -0.2, 1.4, 0.1]
PLANS = {"top-5": (soft_topk, 5), "sorted top-3": (sorted_soft_topk, 3)}
PLAN_EPSILONS = {"$10^{-6}$": 1e-6, "0.5": 0.5}
WEIGHT_EPSILONS = 1e-3, 5e-3, 1e-2, 5e-2  # in units of the largest cost
PUSH_EPSILONS = 0.3, 1.0, 4.0
PUSHED = [6], [4, 5, 6]  # of the scores 0, 1, ..., 9; the top 3 are 7, 8 and 9
ARROW = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.007, "zorder": 3}

SOLVERS = {
    "newton": ("Newton (default)", BLUE, "o"),
    "sinkhorn_log": ("Sinkhorn in the log domain, 200 steps", GREEN, "^"),
    "sinkhorn": ("Sinkhorn, 200 steps, until it underflows", ORANGE, "s"),
}
ERROR_EPSILONS = [10 ** (-i / 2) for i in range(11)]  # in units of the largest cost
BATCH, N, K = 16, 1000, 5
ROUNDS = 5
SMALLEST_ERROR = -9  # drawn, as a power of ten


def plan(operator: Callable[..., Tensor], scores: Tensor, k: int, **options: float | str) -> Tensor:
    """The transport plan of scores (n,): the weights, one column or k, and what is left of each element."""
    weights = operator(scores, k, **options).view(len(scores), -1)
    return torch.cat([weights, 1 - weights.sum(1, keepdim=True)], dim=1)


def push(scores: Tensor, k: int, elements: list[int], epsilon: float) -> tuple[Tensor, Tensor]:
    """The weights (n,) of a top-k, and the gradient (n,) of the sum of some of them."""
    scores = scores.clone().requires_grad_()
    weights = soft_topk(scores, k, epsilon=epsilon)
    (gradient,) = torch.autograd.grad(weights[elements].sum(), scores)
    return weights.detach(), gradient


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Wall time of one call, the mean over ``repeats``."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(
    operator: Callable[..., Tensor], scores: Tensor, k: int, epsilon: float, rounds: int
) -> dict[str, tuple[float, float]]:
    """For each solver that does not underflow, its largest error and its time in units of ``torch.softmax``.

    Args:
        operator: :func:`soft_topk` or :func:`sorted_soft_topk`.
        scores: (batch, n), float32; what is right is decided in float64.
        k: how many to select.
        epsilon: entropic weight, in units of the largest cost of each problem.
        rounds: how often every solver is timed, each time next to a softmax of the scores; medians count.
    """
    solve = partial(operator, k=k, epsilon=epsilon, cost_scale="max")
    errors, softmax = {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that Sinkhorn has not converged is what is measured
        exact = solve(scores.double(), tol=1e-12)
        for solver in SOLVERS:
            try:
                errors[solver] = float((solve(scores, solver=solver) - exact).abs().max())
            except ValueError as error:
                if "underflows" not in str(error):
                    raise
        times: dict[str, list[float]] = {solver: [] for solver in errors}
        for _ in range(rounds):
            for solver in errors:
                softmax.append(seconds(partial(torch.softmax, scores, -1), 100))
                times[solver].append(seconds(partial(solve, scores, solver=solver)))
    return {solver: (error, median(times[solver]) / median(softmax)) for solver, error in errors.items()}


def draw_plans(figure: Figure) -> None:
    """Heat maps of elements (down) against anchors (across), with their values."""
    figure.set_size_inches(10, 4.8)
    scores = torch.tensor(PLAN_SCORES, dtype=torch.float64)
    widths = [plan(operator, scores, k).size(1) for operator, k in PLANS.values() for _ in PLAN_EPSILONS]
    panels = iter(figure.subplots(1, len(widths), sharey=True, width_ratios=widths))
    for name, (operator, k) in PLANS.items():
        for label, epsilon in PLAN_EPSILONS.items():
            axis, shares = next(panels), plan(operator, scores, k, epsilon=epsilon)
            image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for row, column in torch.cartesian_prod(*map(torch.arange, shares.shape)).tolist():
                share = float(shares[row, column])
                color = "white" if share > 0.6 else "black"
                axis.text(column, row, f"{share:.2f}", color=color, ha="center", va="center")
            last = shares.size(1) - 1
            anchors = [f"rank {rank}" for rank in range(1, k + 1)] if last > 1 else ["selected"]
            anchors = [f"{anchor}\n$b$ = {last - j}" for j, anchor in enumerate([*anchors, "rest"])]
            axis.set_xticks(range(last + 1), anchors)
            axis.set_yticks(range(len(scores)), [f"{score:.1f}" for score in PLAN_SCORES])
            axis.set_title(f"{name}, $\\epsilon$ = {label}", fontsize="medium")
            axis.tick_params(length=0)
    figure.axes[0].set_ylabel("score")
    figure.colorbar(image, ax=figure.axes, label="share of the element", pad=0.01)
    figure.suptitle("Transport plans: how much of each element goes to each anchor $b$")


def draw_epsilon(figure: Figure) -> None:
    """Above, the plan as a colour map; below, the weights against the scores."""
    figure.set_size_inches(12, 4.8)
    scores = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).sort().values
    maps, clouds = figure.subplots(2, len(WEIGHT_EPSILONS), sharey="row", height_ratios=[1, 3])
    for epsilon, above, below in zip(WEIGHT_EPSILONS, maps, clouds, strict=True):
        values = plan(soft_topk, scores, K, epsilon=epsilon, cost_scale="max")
        image = above.imshow(
            values.T.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        above.set(title=f"$\\epsilon$ = {epsilon:g}", xlabel="element, in order of score")
        above.set_yticks([0, 1], ["selected", "rest"])
        below.scatter(scores[-K:], values[-K:, 0], s=18, color=ORANGE, label=f"the {K} largest", zorder=3)
        below.scatter(scores[:-K], values[:-K, 0], s=18, color=BLUE, label="the others")
        below.set(xlabel="score", ylim=(-0.05, 1.05))
        below.grid(alpha=0.3)
    clouds[0].set_ylabel("weight")
    clouds[0].legend(loc="center left")
    figure.colorbar(image, ax=maps, label="share", ticks=[0, 1], pad=0.01)
    problem = f"Top-{K} of {len(scores)} Gaussian scores, $\\epsilon$ in units of the largest cost"
    figure.suptitle(f"{problem}: the plan above, the weights below")


def draw_gradients(figure: Figure) -> None:
    """At each score its weight, and an arrow along the gradient of one weight, or of the sum of three."""
    figure.set_size_inches(12, 5.8)
    scores = torch.arange(10, dtype=torch.float64)
    grid = figure.subplots(len(PUSHED), len(PUSH_EPSILONS), sharex=True, sharey=True)
    for axes, elements in zip(grid, PUSHED, strict=True):
        for axis, epsilon in zip(axes, PUSH_EPSILONS, strict=True):
            weights, gradient = push(scores, 3, elements, epsilon)
            longest = float(gradient.abs().max())
            for sign, color, label in ((1, ORANGE, "the score should rise"), (-1, BLUE, "it should fall")):
                seen = sign * gradient > 0.03 * longest
                x, y, length = scores[seen], weights[seen], 1.6 * gradient[seen] / longest
                axis.quiver(x, y, length, 0 * length, color=color, label=label, **ARROW)
            axis.scatter(scores, weights, s=14, color=GREY)
            axis.scatter(scores[elements], weights[elements], s=110, facecolors="none", edgecolors="black")
            axis.set_title(f"$\\epsilon$ = {epsilon:g}, longest arrow: {longest:.2f}", fontsize="medium")
            axis.set(xlim=(-0.9, 9.9), ylim=(-0.1, 1.15), xticks=range(10))
            axis.grid(alpha=0.3)
        loss = " ".join(f"- A_{element}" for element in elements)
        axes[0].set_ylabel(f"loss ${loss}$\n\nweight $A$")
    for axis in grid[-1]:
        axis.set_xlabel("score")
    grid[0, 0].legend(loc="upper left", fontsize="small")
    figure.suptitle("Top-3 of the scores 0, 1, ..., 9: gradient steps that raise the weights in circles")


def draw_error(figure: Figure) -> None:
    """Above, the error of each solver against epsilon; below, its time."""
    figure.set_size_inches(10, 7)
    scores = torch.randn(BATCH, N, generator=torch.Generator().manual_seed(1))
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, operator in zip(grid.T, (soft_topk, sorted_soft_topk), strict=True):
        measured = {epsilon: measure(operator, scores, K, epsilon, ROUNDS) for epsilon in ERROR_EPSILONS}
        for solver, (label, color, marker) in SOLVERS.items():
            points = [(epsilon, *found[solver]) for epsilon, found in measured.items() if solver in found]
            epsilons, errors, times = zip(*points, strict=True)
            floored = [max(error, 10.0**SMALLEST_ERROR) for error in errors]
            for axis, values in zip(column, (floored, times), strict=True):
                axis.loglog(epsilons, values, color=color, marker=marker, label=label)
                axis.grid(visible=True, alpha=0.3)
        column[0].set_title(operator.__name__)
        column[1].set_xlabel("$\\epsilon$, in units of the largest cost")
    grid[0, 0].invert_xaxis()
    grid[0, 0].set_ylabel(f"largest error of a weight, at least $10^{{{SMALLEST_ERROR}}}$")
    grid[1, 0].set_ylabel("time, in units of torch.softmax")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SOLVERS))
    figure.suptitle(f"Solvers in float32: {BATCH} problems of {N} Gaussian scores, k = {K}, forward pass")


FIGURES = {"plans": draw_plans, "epsilon": draw_epsilon, "gradients": draw_gradients, "error": draw_error}


def main() -> None:
    """Draws the figures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)}; by default all")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="by default the current one")
    args = parser.parse_args()
    for name in args.figures:
        if name not in FIGURES:
            parser.error(f"FIGURE must be one of {', '.join(FIGURES)}, got {name!r}")
    if find_spec("matplotlib") is None:
        parser.error('matplotlib is missing: pip install "fairseq-softtopk[plots]"')
    from matplotlib.figure import Figure

    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figures or FIGURES:
        figure = Figure(layout="constrained")
        FIGURES[name](figure)
        figure.savefig(args.out / f"{name}.png", dpi=150)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
