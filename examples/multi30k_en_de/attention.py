"""The attention of a checkpoint, as options of a training that goes on: ``python attention.py CHECKPOINT``.

The relaxation has no parameters, so that a checkpoint also loads where another one is asked for.  Of a schedule
of epsilon only its last value counts: the new training starts where the old one was.
"""

from __future__ import annotations

import argparse
import logging
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

PLUGIN = Path(__file__).parents[2] / "fairseq_softtopk"


def main() -> None:
    """Prints the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    path = parser.parse_args().checkpoint
    logging.disable(logging.INFO)  # what fairseq says when it is imported
    from fairseq.utils import import_user_module

    import_user_module(Namespace(user_dir=str(PLUGIN)))  # now what fairseq's checkpoints hold may be read
    try:
        print(*options(torch.load(path, map_location="cpu", weights_only=True)))
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, StopIteration) as error:
        raise SystemExit(f"attention.py: {path} cannot be read ({type(error).__name__})") from None


def options(checkpoint: dict[str, Any]) -> list[str]:
    """The options, as words."""
    from fairseq_softtopk.schedules import Schedule

    model = checkpoint["cfg"]["model"]
    settings = vars(model) if isinstance(model, Namespace) else model
    if "attention_relaxation" not in settings:  # fairseq's lstm and transformer
        return ["--attention-relaxation", "softmax"]
    name = "attention_epsilon"
    schedule = Schedule(
        f"--{name}",
        *(settings[f"{name}{part}"] for part in ("", "_end", "_updates")),
        str(settings[f"{name}_schedule"]),
    )
    # One for each layer of a Transformer, all with the same number of updates.
    updates = next(
        state for key, state in checkpoint["model"].items() if key.endswith("relaxation._extra_state")
    )
    found = {
        "relaxation": settings["attention_relaxation"],
        "top-k": settings["attention_top_k"],
        "epsilon": schedule.at(float(updates)),
        "cost-scale": settings.get("attention_cost_scale", "none"),
    }
    if "attention_score" in settings:  # not of a Transformer
        found["score"] = settings["attention_score"]
    return [f"--attention-{name} {value}" for name, value in found.items()]


if __name__ == "__main__":
    main()
