"""Draws what fairseq-train logged: ``python scripts/plot_training.py LOG... --out PNG``.

A log is what ``fairseq-train --log-format simple`` printed; its folder names its curve, or as much of its path
as tells it from the others.
One panel a quantity: the losses, and what ``soft_beam`` says about its beam.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

PANELS = {
    "teacher_forcing_loss": "teacher-forcing loss (bits per token)",
    "soft_beam_loss": "soft-beam loss (bits per token)",
    "soft_beam_risk": "risk: expected 1 - sentence BLEU",
    "beam_bleu": "sentence BLEU of the best hypotheses",
    "sharpness": "sharpness of the selection",
    "agreement": "agreement with the hard beam",
    "gold_rank": "mean rank of the gold token",
    "gold_on_beam": "gold prefix on the beam at its end",
    "score_grad_norm": "score gradient before its own bound",
    "score_grad_clipped": "share of bounded score gradients",
    "rho": "teacher-forcing ratio",
    "epsilon": "epsilon",
}
SHARES = ("sharpness", "agreement", "gold_on_beam", "score_grad_clipped", "rho")
COLUMNS = 4
UPDATE = re.compile(r"num_updates=(\d+)")
VALUE = re.compile(r"\b(\w+)=([-+.\deE]+)")

Curves = dict[str, list[tuple[int, float]]]


def read_log(path: Path) -> Curves:
    """For each logged quantity, (update, value) in order; a resumed run overwrites what it repeats."""
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        update = UPDATE.search(line)
        if "| train_inner |" not in line or update is None:
            continue
        for name, value in VALUE.findall(line):
            curves.setdefault(name, {})[int(update[1])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def draw(logs: dict[str, Curves], out: Path) -> None:
    """One panel for every quantity that at least one of the logs has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {name: title for name, title in PANELS.items() if any(name in curves for curves in logs.values())}
    columns, rows = min(COLUMNS, len(panels)), math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        for number, (label, curves) in enumerate(logs.items()):
            if name in curves:
                axis.plot(*zip(*curves[name], strict=True), marker=".", color=f"C{number}", label=label)
        axis.set(title=title, xlabel="update")
        if name in SHARES:
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def name_curves(paths: list[Path]) -> list[str]:
    """The shortest ends of different paths that tell them apart, with the files only if the folders do not."""
    paths = [path.resolve() for path in paths]
    folders = [path.parent for path in paths]
    ends = folders if len(set(folders)) == len(paths) else paths
    names: list[str] = []
    length = 0
    while len(set(names)) < len(paths):
        length += 1
        names = ["/".join(end.parts[-length:]) for end in ends]
    return names


def main() -> None:
    """Reads the logs and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    for path in args.logs:
        if not path.is_file():
            parser.error(f"{path} is not a file")
    if len({path.resolve() for path in args.logs}) < len(args.logs):
        parser.error("one of the logs is named twice")
    logs = dict(zip(name_curves(args.logs), map(read_log, args.logs), strict=True))
    for path, curves in zip(args.logs, logs.values(), strict=True):
        if not curves:
            parser.error(f"{path} holds no training log: was it written with --log-format simple?")
    if not any(name in curves for curves in logs.values() for name in PANELS):
        parser.error(f"the logs hold none of {', '.join(PANELS)}: was it --criterion soft_beam?")
    draw(logs, args.out)


if __name__ == "__main__":
    main()
