"""What an update with ``soft_beam`` costs: ``python scripts/benchmark_training.py --out FILE.csv``.

Four updates, forward + backward, take turns on one batch and model; the optimiser's step would be the same:

a  teacher forcing: ``soft_beam`` with rho = 1, which is fairseq's ``cross_entropy``.
b  the batch k times over: a teacher-forced decoder pass over k copies of every sentence, encoded once: what a
   method runs that keeps k hypotheses to the end of the longest sentence.
c  ``soft_beam`` with rho = 0.8, which contains a (with the default, 0, it does not): the ratio is c / (a + b).
   a + b encodes, and holds the parameters' gradients, twice where c does it once.
   Its beam takes as many steps as a with ``--objective gold``, and a fifth more, and two, with the risk.
d  c, with every step of the beam computed anew in the backward pass.

The fastest turn of each counts, so that a slow phase of the machine hits all alike; the median of the ratios of
single rounds stands beside it.  Memory is the peak of what PyTorch's allocator holds beyond the model and the
batch, gradients of the parameters included; how it is seen on the CPU, ``benchmark_ops.py`` says.

A third table splits c.  One update runs in the profiler, and every moment of it belongs to one part: in the
forward pass to the innermost function of the search that is running, in the backward pass to the function whose
operation the autograd engine is differentiating, with the sums of gradients that this entails.  The rest is the
loop, the path, the gradients' way into the parameters and the engine itself.  On an accelerator a part is the
time of the kernels that it launched, and the rest has the time in which none was running.

The sentences are random: which words they have does not matter to the time. How peaked the distributions are
does matter, to the operator: the weights are scaled until the logits have the standard deviation of a trained
model's (``--spread``).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from benchmark_ops import describe, peak_bytes, stopwatch
from torch import Tensor, nn

import fairseq_softtopk.plugin  # noqa: F401  (registers the criterion and the architectures)
from fairseq_softtopk.beam import OBJECTIVES, search, selection
from fairseq_softtopk.criterions import soft_beam
from fairseq_softtopk.criterions.soft_beam import SoftBeamConfig, SoftBeamCriterion
from fairseq_softtopk.decoders import lstm, transformer

RHO = 0.8  # the paper's; any other but 0 and 1 costs the same
VOCABULARIES, SIZES, ARCHS = [2000, 10000, 32000], [3, 5, 10], ["topk_attention_tiny"]
TIME_TARGET, MEMORY_TARGET, RECOMPUTED_MEMORY_TARGET, OPERATOR_TARGET = 1.3, 1.5, 0.4, 0.1
PARTS = (
    "teacher forcing",
    "decoder step",
    "output layer",
    "candidates",
    "operator",
    "mixing",
    "rest",
)
LABEL = "part: "
# Whose time goes to which part: (owner, attribute, part); an inner one takes its time from the outer one.
LABELLED = (
    (SoftBeamCriterion, "teacher_forcing", "teacher forcing"),
    (search, "best_candidates", "candidates"),
    (lstm, "output_lprobs", "output layer"),
    (transformer, "output_lprobs", "output layer"),
    (search, "select", "candidates"),
    (search, "beam_weights", "mixing"),
    (selection, "sorted_soft_topk", "operator"),
)
STEP_LABELLED = (
    ("step", "decoder step"),
    ("mix", "mixing"),
    ("mix_embeddings", "mixing"),
)

Update = Callable[[], Tensor]
Events = list[dict[str, Any]]


def make_task(vocabulary: int) -> SimpleNamespace:
    """A translation task as far as models and criterions look at it."""
    from fairseq.data import Dictionary

    dictionary = Dictionary()
    for word in range(vocabulary - dictionary.nspecial):
        dictionary.add_symbol(f"w{word}")
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def make_model(arch: str, task: SimpleNamespace, sample: dict[str, Any], spread: float) -> nn.Module:
    """A model with shared embeddings, whose logits have the standard deviation ``spread``."""
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

    if arch not in ARCH_MODEL_REGISTRY:
        raise ValueError(f"--arch must be an architecture of fairseq or of this package, got {arch}")
    options = Namespace(criterion=None, share_all_embeddings=True, dropout=0.1)
    options.max_source_positions = options.max_target_positions = 1024
    ARCH_CONFIG_REGISTRY[arch](options)
    if hasattr(options, "decoder_out_embed_dim"):
        options.decoder_out_embed_dim = options.decoder_embed_dim  # as shared embeddings demand
    model: nn.Module = ARCH_MODEL_REGISTRY[arch].build_model(options, task)
    with torch.no_grad():
        for _ in range(3):  # the weight is the input's too
            logits = model(**sample["net_input"])[0].float()
            model.decoder.embed_tokens.weight *= spread / logits.std(-1).mean()
    return model


def make_sample(task: SimpleNamespace, sentences: int, shortest: int, longest: int) -> dict[str, Any]:
    """A padded batch of random sentences whose lengths, eos included, go evenly from shortest to longest."""
    from fairseq.data.language_pair_dataset import collate

    generator, dictionary = torch.Generator().manual_seed(1), task.target_dictionary

    def sentence(length: int) -> Tensor:
        words = torch.randint(dictionary.nspecial, len(dictionary), (length - 1,), generator=generator)
        return torch.cat([words, torch.tensor([dictionary.eos()])])

    lengths = torch.linspace(longest, shortest, sentences).round().long().tolist()
    pairs = [{"id": i, "source": sentence(n), "target": sentence(n)} for i, n in enumerate(lengths)]
    sample: dict[str, Any] = collate(pairs, dictionary.pad(), dictionary.eos(), left_pad_source=True)
    return sample


def to_device(value: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def repeated_loss(model: nn.Module, sample: dict[str, Any], k: int, pad: int) -> Tensor:
    """Teacher forcing of k copies of every sentence side by side, encoded once."""
    source = {key: value for key, value in sample["net_input"].items() if key != "prev_output_tokens"}
    order = torch.arange(sample["target"].size(0), device=sample["target"].device).repeat_interleave(k)
    encoder_out = model.encoder.reorder_encoder_out(model.encoder(**source), order)
    output = model.decoder(sample["net_input"]["prev_output_tokens"][order], encoder_out=encoder_out)
    lprobs = model.get_normalized_probs(output, log_probs=True)
    del output  # as a criterion's caller does not hold the logits either
    gold = sample["target"][order].view(-1)
    return F.nll_loss(lprobs.view(-1, lprobs.size(-1)), gold, ignore_index=pad, reduction="sum")


def make_updates(
    model: nn.Module, task: SimpleNamespace, sample: dict[str, Any], k: int, objective: str
) -> dict[str, Update]:
    """The competitors: each leaves its gradients in the parameters and returns its loss."""

    def criterion(**options: Any) -> Update:
        config = SoftBeamConfig(soft_beam_size=k, **{"teacher_forcing_ratio": RHO, **options})
        config.sentence_avg, config.seed = False, 1
        built = SoftBeamCriterion(task, config)
        return lambda: built(model, sample)[0]

    losses = {
        "a": criterion(teacher_forcing_ratio=1.0),
        "b": partial(repeated_loss, model, sample, k, task.target_dictionary.pad()),
        "c": criterion(soft_beam_objective=objective),
        "d": criterion(soft_beam_objective=objective, soft_beam_recompute=True),
    }

    def update(loss: Update) -> Tensor:
        value = loss()
        with torch.profiler.record_function(f"{LABEL}backward"):
            value.backward()
        return value.detach()

    return {name: partial(update, loss) for name, loss in losses.items()}


def fresh(model: nn.Module) -> None:
    """No gradients, outside of what is timed: the same for all competitors."""
    for parameter in model.parameters():
        parameter.grad = None


def take_rounds(
    model: nn.Module, updates: dict[str, Update], repeats: int, device: torch.device
) -> list[dict[str, float]]:
    """Seconds of every competitor in every round; a round that is not counted comes first."""
    rounds = []
    for _ in range(repeats + 1):
        seconds = {}
        for name, update in updates.items():
            fresh(model)
            seconds[name] = stopwatch(update, 1, device)[0]
        rounds.append(seconds)
    return rounds[1:]


def labelled(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The function, which the profiler sees as this part."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(LABEL + part):
            return function(*args, **kwargs)

    return call


@contextmanager
def parts_labelled() -> Iterator[None]:
    """Inside the block the profiler sees which part of the search is running."""
    find = soft_beam.step_decoder_for

    def step_decoder_for(model: nn.Module) -> Any:
        decoder: Any = find(model)
        for name, part in STEP_LABELLED:
            if hasattr(decoder, name):
                setattr(decoder, name, labelled(getattr(decoder, name), part))
        return decoder

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(soft_beam, "step_decoder_for", step_decoder_for))
        for owner, name, part in LABELLED:
            stack.enter_context(mock.patch.object(owner, name, labelled(getattr(owner, name), part)))
        yield


def trace(update: Update, device: torch.device) -> Events:
    """What the profiler sees of one update, in the order in which it began."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    whole = torch.profiler.record_function(f"{LABEL}update")
    with torch.profiler.profile(activities=activities) as profiler, whole:
        update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    timed = [event for event in events if event["ph"] == "X" and event["cat"] != "Trace"]
    return sorted(timed, key=lambda event: (event["ts"], -event["dur"]))


def attribute(events: Events) -> dict[str, tuple[float, float]]:
    """Seconds of every part, forward and backward; they sum up to those of the update.

    An operation of the forward pass carries the number of the autograd node that it makes (or, making none,
    of the next one), and so does what the engine does for that node: the last operation with a number owns it.

    Args:
        events: of :func:`trace`.
    """
    whole = next(event for event in events if event["name"] == f"{LABEL}update")
    kernels = {e["args"].get("External id"): 0.0 for e in events if e["cat"] == "kernel"}
    by_kernels = bool(kernels)
    for event in events:
        if event["cat"] == "kernel":
            kernels[event["args"].get("External id")] += event["dur"]
    spent = {part: [0.0, 0.0] for part in PARTS}
    node_part: dict[int, str] = {}
    threads: dict[Any, list[tuple[float, str, bool, bool]]] = {}  # open: until, part, in backward, is a label
    end = whole["ts"] + whole["dur"]
    for event in events:
        if event["cat"] not in ("cpu_op", "user_annotation") or not whole["ts"] <= event["ts"] <= end:
            continue
        stack = threads.setdefault(event["tid"], [])
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        _, part, backward, in_label = stack[-1] if stack else (0.0, "rest", event["tid"] != whole["tid"], True)
        name, node = event["name"], event["args"].get("Sequence number")
        opened = None
        if name.startswith(LABEL):
            opened = (name.removeprefix(LABEL), backward or name == f"{LABEL}backward", True)
            if opened[0] not in PARTS:
                opened = ("rest", *opened[1:])
            if part == "teacher forcing":  # its own output layer is not the search's
                opened = (part, *opened[1:])
        elif name.startswith("autograd::engine::evaluate_function"):
            opened = (node_part.get(node, "rest"), True, False)
        elif in_label and node is not None:
            node_part[node] = part
        if opened:
            if not by_kernels:
                spent[opened[0]][opened[1]] += event["dur"]
                if stack:
                    spent[part][backward] -= event["dur"]
            stack.append((event["ts"] + event["dur"], *opened))
            part, backward, _ = opened
        if by_kernels:
            spent[part][backward] += kernels.pop(event["args"].get("External id"), 0.0)
    sums = {part: (forward / 1e6, backward / 1e6) for part, (forward, backward) in spent.items()}
    missing = whole["dur"] / 1e6 - sum(map(sum, sums.values()))
    return {**sums, "rest": (sums["rest"][0] + missing, sums["rest"][1])}


def measure(args: Namespace, arch: str, vocabulary: int, k: int) -> dict[str, Any]:
    """All figures of one case."""
    device = torch.device(args.device)
    torch.manual_seed(1)
    task = make_task(vocabulary)
    sample = make_sample(task, args.sentences, *args.lengths)
    model = make_model(arch, task, sample, args.spread).to(device).train()
    sample = to_device(sample, device)
    updates = make_updates(model, task, sample, k, args.objective)
    rounds = take_rounds(model, updates, args.repeats, device)
    row: dict[str, Any] = {"arch": arch, "vocabulary": vocabulary, "k": k}
    for name in updates:
        row[f"{name}_s"] = min(seconds[name] for seconds in rounds)
    row["ratio"] = row["c_s"] / (row["a_s"] + row["b_s"])
    row["ratio_median"] = median(seconds["c"] / (seconds["a"] + seconds["b"]) for seconds in rounds)
    row["ratio_recomputed"] = row["d_s"] / (row["a_s"] + row["b_s"])
    for name, update in updates.items():
        fresh(model)
        row[f"{name}_mib"] = peak_bytes(update, device) / 2**20
    row["memory_ratio_recomputed"] = row["d_mib"] / (row["a_mib"] + row["b_mib"])
    row["memory_ratio"] = row["c_mib"] / (row["a_mib"] + row["b_mib"])
    with parts_labelled():
        profiled = []
        for _ in range(args.profiles):
            fresh(model)
            profiled.append(attribute(trace(updates["c"], device)))
    best = min(profiled, key=lambda parts: sum(map(sum, parts.values())))
    row["profiled_s"] = sum(map(sum, best.values()))
    for part, (forward, backward) in best.items():
        row[f"{part}, forward"], row[f"{part}, backward"] = forward, backward
        row[part] = (forward + backward) / row["profiled_s"]
    return row


CASE = f"{'arch':32}{'V':>7}{'k':>4}"
TIMES = f"{CASE}      a, s      b, s      c, s      d, s   c/(a+b)    median   d/(a+b)"
MEMORY = f"{CASE}     a, MiB    b, MiB    c, MiB    d, MiB   c/(a+b)   d/(a+b)"
SHARES = f"{CASE}" + "".join(f"{part.replace('teacher forcing', 'teacher f.'):>18}" for part in PARTS)


def tables(rows: list[dict[str, Any]]) -> str:
    """The figures, to be read."""

    def lines(header: str, cells: Callable[[dict[str, Any]], str]) -> list[str]:
        return [
            "",
            header,
            *(f"{row['arch']:32}{row['vocabulary']:7}{row['k']:4}{cells(row)}" for row in rows),
        ]

    def seconds(row: dict[str, Any]) -> str:
        ratios = f"{row['ratio']:10.2f}{row['ratio_median']:10.2f}{row['ratio_recomputed']:10.2f}"
        return "".join(f"{row[f'{x}_s']:10.3f}" for x in "abcd") + ratios

    def memory(row: dict[str, Any]) -> str:
        ratios = f"{row['memory_ratio']:10.2f}{row['memory_ratio_recomputed']:10.2f}"
        return " " + "".join(f"{row[f'{x}_mib']:10.1f}" for x in "abcd") + ratios

    def shares(row: dict[str, Any]) -> str:
        def part(name: str) -> str:
            forward, backward = (row[f"{name}, {way}"] / row["profiled_s"] for way in ("forward", "backward"))
            return f"{forward:.1%} + {backward:.1%}".rjust(18)

        return "".join(map(part, PARTS))

    return "\n".join(lines(TIMES, seconds) + lines(MEMORY, memory) + lines(SHARES, shares))


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst case of every target."""
    verdicts = []
    for name, key, bound in (
        ("time c / (a + b)", "ratio", TIME_TARGET),
        ("memory c / (a + b)", "memory_ratio", MEMORY_TARGET),
        ("memory d / (a + b)", "memory_ratio_recomputed", RECOMPUTED_MEMORY_TARGET),
        ("share of the operator", "operator", OPERATOR_TARGET),
    ):
        worst = max(rows, key=lambda row: row[key])
        verdicts.append(
            {
                "target": f"{name} <= {bound:g}",
                "verdict": "reached" if worst[key] <= bound else "missed",
                "worst": round(worst[key], 3),
                "case": f"{worst['arch']}, V = {worst['vocabulary']}, k = {worst['k']}",
            }
        )
    return verdicts


def save(out: Path, rows: list[dict[str, Any]], description: dict[str, Any]) -> None:
    """Writes the figures, as .csv, or with where they come from as .json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".json":
        out.write_text(json.dumps({**description, "rows": rows}, indent=2) + "\n")
        return
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parse_args() -> Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help=f"default: {' '.join(ARCHS)}")
    parser.add_argument("--objective", choices=OBJECTIVES, default="gold", help="of c and d (default: gold)")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES, metavar="V")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="K", help="numbers of beams")
    parser.add_argument("--sentences", type=int, default=30, help="in the batch (default: 30)")
    parser.add_argument("--lengths", nargs=2, type=int, default=[10, 30], metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--spread", type=float, default=2.5, help="deviation of the logits (default: 2.5)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--profiles", type=int, default=2, help="profiled updates, fastest counts (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as .csv or .json")
    parser.add_argument("--quick", action="store_true", help="one small case, two rounds")
    args = parser.parse_args()
    if args.quick:
        args.vocabularies, args.sizes, args.repeats, args.profiles = [500], [3], 2, 1
        args.sentences, args.lengths = 4, [3, 6]
    for name in ("sentences", "repeats", "profiles", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 1 <= args.lengths[0] <= args.lengths[1]:
        parser.error(f"--lengths must be 1 <= SHORTEST <= LONGEST, got {args.lengths}")
    if not args.spread > 0:
        parser.error(f"--spread must be positive, got {args.spread}")
    for vocabulary, k in product(args.vocabularies, args.sizes):
        if not 1 <= k <= vocabulary - 4:
            parser.error(f"--sizes must lie in [1, V - 4], got {k} for a vocabulary of {vocabulary}")
    if args.out and args.out.suffix not in (".csv", ".json"):
        parser.error(f"--out must end with .csv or .json, got {args.out}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch sees no such device")
    return args


def main() -> None:
    """Measures every case, prints the tables, judges the targets."""
    args = parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr
    torch.set_num_threads(args.threads)
    description = describe(args)
    del description["peers"]
    print(json.dumps(description, indent=2), flush=True)
    rows = []
    for arch, vocabulary, k in product(args.arch, args.vocabularies, args.sizes):
        try:
            rows.append(measure(args, arch, vocabulary, k))
        except ValueError as error:
            sys.exit(str(error))
        print(f"{arch}, V = {vocabulary}, k = {k}: c / (a + b) = {rows[-1]['ratio']:.2f}", flush=True)
    print(tables(rows), "\n")
    description["targets"] = judge(rows)
    for target in description["targets"]:
        print("{verdict}: {target}, worst {worst} ({case})".format(**target))
    if args.out:
        save(args.out, rows, description)


if __name__ == "__main__":
    main()
