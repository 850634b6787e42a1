"""Reads the scores of the recipe's models.

``python table.py choose FOLDER`` prints the length penalty with the best validation BLEU of a model, the
smallest if several are equal.  ``python table.py write FOLDER`` writes into the folder of an experiment
``results.tsv``, a row for each system and seed, and ``results.md``, a row for each system, with the difference
from the control of the same seed, and prints the latter.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple


class Bleu(NamedTuple):
    """What sacreBLEU says of a translation."""

    score: float
    precisions: list[str]  # of n-grams, n = 1 ... 4, in percent
    brevity_penalty: float
    signature: str


class Row(NamedTuple):
    """A line of ``results.tsv``; what is not known is empty."""

    system: str
    seed: int
    updates: int
    hours: float
    lenpen: str
    valid_bleu: float
    valid_bp_at_lenpen_1: float | None
    valid_bp: float
    test_bleu: float
    test_bleu_at_lenpen_1: float
    test_bp: float
    test_precisions: str
    test_detok_bleu: float
    above_control: float | None
    p_value: float | None
    above_control_at_lenpen_1: float | None
    p_value_at_lenpen_1: float | None
    commit: str


# ---------------------------------------------------------------------------------------- reading


def read_bleu(path: Path) -> Bleu:
    """Reads what ``sacrebleu`` wrote."""
    score = json.loads(path.read_text())
    found = re.match(r"([\d.]+(?:/[\d.]+){3}) \(BP = ([\d.]+)", score["verbose_score"])
    if found is None:
        raise SystemExit(f"table.py: no n-gram precisions and brevity penalty in {path}")
    return Bleu(score["score"], found[1].split("/"), float(found[2]), f"BLEU|{score['signature']}")


def read_valid(folder: Path) -> dict[str, Bleu]:
    """The validation scores of a model, by length penalty, the smallest first."""
    suffix = ".txt.bleu.json"
    scores = {
        path.name.removeprefix("valid-").removesuffix(suffix): read_bleu(path)
        for path in folder.glob(f"valid-*{suffix}")
    }
    if not scores:
        raise SystemExit(f"table.py: {folder} has no valid-LENPEN{suffix}")
    return dict(sorted(scores.items(), key=lambda item: float(item[0])))


def choose(folder: Path) -> str:
    """The length penalty with the best validation BLEU."""
    valid = read_valid(folder)
    return max(valid, key=lambda lenpen: valid[lenpen].score)


def count_updates(folder: Path) -> int:
    """The last number of updates in the training log."""
    return max(map(int, re.findall(r"num_updates[= ](\d+)", (folder / "train.log").read_text())))


def read_paired(path: Path) -> tuple[float, float] | tuple[None, None]:
    """How far a system is above the control, and p, of a paired bootstrap test; None where none was made."""
    if not path.exists():
        return None, None
    control, system = (row["BLEU"] for row in json.loads(path.read_text()))
    return system["score"] - control["score"], system["p_value"]


def read_row(folder: Path, models: Path) -> Row:
    """Gathers what is known of a model that has been scored."""
    system, _, seed = str(folder.relative_to(models)).partition("/seed")
    lenpen = (folder / "lenpen").read_text().strip()
    valid, test = read_valid(folder), read_bleu(folder / "test.txt.bleu.json")
    above_control, p_value = read_paired(folder / "test.paired.json")
    above_control_at_lenpen_1, p_value_at_lenpen_1 = read_paired(folder / "test-1.paired.json")
    return Row(
        system=system,
        seed=int(seed or 1),
        updates=count_updates(folder),
        hours=sum(map(int, (folder / "seconds").read_text().split())) / 3600,
        lenpen=lenpen,
        valid_bleu=valid[lenpen].score,
        valid_bp_at_lenpen_1=valid["1"].brevity_penalty if "1" in valid else None,
        valid_bp=valid[lenpen].brevity_penalty,
        test_bleu=test.score,
        test_bleu_at_lenpen_1=read_bleu(folder / "test-1.txt.bleu.json").score,
        test_bp=test.brevity_penalty,
        test_precisions="/".join(test.precisions),
        test_detok_bleu=read_bleu(folder / "test.txt.detok.json").score,
        above_control=above_control,
        p_value=p_value,
        above_control_at_lenpen_1=above_control_at_lenpen_1,
        p_value_at_lenpen_1=p_value_at_lenpen_1,
        commit=(folder / "commit").read_text().strip(),
    )


def read_rows(models: Path, control: str) -> tuple[list[Row], list[str]]:
    """All models that are finished, in the order of the table, and the signatures of their test scores."""
    folders = [path.parent for path in models.rglob("test-1.txt.bleu.json")]  # the last that evaluate.sh writes
    if not folders:
        raise SystemExit(f"table.py: nothing in {models} has been scored on the test set")
    for path in sorted(models.rglob("options")):
        if path.parent not in folders:
            print(f"table.py: {path.parent.relative_to(models)} is not finished: left out", file=sys.stderr)
    signatures = []
    for kind in ("bleu", "detok"):
        found = {read_bleu(folder / f"test.txt.{kind}.json").signature for folder in folders}
        if len(found) > 1:
            raise SystemExit(f"table.py: the systems were scored differently: {', '.join(sorted(found))}")
        signatures += found
    rows = [read_row(folder, models) for folder in folders]
    first = ("pretrained", control)
    return sorted(
        rows, key=lambda row: (row.system not in first, row.system != "pretrained", row.system, row.seed)
    ), signatures


# ---------------------------------------------------------------------------------------- writing


def write_tsv(rows: list[Row], path: Path) -> None:
    """Writes a line for each row."""
    digits = {"hours": 3, "p_value": 4, "p_value_at_lenpen_1": 4}
    digits |= dict.fromkeys(("valid_bp_at_lenpen_1", "valid_bp", "test_bp"), 3)
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(Row._fields)
        for row in rows:
            table.writerow(
                f"{value:.{digits.get(name, 2)}f}" if isinstance(value, float) else value
                for name, value in row._asdict().items()
            )


HEADER = (
    "system", "seeds", "updates", "length penalty", "validation BLEU",
    "test BLEU", "above {control}", "p",
    "test BLEU at length penalty 1", "above {control}", "p",
    "brevity penalty", "validation's at length penalty 1",
    "1- to 4-gram precision", "detokenised BLEU", "hours",
)  # fmt: skip


NOTES = """\
Mean (lowest to highest) over seeds. The length penalty, by seed, is the one with the best validation BLEU.
Brevity penalty: of the test set, and of the validation set at length penalty 1. Above {control}: test BLEU less
that of {control} with the same seed and the same way to a length penalty; p: of a paired bootstrap test between
the two, by seed."""


def cells(rows: list[Row]) -> list[str]:
    """The row of a system in the Markdown table."""
    precisions = zip(*(map(float, row.test_precisions.split("/")) for row in rows), strict=True)
    return [
        rows[0].system,
        " ".join(str(row.seed) for row in rows),
        " ".join(sorted({str(row.updates) for row in rows})),
        " ".join(row.lenpen for row in rows),
        spread(row.valid_bleu for row in rows),
        spread(row.test_bleu for row in rows),
        spread((row.above_control for row in rows), sign="+"),
        by_seed(row.p_value for row in rows),
        spread(row.test_bleu_at_lenpen_1 for row in rows),
        spread((row.above_control_at_lenpen_1 for row in rows), sign="+"),
        by_seed(row.p_value_at_lenpen_1 for row in rows),
        spread((row.test_bp for row in rows), 3),
        spread((row.valid_bp_at_lenpen_1 for row in rows), 3),
        "/".join(f"{mean(column):.1f}" for column in precisions),
        spread(row.test_detok_bleu for row in rows),
        spread((row.hours for row in rows), 2),
    ]


def by_seed(values: Iterable[float | None]) -> str:
    """Every value, - where one is not known; nothing if none is."""
    shown = ["-" if value is None else f"{value:.3f}" for value in values]
    return "" if set(shown) == {"-"} else " ".join(shown)


def spread(values: Iterable[float | None], digits: int = 2, sign: str = "") -> str:
    """Mean, lowest and highest of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    lowest, middle, highest = (f"{value:{sign}.{digits}f}" for value in (min(known), mean(known), max(known)))
    return middle if len(known) == 1 else f"{middle} ({lowest} to {highest})"


def markdown(rows: list[Row], signatures: list[str], control: str) -> str:
    """The table, one row a system, and what its numbers are."""
    header = [name.format(control=control) for name in HEADER]
    systems = list(dict.fromkeys(row.system for row in rows))
    table = [cells([row for row in rows if row.system == name]) for name in systems]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "sacrebleu")]
    return "\n".join(
        [
            *("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *table)),
            "",
            NOTES.format(control=control),
            "",
            *(f"`{signature}`" for signature in signatures),
            "",
            f"Commit {', '.join(sorted({row.commit for row in rows}))}; tabulated with {', '.join(versions)}.",
        ]
    )


def main() -> None:
    """Chooses a length penalty, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("choose", "write"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--control", default="control", help="system that the others are compared with")
    args = parser.parse_args()
    if args.command == "choose":
        print(choose(args.folder))
        return
    rows, signatures = read_rows(args.folder, args.control)
    write_tsv(rows, args.folder / "results.tsv")
    text = markdown(rows, signatures, args.control)
    (args.folder / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
