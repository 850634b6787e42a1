"""What the recipes do with the checkpoints in a training's folder.

- ``python checkpoints.py average FOLDER NUMBER EVERY OUT`` writes the mean of the last NUMBER that fairseq
  wrote every ``--save-interval-updates``, which EVERY is. Where an epoch ended at such an update, it is the
  checkpoint of the epoch;
- ``python checkpoints.py mend FOLDER``: fairseq copies what it has written to ``checkpoint_last.pt``, where the
  next start goes on. If that copy was interrupted, the last whole checkpoint takes its place.
"""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

import fairseq_softtopk.plugin  # noqa: F401  what fairseq's checkpoints hold may be read


def load(path: Path) -> dict[str, Any]:
    """A checkpoint; its tensors are read when they are used."""
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint


def is_whole(path: Path) -> bool:
    """Whether it can be read to its end: what was cut off has lost the table at the end of the file."""
    try:
        load(path)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
        return False
    return True


def mend(folder: Path) -> None:
    """Puts the last whole checkpoint in the place of a ``checkpoint_last.pt`` that is not."""
    last = folder / "checkpoint_last.pt"
    if not last.exists() or is_whole(last):
        return
    written = sorted(folder.glob("checkpoint*[0-9].pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    whole = next(filter(is_whole, written), None)
    if whole is None:
        raise SystemExit(f"checkpoints.py: {last} cannot be read, nor any other there: remove it to start anew")
    print(f"   {last} cannot be read: goes on from {whole.name}", flush=True)
    shutil.copyfile(whole, folder / "checkpoint_last.part")
    (folder / "checkpoint_last.part").replace(last)


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
        raise SystemExit(f"checkpoints.py: {folder} has no checkpoint of a multiple of {every} updates")
    return last


def average(folder: Path, number: int, every: int, out: Path) -> None:
    """Averages the parameters; everything else is that of the last checkpoint."""
    paths = last_checkpoints(folder, number, every)
    for i, path in enumerate(paths):
        checkpoint = load(path)
        if i == 0:
            total = {name: value.double() for name, value in checkpoint["model"].items()}
        elif checkpoint["model"].keys() != total.keys():
            raise SystemExit(f"checkpoints.py: {path} has other parameters than {paths[0]}")
        else:
            for name, value in checkpoint["model"].items():
                total[name] += value
    checkpoint["model"] = {
        name: (total[name] / len(paths)).to(value.dtype) if value.is_floating_point() else value
        for name, value in checkpoint["model"].items()
    }
    torch.save(checkpoint, out)
    fewer = f", there are no {number}" if len(paths) < number else ""
    print(f"   mean of {', '.join(path.name for path in paths)}{fewer}")


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("average")
    command.add_argument("folder", type=Path)
    for name in ("number", "every"):
        command.add_argument(name, type=int)
    command.add_argument("out", type=Path)
    command = commands.add_parser("mend")
    command.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "mend":
        mend(args.folder)
    elif min(args.number, args.every) < 1:
        parser.error(f"NUMBER and EVERY must be at least 1, got {args.number} and {args.every}")
    else:
        average(args.folder, args.number, args.every, args.out)


if __name__ == "__main__":
    main()
