"""The mean of the last checkpoints of a training: ``python average.py FOLDER NUMBER OUT``.

Takes those that fairseq wrote every ``--save-interval-updates``, whose names end in their number of updates.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

import fairseq_softtopk.plugin  # noqa: F401  what fairseq's checkpoints hold may be read


def last_checkpoints(folder: Path, number: int) -> list[Path]:
    """The checkpoints with the most updates."""
    updates = {
        int(found[1]): path
        for path in folder.glob("checkpoint_*.pt")
        if (found := re.fullmatch(r"checkpoint_\d+_(\d+)", path.stem))
    }
    if not updates:
        raise SystemExit(f"average.py: {folder} has no checkpoint_EPOCH_UPDATES.pt")
    return [updates[update] for update in sorted(updates)[-number:]]


def main() -> None:
    """Averages the parameters; everything else is that of the last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.number < 1:
        parser.error(f"NUMBER must be at least 1, got {args.number}")
    paths = last_checkpoints(args.folder, args.number)
    for i, path in enumerate(paths):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
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
