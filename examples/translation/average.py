"""The mean of the last checkpoints of a training: ``python average.py FOLDER NUMBER EVERY OUT``.

Takes those that fairseq wrote every ``--save-interval-updates``, which EVERY is. Where an epoch ended at such
an update, it is the checkpoint of the epoch.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

import fairseq_softtopk.plugin  # noqa: F401  what fairseq's checkpoints hold may be read


def load(path: Path) -> dict[str, Any]:
    """A checkpoint; its tensors are read when they are used."""
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint


def last_checkpoints(folder: Path, number: int, every: int) -> list[Path]:
    """The checkpoints with the most updates, of those whose number of updates is a multiple of ``every``."""
    updates = {}
    for path in folder.glob("checkpoint*.pt"):
        if found := re.fullmatch(r"checkpoint_\d+_(\d+)", path.stem):
            updates[int(found[1])] = path
        elif re.fullmatch(r"checkpoint\d+", path.stem):  # of an epoch
            updates[load(path)["optimizer_history"][-1]["num_updates"]] = path
    last = [updates[update] for update in sorted(updates) if update % every == 0][-number:]
    if not last:
        raise SystemExit(f"average.py: {folder} has no checkpoint of a multiple of {every} updates")
    return last


def main() -> None:
    """Averages the parameters; everything else is that of the last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in ("number", "every"):
        parser.add_argument(name, type=int)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if min(args.number, args.every) < 1:
        parser.error(f"NUMBER and EVERY must be at least 1, got {args.number} and {args.every}")
    paths = last_checkpoints(args.folder, args.number, args.every)
    for i, path in enumerate(paths):
        checkpoint = load(path)
        if i == 0:
            total = {name: value.double() for name, value in checkpoint["model"].items()}
        elif checkpoint["model"].keys() != total.keys():
            raise SystemExit(f"average.py: {path} has other parameters than {paths[0]}")
        else:
            for name, value in checkpoint["model"].items():
                total[name] += value
    checkpoint["model"] = {
        name: (total[name] / len(paths)).to(value.dtype) if value.is_floating_point() else value
        for name, value in checkpoint["model"].items()
    }
    torch.save(checkpoint, args.out)
    print(f"mean of {', '.join(path.name for path in paths)}")


if __name__ == "__main__":
    main()
