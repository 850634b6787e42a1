"""Times the operators against softmax: ``PYTHONPATH=. OMP_NUM_THREADS=1 python scripts/benchmark_ops.py --out FOLDER``.

Every figure is a ratio to ``torch.softmax`` of the same float32 tensor.  Softmax and the candidate take turns, and the
fastest turn of each counts, so that a slow phase of the machine hits both; softmax against itself shows the noise that
is left.  A call of more than a second is timed once, and its memory is not traced.  Sinkhorn's 200 steps make the whole
grid take more than an hour; ``--scores normal --epsilons 1e-1 1e-3`` is a quarter of it.

Memory is the peak of what PyTorch's allocator holds during forward + backward beyond the scores: result, its incoming
gradient, the gradient of the scores, everything saved and temporary.  The unit is the scores' own size, times k + 1 for
a sorted operator.  On the CPU it is the running sum of the profiler's allocations, as a resident set size is blind below
a page and remembers what was freed; so what a library allocates without PyTorch is not seen.

The error is the largest difference of a weight from Newton's solution in float64.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib import import_module, metadata
from itertools import accumulate, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_softtopk.ops import soft_topk, sorted_soft_topk

SHAPES = ["100,100,9", "32,1000,10", "32,10000,10", "16,50000,5", "4,200000,5"]
EPSILONS = [1e-1, 1e-2, 1e-3, 1e-5]
STEPS = 200  # of Sinkhorn, here and in the peers
LARGEST_SORTED_K = 5
SAMPLE, SLOW = 5e-3, 1.0  # seconds: a turn lasts at least this long; a call longer than that is not repeated
PEERS = {
    "softtorch": "softtorch",
    "difftopk": "difftopk",
    "torchsort": "torchsort",
    "entmax": "entmax",
    "ot": "pot",
}

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """Something to be timed.

    Attributes:
        make: (scores, k, epsilon) -> the operator, with what it prepares once.
        peer: the module that it needs, of ``PEERS``.
        ranks: whether it has a weight per element and rank, as ``sorted_soft_topk``.
        exact: whether it solves the problem of this package, so that it has an error.
        differentiable: whether forward + backward is timed.
        floats: (batch, n, k) -> roughly how many numbers it holds at once, where that may be too many.
        most: the largest scores.numel() that is worth the wait.
    """

    make: Callable[[Tensor, int, float], Operator]
    peer: str = ""
    ranks: bool = False
    exact: bool = False
    differentiable: bool = True
    floats: Callable[[int, int, int], float] = lambda batch, n, k: 0
    most: float = math.inf


@dataclass
class Row:
    """One method in one case; ratios are to softmax, times in microseconds, memory in sizes of the scores."""

    scores: str
    batch: int
    n: int
    k: int
    epsilon: float
    method: str
    status: str = "ok"
    solver: str = ""
    forward: float | None = None
    forward_us: float | None = None
    softmax_forward_us: float | None = None
    both: float | None = None
    both_us: float | None = None
    softmax_both_us: float | None = None
    memory: float | None = None
    error: float | None = None

    @property
    def case(self) -> tuple[Any, ...]:
        """What the rows of one tensor and epsilon share."""
        return self.scores, self.batch, self.n, self.epsilon


def make_sinkhorn(operator: Callable[..., Tensor], scores: Tensor, k: int, epsilon: float) -> Operator:
    """Sinkhorn in the plain domain where that works, else in the log domain, as in the paper's code."""
    plain = partial(operator, k=k, epsilon=epsilon, solver="sinkhorn", max_iter=STEPS)
    if epsilon >= 1e-2:
        try:
            plain(scores.cpu())  # an accelerator would abort where the CPU raises an error
            return plain
        except ValueError:
            pass
    return partial(operator, k=k, epsilon=epsilon, solver="sinkhorn_log", max_iter=STEPS)


def make_softtorch(method: str, scores: Tensor, k: int, epsilon: float) -> Operator:
    """Its anchors are j / k: scores / k and epsilon / k^2 make its problem ours."""
    topk = partial(import_module("softtorch").topk, k=k, method=method, standardize=False)
    if method == "softsort":
        return lambda x: topk(x, softness=epsilon).indices.transpose(-1, -2)
    options = {"sinkhorn_max_iter": STEPS}
    return lambda x: topk(x / k, softness=epsilon / k**2, ot_kwargs=options).indices.transpose(-1, -2)


def make_difftopk(scores: Tensor, k: int, epsilon: float) -> Operator:
    """A bitonic sorting network with dense matrices."""
    options = {"device": str(scores.device), "steepness": 1 / epsilon}
    network = import_module("difftopk").DiffTopkNet("bitonic", scores.size(-1), k, **options)
    return lambda x: network(x)[1]


def make_pot(scores: Tensor, k: int, epsilon: float) -> Operator:
    """The transport problem of the top-k operator, row by row."""
    n = scores.size(-1)
    anchors, rows, columns = scores.new_tensor([1, 0]), scores.new_ones(n), scores.new_tensor([k, n - k])
    options = {"method": "sinkhorn_log", "numItermax": STEPS, "stopThr": 0.0, "warn": False}
    solve = partial(import_module("ot").bregman.sinkhorn, rows, columns, reg=epsilon, **options)
    return lambda x: torch.stack([solve(M=(row.unsqueeze(-1) - anchors).square())[:, 0] for row in x])


def bitonic_floats(batch: int, n: int, k: int) -> float:
    """Two n x n/2 matrices per layer and row, held for the backward pass, and the network's own four."""
    depth = math.ceil(math.log2(n))
    return depth * (depth + 1) / 2 * n**2 * (2 * batch + 2)


METHODS = {
    "softmax": Method(lambda x, k, epsilon: partial(torch.softmax, dim=-1)),
    "torch.topk": Method(lambda x, k, epsilon: lambda y: y.topk(k).values),
    "soft_topk": Method(lambda x, k, epsilon: partial(soft_topk, k=k, epsilon=epsilon), exact=True),
    "sinkhorn": Method(partial(make_sinkhorn, soft_topk), exact=True, floats=lambda b, n, k: 20 * b * n),
    "sorted_soft_topk": Method(
        lambda x, k, epsilon: partial(sorted_soft_topk, k=k, epsilon=epsilon), ranks=True, exact=True
    ),
    "sorted sinkhorn": Method(
        partial(make_sinkhorn, sorted_soft_topk),
        ranks=True,
        exact=True,
        floats=lambda b, n, k: 10 * b * n * (k + 1),
    ),
    "softtorch ot": Method(
        partial(make_softtorch, "ot"),
        "softtorch",
        True,
        True,
        floats=lambda b, n, k: 30 * b * n * (k + 1),
        most=1e5,
    ),
    "softtorch softsort": Method(
        partial(make_softtorch, "softsort"), "softtorch", True, floats=lambda b, n, k: 10 * b * n * k
    ),
    "difftopk bitonic": Method(make_difftopk, "difftopk", True, floats=bitonic_floats),
    "torchsort soft_rank": Method(
        lambda x, k, epsilon: partial(import_module("torchsort").soft_rank, regularization_strength=epsilon),
        "torchsort",
    ),
    "entmax budget": Method(
        lambda x, k, epsilon: lambda y: import_module("entmax").budget_bisect(y * (2 / epsilon), budget=k),
        "entmax",
    ),
    "pot sinkhorn_log": Method(make_pot, "ot", exact=True, differentiable=False, most=1e4),
}


def look_for(module: str, distribution: str) -> str:
    """The version of a peer, or why there is none."""
    try:
        import_module(module)
        return metadata.version(distribution)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == module else f"cannot be imported: {error}"
    except Exception as error:
        return f"cannot be imported: {error}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done its work; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(call: Callable[[], Tensor], number: int, device: torch.device) -> tuple[float, Tensor]:
    """Seconds per call, and the last result."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(number - 1):
        call()
    result = call()
    synchronize(device)
    return (time.perf_counter() - start) / number, result


def take_turns(
    calls: list[Callable[[], Tensor]], repeats: int, device: torch.device
) -> tuple[list[float], Tensor]:
    """The fastest turn of each call in seconds, and what the last of them returned."""
    best, results = map(list, zip(*(stopwatch(call, 1, device) for call in calls), strict=True))
    result = results.pop()
    results.clear()
    numbers = [max(1, min(1000, round(SAMPLE / seconds))) for seconds in best]
    for _ in range(repeats):
        for i, (call, number) in enumerate(zip(calls, numbers, strict=True)):
            if best[i] < SLOW:
                best[i] = min(best[i], stopwatch(call, number, device)[0])
    return best, result


def forward(operator: Operator, scores: Tensor) -> Tensor:
    """The result, without what a backward pass would need."""
    with torch.no_grad():
        return operator(scores)


def forward_backward(operator: Operator, scores: Tensor, grad: Tensor | None = None) -> Tensor:
    """The gradient of the scores, which require one; without grad an incoming gradient is made."""
    result = operator(scores)
    grad = torch.randn(result.shape, device=result.device) if grad is None else grad
    return torch.autograd.grad(result, scores, grad)[0]


def peak_bytes(call: Callable[[], Tensor], device: torch.device) -> int:
    """The most that is allocated at once during a call."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(accumulate(e["args"]["Bytes"] for e in changes))


def measure(row: Row, method: Method, scores: Tensor, repeats: int) -> None:
    """Fills in what a method costs, and how far its weights are from Newton's in float64."""
    operator = method.make(scores, row.k, row.epsilon)
    row.solver = getattr(operator, "keywords", {}).get("solver", "")
    device, softmax = scores.device, partial(torch.softmax, dim=-1)

    turns = [partial(forward, softmax, scores), partial(forward, operator, scores)]
    (base, seconds), weights = take_turns(turns, repeats, device)
    row.forward, row.forward_us, row.softmax_forward_us = seconds / base, 1e6 * seconds, 1e6 * base
    if method.exact:
        newton = sorted_soft_topk if method.ranks else soft_topk
        row.error = float((weights - newton(scores.double(), row.k, epsilon=row.epsilon)).abs().max())
    if not method.differentiable:
        return
    leaf = scores.clone().requires_grad_()
    turns = [
        partial(forward_backward, softmax, leaf, torch.randn_like(scores)),
        partial(forward_backward, operator, leaf, torch.randn_like(weights)),
    ]
    (base, seconds), _ = take_turns(turns, repeats, device)
    row.both, row.both_us, row.softmax_both_us = seconds / base, 1e6 * seconds, 1e6 * base
    if seconds < SLOW:
        unit = scores.nbytes * (row.k + 1 if method.ranks else 1)
        row.memory = peak_bytes(partial(forward_backward, operator, leaf), device) / unit


def run_case(row: Row, method: Method, scores: Tensor, args: argparse.Namespace) -> None:
    """Measures, or says in the row's status why not; only a peer may fail."""
    size, limit = 4 * method.floats(row.batch, row.n, row.k) / 2**30, args.memory_limit
    if size > limit:
        row.status = f"skipped: it needs about {size:.2g} GiB, --memory-limit is {limit:g}"
    elif scores.numel() > method.most:
        row.status = f"skipped: too slow for more than {method.most:g} scores"
    elif not method.peer:
        with warnings.catch_warnings():
            if "sinkhorn" in row.method:  # that it is not converged is what the error says
                warnings.simplefilter("ignore", RuntimeWarning)
            measure(row, method, scores, args.repeats)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                measure(row, method, scores, args.repeats)
        except Exception as error:
            row.status = f"failed: {str(error).splitlines()[:1]}"


def make_scores(kind: str, batch: int, n: int, device: str) -> Tensor:
    """Standard normal scores, or uniform on [0, 1]; the same in every run."""
    generator = torch.Generator().manual_seed(batch + n)
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(batch, n, generator=generator).to(device)


class Target(NamedTuple):
    """What an operator should reach, and its worst case."""

    name: str
    bound: float
    at_most: bool
    worst: float | None
    case: str

    @property
    def verdict(self) -> str:
        """Whether it is reached."""
        if self.worst is None:
            return "not measured"
        return (
            "reached" if (self.worst <= self.bound if self.at_most else self.worst >= self.bound) else "missed"
        )

    def __str__(self) -> str:
        sign, value = "<=" if self.at_most else ">=", "" if self.worst is None else f"{self.worst:.1f}"
        return f"{self.verdict}: {self.name} {sign} {self.bound:g}x, worst {value or '-'} {self.case}".rstrip()


def check_targets(rows: list[Row]) -> list[Target]:
    """Every target with its worst case among the rows."""
    done = {(row.method, row.case): row for row in rows if row.status == "ok"}

    def judge(name: str, bound: float, at_most: bool, values: list[tuple[float | None, Row, str]]) -> Target:
        known = [(value, row, text) for value, row, text in values if value is not None]
        if not known:
            return Target(name, bound, at_most, None, "")
        value, row, text = (max if at_most else min)(known, key=lambda item: item[0])
        case = f"({row.scores} {row.batch}x{row.n}, k={row.k}, epsilon={row.epsilon:g}{text})"
        return Target(name, bound, at_most, value, case)

    def of(method: str, field: str, n: int = 0) -> list[tuple[float | None, Row, str]]:
        return [(getattr(r, field), r, "") for (name, _), r in done.items() if name == method and r.n >= n]

    def speedups(method: str, slow: str) -> list[tuple[float | None, Row, str]]:
        pairs = [(done[slow, c], r) for (name, c), r in done.items() if name == method and (slow, c) in done]
        passes = (("forward", ", forward"), ("both", ", forward+backward"))
        return [(getattr(a, key) / getattr(b, key), b, text) for a, b in pairs for key, text in passes]

    return [
        judge("soft_topk forward / softmax, n >= 1000,", 8, True, of("soft_topk", "forward", 1000)),
        judge("soft_topk forward+backward / softmax, n >= 1000,", 6, True, of("soft_topk", "both", 1000)),
        judge("Sinkhorn / soft_topk", 200, False, speedups("soft_topk", "sinkhorn")),
        judge("sorted Sinkhorn / sorted_soft_topk", 50, False, speedups("sorted_soft_topk", "sorted sinkhorn")),
        judge("soft_topk memory / scores", 6, True, of("soft_topk", "memory")),
        judge("sorted_soft_topk memory / (scores x (k+1))", 4, True, of("sorted_soft_topk", "memory")),
    ]


def draw(rows: list[Row], out: Path) -> None:
    """The ratios to softmax against epsilon; a column of panels per shape, a row per pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = sorted({(row.n, row.batch) for row in rows})
    colours = dict(zip(METHODS, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(
        2, len(shapes), figsize=(3.6 * len(shapes) + 0.6, 8), sharey="row", squeeze=False
    )
    for (line, (field, title, bound)), (column, (n, batch)) in product(
        enumerate((("forward", "forward", 8), ("both", "forward + backward", 6))), enumerate(shapes)
    ):
        axis = axes[line][column]
        if n >= 1000:
            axis.axhline(bound, color="black", linestyle=":", label="target of soft_topk")
        for name, kind in product(METHODS, ("normal", "uniform")):
            points = [
                (row.epsilon, getattr(row, field))
                for row in rows
                if (row.n, row.batch, row.method, row.scores) == (n, batch, name, kind) and getattr(row, field)
            ]
            if points:
                style = {"color": colours[name], "linestyle": "-" if kind == "normal" else "--", "marker": "."}
                axis.plot(*zip(*sorted(points), strict=True), label=f"{name}, {kind}", **style)
        axis.set(xscale="log", yscale="log", title=f"{batch} x {n}", xlabel="epsilon")
        axis.grid(alpha=0.3)
        axes[line][0].set_ylabel(f"{title}, time / softmax")
    labels = {
        label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout(rect=(0, 0.15, 1, 1))
    figure.legend(labels.values(), labels, loc="lower center", ncols=min(6, 2 * len(shapes)), fontsize=8)
    figure.savefig(out, dpi=120)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how the figures were taken."""
    cpus = Path("/proc/cpuinfo")
    names = (
        [x.split(": ")[1] for x in cpus.read_text().splitlines() if x.startswith("model name")]
        if cpus.exists()
        else []
    )
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {
        "command": " ".join(sys.argv),
        "machine": {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "gpu": gpu},
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "repeats": args.repeats,
    }


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="BATCH,N,K", help="default: the paper's sizes"
    )
    parser.add_argument("--epsilons", nargs="+", type=float, default=EPSILONS, metavar="EPSILON")
    parser.add_argument("--scores", nargs="+", choices=("normal", "uniform"), default=["normal", "uniform"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory-limit", type=float, default=4.0, help="in GiB, for one method (default: 4)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for ratios.csv, benchmark.json and ratios.png"
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes, two epsilons, two turns")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.epsilons, args.scores, args.repeats = (
            ["8,100,3", "4,1000,5"],
            [1e-1, 1e-3],
            ["normal"],
            2,
        )
    try:
        args.shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
        if any(not 0 < k < n or batch < 1 for batch, n, k in args.shapes):
            raise ValueError
    except ValueError:
        parser.error(f"--shapes must be BATCH,N,K with 0 < K < N, got {args.shapes}")
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not all(epsilon > 0 for epsilon in args.epsilons):
        parser.error(f"--epsilons must be positive, got {args.epsilons}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no such device")
    return args


def main() -> None:
    """Measures every method in every case, prints a table, judges the targets."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    peers = {module: look_for(module, distribution) for module, distribution in PEERS.items()}
    description = describe(args)
    print(json.dumps(description, indent=2))
    print("".join(f"peer {PEERS[module]}: {version}\n" for module, version in peers.items()))
    print(
        f"{'scores':8}{'shape':>12}{'k':>4}{'epsilon':>9}  {'method':20}{'forward':>10}{'fwd+bwd':>10}", end=""
    )
    print(f"{'memory':>8}{'error':>9}  (times / softmax)")
    rows = []
    for kind, (batch, n, k), epsilon in product(args.scores, args.shapes, args.epsilons):
        scores = make_scores(kind, batch, n, args.device)
        for name in args.methods:
            method = METHODS[name]
            row = Row(kind, batch, n, min(k, LARGEST_SORTED_K) if method.ranks else k, epsilon, name)
            if method.peer and not peers[method.peer][0].isdigit():
                row.status = peers[method.peer]
            else:
                run_case(row, method, scores, args)
            rows.append(row)
            figures = (
                (row.forward, ".1f", 10),
                (row.both, ".1f", 10),
                (row.memory, ".1f", 8),
                (row.error, ".0e", 9),
            )
            cells = "".join(f"{'-' if x is None else format(x, form):>{width}}" for x, form, width in figures)
            print(f"{kind:8}{f'{batch}x{n}':>12}{row.k:4}{epsilon:9.0e}  {name:20}", end="")
            print(f"{cells}  {row.solver}" if row.status == "ok" else f"  {row.status}", flush=True)
    targets = check_targets(rows)
    print("", *targets, sep="\n")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "ratios.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        judged = [{**target._asdict(), "verdict": target.verdict} for target in targets]
        text = json.dumps({**description, "peers": peers, "targets": judged}, indent=2)
        (args.out / "benchmark.json").write_text(text + "\n")
        draw(rows, args.out / "ratios.png")


if __name__ == "__main__":
    main()
