"""Says how the gradient of every system's beam compares with that of teacher forcing.

``python gradients.py DATA-BIN CHECKPOINT`` prints, for every line of ``finetuning.txt`` and over batches of the
validation set of several lengths, the norm of the gradient per token and its cosine with that of teacher
forcing on the same batch: the beam alone (rho = 0), without dropout.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from fairseq import checkpoint_utils, options, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor

RECIPE = Path(__file__).parent
PLUGIN = RECIPE.parents[1] / "fairseq_softtopk"


def read_systems() -> dict[str, list[str]]:
    """Name and options of every system but the control."""
    lines = [line.split() for line in (RECIPE / "finetuning.txt").read_text().splitlines()]
    systems = {line[0]: line[1:] for line in lines if line and not line[0].startswith("#")}
    del systems["control"]
    return systems


def build_criterion(task: Any, data: str, given: list[str]) -> Any:
    """The criterion of a system, as ``train.sh`` has it, in evaluation mode."""
    arguments = [data, "--user-dir", str(PLUGIN), "--arch", "topk_attention_tiny", "--criterion", "soft_beam"]
    arguments += ["--label-smoothing", "0.1"]  # as in train.sh
    args = options.parse_args_and_arch(options.get_training_parser(), [*arguments, *given])
    return task.build_criterion(convert_namespace_to_omegaconf(args).criterion).eval()


def gradient(criterion: Any, model: torch.nn.Module, sample: dict[str, Any]) -> Tensor:
    """The gradient of the loss per token, as one vector."""
    model.zero_grad()
    loss, sample_size, _ = criterion(model, sample)
    (loss / sample_size).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA-BIN", help="what fairseq-preprocess made")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--batches", type=int, default=8, help="evenly spread over the lengths (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=600)
    args = parser.parse_args()
    if args.batches < 1:
        parser.error(f"--batches must be at least 1, got {args.batches}")
    for path in args.data, args.checkpoint:
        if not Path(path).exists():
            parser.error(f"{path} is not there")
    logging.disable(logging.INFO)
    utils.import_user_module(argparse.Namespace(user_dir=str(PLUGIN)))
    (model, *_), _, task = checkpoint_utils.load_model_ensemble_and_task([args.checkpoint], {"data": args.data})
    model.eval()
    task.load_dataset("valid")
    epoch = task.get_batch_iterator(
        task.dataset("valid"), max_tokens=args.max_tokens, required_batch_size_multiple=1
    )
    batches = sorted(epoch.next_epoch_itr(shuffle=False), key=lambda sample: sample["target"].size(1))
    places = torch.linspace(0, len(batches) - 1, min(args.batches, len(batches))).long().unique().tolist()
    batches = [batches[place] for place in places]

    forcing = build_criterion(task, args.data, ["--teacher-forcing-ratio", "1"])
    expected = [gradient(forcing, model, sample) for sample in batches]
    lengths = [sample["target"].size(1) for sample in batches]
    print(f"{len(batches)} batches of {min(lengths)} to {max(lengths)} target tokens\n")
    print("| system | norm, median | norm, largest | cosine, mean | cosine, smallest |")
    print("| --- | --- | --- | --- | --- |")
    norms = [float(vector.norm()) for vector in expected]
    print(f"| teacher forcing | {median(norms):.2g} | {max(norms):.2g} | 1 | 1 |")
    for name, given in read_systems().items():
        criterion = build_criterion(task, args.data, [*given, "--teacher-forcing-ratio", "0"])
        found = [gradient(criterion, model, sample) for sample in batches]
        norms = [float(vector.norm()) for vector in found]
        cosines = [
            float(torch.cosine_similarity(a.double(), b.double(), dim=0))
            for a, b in zip(found, expected, strict=True)
        ]
        print(f"| {name} | {median(norms):.2g} | {max(norms):.2g} | {mean(cosines):.3f} | {min(cosines):.3f} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
