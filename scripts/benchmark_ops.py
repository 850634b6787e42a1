"""Times the operators against softmax: ``OMP_NUM_THREADS=1 python scripts/benchmark_ops.py --out FOLDER``.

Every figure is a ratio to ``torch.softmax`` of the same float32 tensor.  Softmax and the candidate take turns,
and the fastest turn of each counts, so that a slow phase of the machine hits both; softmax against itself shows
the noise that is left.  A call of more than a second is timed once, its memory not at all.  Sinkhorn makes the
whole grid take more than an hour; ``--scores normal --epsilons 1e-1 1e-3`` is a quarter of it.

Memory is the peak of what PyTorch's allocator holds during forward + backward beyond the scores: the result,
its incoming gradient, the gradient of the scores, all that is saved or temporary.  The unit is the size of the
scores, times k + 1 for a sorted operator.  On the CPU it is the running sum of the profiler's allocations, as
a resident set size is blind below a page and remembers what was freed; what is allocated without PyTorch is
not seen.

The error is the largest difference of a weight from Newton's solution in float64.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import re
import shlex
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
# Seconds: a turn lasts at least this long; a call longer than the second is not repeated, but for the first of
# all, which is not counted, unless it takes longer than the third.
SAMPLE, SLOW, PATIENCE = 5e-3, 1.0, 30.0
PEERS = {
    "softtorch": "softtorch",
    "difftopk": "difftopk",
    "torchsort": "torchsort",
    "entmax": "entmax",
    "pot": "ot",
}

HEADER = "scores       shape   k  epsilon  method                 forward   fwd+bwd  memory    error"

Operator = Callable[[Tensor], Tensor]
Turn = Callable[[], Tensor]


@dataclass(frozen=True)
class Method:
    """Something to be timed.

    Attributes:
        make: (scores, k, epsilon) -> the operator, with what it prepares once.
        peer: the distribution that it needs, of ``PEERS``.
        ranks: whether it has a weight per element and rank, as ``sorted_soft_topk``.
        exact: whether it solves the problem of this package, so that it has an error.
        floats: (batch, n, k) -> roughly how many numbers it holds at once, where that may be too many.
        most: the largest scores.numel() that is worth the wait.
        differentiable: whether forward + backward is timed.
    """

    make: Callable[[Tensor, int, float], Operator]
    peer: str = ""
    ranks: bool = False
    exact: bool = False
    floats: Callable[[int, int, int], float] = lambda batch, n, k: 0
    most: float = math.inf
    differentiable: bool = True


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
    def case(self) -> str:
        """What the rows of one tensor and epsilon share."""
        return f"{self.scores} {self.batch}x{self.n}, k {self.k}, epsilon {self.epsilon:g}"

    def __str__(self) -> str:
        figures = ((self.forward, "10.1f"), (self.both, "10.1f"), (self.memory, "8.1f"), (self.error, "9.0e"))
        cells = "".join(
            "-".rjust(int(form.split(".")[0])) if x is None else format(x, form) for x, form in figures
        )
        case = f"{self.scores:8}{f'{self.batch}x{self.n}':>10}{self.k:4}{self.epsilon:9.0e}  {self.method:20}"
        return f"{case}{cells}  {self.solver if self.status == 'ok' else self.status}".rstrip()


def make_sinkhorn(operator: Callable[..., Tensor], scores: Tensor, k: int, epsilon: float) -> Operator:
    """Sinkhorn in the plain domain where that works, else in the log domain, as in the paper's code."""
    plain = partial(operator, k=k, epsilon=epsilon, solver="sinkhorn", max_iter=STEPS)
    if epsilon >= 1e-2:
        try:
            plain(scores.cpu())  # an accelerator would abort where the CPU raises an error
        except ValueError as error:
            if "underflows" not in str(error):
                raise
        else:
            return plain
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


def bitonic_floats(batch: int, n: int, k: int) -> float:
    """Two n x n/2 matrices per layer, for the network and for each row, held for the backward pass."""
    depth = math.ceil(math.log2(n))
    return depth * (depth + 1) / 2 * n**2 * (batch + 1)


def make_torchsort(scores: Tensor, k: int, epsilon: float) -> Operator:
    """Ranks instead of weights, the nearest that it has."""
    return partial(import_module("torchsort").soft_rank, regularization_strength=epsilon)


def make_entmax(scores: Tensor, k: int, epsilon: float) -> Operator:
    """The same constraints with a quadratic regulariser."""
    budget = partial(import_module("entmax").budget_bisect, budget=k)
    return lambda x: budget(x * (2 / epsilon))


def make_pot(scores: Tensor, k: int, epsilon: float) -> Operator:
    """The transport problem of the top-k operator, row by row."""
    n = scores.size(-1)
    anchors, rows, columns = scores.new_tensor([1, 0]), scores.new_ones(n), scores.new_tensor([k, n - k])
    options = {"method": "sinkhorn_log", "numItermax": STEPS, "stopThr": 0.0, "warn": False}
    solve = partial(import_module("ot").bregman.sinkhorn, rows, columns, reg=epsilon, **options)
    return lambda x: torch.stack([solve(M=(row.unsqueeze(-1) - anchors).square())[:, 0] for row in x])


METHODS = {
    "softmax": Method(lambda x, k, epsilon: partial(torch.softmax, dim=-1)),
    "torch.topk": Method(lambda x, k, epsilon: lambda y: y.topk(k).values),
    "soft_topk": Method(lambda x, k, epsilon: partial(soft_topk, k=k, epsilon=epsilon), exact=True),
    "sorted_soft_topk": Method(
        lambda x, k, epsilon: partial(sorted_soft_topk, k=k, epsilon=epsilon), ranks=True, exact=True
    ),
    "sinkhorn": Method(partial(make_sinkhorn, soft_topk), "", False, True, lambda b, n, k: 20 * b * n),
    "sorted sinkhorn": Method(
        partial(make_sinkhorn, sorted_soft_topk), "", True, True, lambda b, n, k: 10 * b * n * (k + 1)
    ),
    "softtorch ot": Method(
        partial(make_softtorch, "ot"), "softtorch", True, True, lambda b, n, k: 12 * b * n * (k + 1), most=1e5
    ),
    "softtorch softsort": Method(
        partial(make_softtorch, "softsort"), "softtorch", True, floats=lambda b, n, k: 6 * b * n * k
    ),
    "difftopk bitonic": Method(make_difftopk, "difftopk", True, floats=bitonic_floats),
    "torchsort soft_rank": Method(make_torchsort, "torchsort"),
    "entmax budget": Method(make_entmax, "entmax"),
    "pot sinkhorn_log": Method(make_pot, "pot", exact=True, most=1e4, differentiable=False),
}
OURS = ("soft_topk", "sorted_soft_topk")


class Target(NamedTuple):
    """A bound on figures of a method, or on those of a slower one divided by them."""

    name: str
    method: str
    keys: tuple[str, ...]
    bound: float
    slower: str = ""
    least_n: int = 1


TARGETS = (
    Target("soft_topk forward / softmax", "soft_topk", ("forward",), 8, least_n=1000),
    Target("soft_topk forward+backward / softmax", "soft_topk", ("both",), 6, least_n=1000),
    Target("Sinkhorn / soft_topk", "soft_topk", ("forward", "both"), 200, "sinkhorn"),
    Target(
        "sorted Sinkhorn / sorted_soft_topk", "sorted_soft_topk", ("forward", "both"), 50, "sorted sinkhorn"
    ),
    Target("soft_topk memory / scores", "soft_topk", ("memory",), 6),
    Target("sorted_soft_topk memory / (scores x (k + 1))", "sorted_soft_topk", ("memory",), 4),
)


def look_for(module: str, distribution: str) -> str:
    """The version of a peer, or why there is none."""
    try:
        import_module(module)
        return metadata.version(distribution)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        return "not installed" if missing else f"cannot be imported: {error}"


def stopwatch(call: Turn, number: int, device: torch.device) -> tuple[float, Tensor]:
    """Seconds per call, and the last result; the device has finished before and after."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(number - 1):
        call()
    result = call()
    synchronize()
    return (time.perf_counter() - start) / number, result


def take_turns(calls: tuple[Turn, Turn], repeats: int, device: torch.device) -> tuple[list[float], Tensor]:
    """The fastest turn of each call in seconds, and what the second of them returned."""
    first = []
    for call in calls:
        turn = stopwatch(call, 1, device)
        if turn[0] < PATIENCE:  # a first call also loads, compiles and grows the heap
            turn = stopwatch(call, 1, device)
        first.append(turn)
    best, result = [seconds for seconds, _ in first], first[1][1]
    del first
    numbers = [max(1, min(1000, round(SAMPLE / seconds))) for seconds in best]
    for _ in range(repeats):
        for i, (call, number) in enumerate(zip(calls, numbers, strict=True)):
            if best[i] < SLOW:
                best[i] = min(best[i], stopwatch(call, number, device)[0])
    return best, result


def forward_backward(operator: Operator, scores: Tensor, grad: Tensor | None = None) -> Tensor:
    """The gradient of the scores, which require one; without grad an incoming gradient is made."""
    result = operator(scores)
    return torch.autograd.grad(result, scores, torch.ones_like(result) if grad is None else grad)[0]


def peak_bytes(call: Turn, device: torch.device) -> int:
    """The most that is allocated at once during a call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in changes))


def measure(row: Row, method: Method, scores: Tensor, repeats: int) -> None:
    """Fills in what a method costs, and how far its weights are from Newton's in float64."""
    operator = method.make(scores, row.k, row.epsilon)
    row.solver = getattr(operator, "keywords", {}).get("solver", "")
    device, softmax = scores.device, partial(torch.softmax, dim=-1)

    turns = (partial(torch.no_grad()(softmax), scores), partial(torch.no_grad()(operator), scores))
    (base, seconds), weights = take_turns(turns, repeats, device)
    row.forward, row.forward_us, row.softmax_forward_us = seconds / base, 1e6 * seconds, 1e6 * base
    if method.exact:
        newton = sorted_soft_topk if method.ranks else soft_topk
        row.error = float((weights - newton(scores.double(), row.k, epsilon=row.epsilon)).abs().max())
    if not method.differentiable:
        return
    leaf = scores.clone().requires_grad_()
    grads = torch.randn_like(scores), torch.randn_like(weights)
    turns = (
        partial(forward_backward, softmax, leaf, grads[0]),
        partial(forward_backward, operator, leaf, grads[1]),
    )
    (base, seconds), _ = take_turns(turns, repeats, device)
    row.both, row.both_us, row.softmax_both_us = seconds / base, 1e6 * seconds, 1e6 * base
    if seconds < SLOW:
        unit = scores.nbytes * (row.k + 1 if method.ranks else 1)
        row.memory = peak_bytes(partial(forward_backward, operator, leaf), device) / unit


def run_case(row: Row, method: Method, scores: Tensor, repeats: int, limit: float) -> None:
    """Measures, or says in the row's status why not; this package's own solver must not fail."""
    size = 4 * method.floats(row.batch, row.n, row.k) / 2**30
    if size > limit:
        row.status = f"skipped: it needs about {size:.2g} GiB, --memory-limit is {limit:g}"
    elif scores.numel() > method.most:
        row.status = f"skipped: too slow for more than {method.most:g} scores"
    elif row.method in OURS:
        measure(row, method, scores, repeats)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Sinkhorn has not converged is what the error says
            try:
                measure(row, method, scores, repeats)
            except Exception as error:
                row.status = " ".join(f"failed: {error!r}".split())[:120]


def make_scores(kind: str, batch: int, n: int, device: str) -> Tensor:
    """Standard normal scores, or uniform on [0, 1]; the same in every run."""
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(batch, n, generator=torch.Generator().manual_seed(batch + n)).to(device)


def judge(target: Target, rows: list[Row]) -> dict[str, Any]:
    """The worst case of a target among the rows, and the verdict."""
    slower = {row.case: row for row in rows if row.method == target.slower}
    values = []
    for row, key in product(rows, target.keys):
        value, other = getattr(row, key), getattr(slower.get(row.case), key, None)
        if row.method == target.method and row.n >= target.least_n and value and (other or not target.slower):
            values.append((other / value if target.slower else value, f"{row.case}, {key}"))
    worst, where = (min if target.slower else max)(values, default=(None, "no such case"))
    verdict = "not measured"
    if worst is not None:
        verdict = "reached" if (worst >= target.bound if target.slower else worst <= target.bound) else "missed"
    name = f"{target.name} {'>=' if target.slower else '<='} {target.bound:g}"
    return {"target": name, "verdict": verdict, "worst": worst and round(worst, 2), "case": where}


def draw(rows: list[Row], out: Path) -> None:
    """The ratios to softmax against epsilon; a column of panels per shape, a row per pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = sorted({(row.n, row.batch) for row in rows})
    colours = dict(zip(METHODS, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(2, len(shapes), figsize=(3.6 * len(shapes) + 1, 8), sharey="row", squeeze=False)
    legend = {}
    for target, line in zip(TARGETS, axes, strict=False):
        line[0].set_ylabel(target.name.removeprefix("soft_topk "))
        for axis, (n, batch) in zip(line, shapes, strict=True):
            axis.set(xscale="log", yscale="log", title=f"{batch} x {n}", xlabel="epsilon")
            axis.grid(alpha=0.3)
            if n >= target.least_n:
                legend["target of soft_topk"] = axis.axhline(target.bound, color="black", linestyle=":")
            for name, (kind, style) in product(METHODS, (("normal", ".-"), ("uniform", ".--"))):
                curve = [
                    row for row in rows if (row.n, row.batch, row.method, row.scores) == (n, batch, name, kind)
                ]
                ratios = [getattr(row, target.keys[0]) or math.nan for row in curve]
                if not all(map(math.isnan, ratios)):
                    epsilons = [row.epsilon for row in curve]
                    legend[f"{name}, {kind}"] = axis.plot(epsilons, ratios, style, color=colours[name])[0]
    figure.tight_layout(rect=(0, 0.18, 1, 1))
    figure.legend(legend.values(), legend.keys(), loc="lower center", ncols=min(6, 2 * len(shapes)), fontsize=8)
    figure.savefig(out, dpi=120)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how the figures are taken."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.+)", info)
    return {
        "command": shlex.join(sys.argv),
        "machine": f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "peers": {name: look_for(module, name) for name, module in PEERS.items()},
    }


def save(out: Path, rows: list[Row], description: dict[str, Any]) -> None:
    """Writes the figures, where they come from, and their plot."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ratios.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (out / "benchmark.json").write_text(json.dumps(description, indent=2) + "\n")
    draw(rows, out / "ratios.png")


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="BATCH,N,K", help=f"default: {' '.join(SHAPES)}"
    )
    parser.add_argument("--epsilons", nargs="+", type=float, default=EPSILONS, metavar="EPSILON")
    parser.add_argument("--scores", nargs="+", choices=("normal", "uniform"), default=["normal", "uniform"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory-limit", type=float, default=4.0, help="GiB for one method (default: 4)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for ratios.csv, ratios.png and benchmark.json"
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
    shapes = [shape.split(",") for shape in args.shapes]
    if not all(
        len(s) == 3 and all(map(str.isdigit, s)) and 0 < int(s[2]) < int(s[1]) and int(s[0]) for s in shapes
    ):
        parser.error(f"--shapes must be BATCH,N,K with 0 < K < N, got {' '.join(args.shapes)}")
    args.shapes = [tuple(map(int, shape)) for shape in shapes]
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not all(epsilon > 0 for epsilon in args.epsilons):
        parser.error(f"--epsilons must be positive, got {args.epsilons}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch sees no such device")
    return args


def main() -> None:
    """Measures every method in every case, prints a table, judges the targets."""
    args = parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr
    torch.set_num_threads(args.threads)
    description = describe(args)
    print(json.dumps(description, indent=2), "\n\n", HEADER, sep="")
    rows = []
    for kind, (batch, n, k), epsilon in product(args.scores, args.shapes, args.epsilons):
        scores = make_scores(kind, batch, n, args.device)
        for name in args.methods:
            method = METHODS[name]
            row = Row(kind, batch, n, min(k, LARGEST_SORTED_K) if method.ranks else k, epsilon, name)
            version = description["peers"].get(method.peer, "0")
            if version[0].isdigit():
                run_case(row, method, scores, args.repeats, args.memory_limit)
            else:
                row.status = version
            rows.append(row)
            print(row, flush=True)
    description["targets"] = [judge(target, rows) for target in TARGETS]
    print()
    for target in description["targets"]:
        print("{verdict}: {target}, worst {worst} ({case})".format(**target))
    if args.out:
        save(args.out, rows, description)


if __name__ == "__main__":
    main()
