"""Prints a Markdown table of scores: ``python scripts/score_table.py FOLDER...``, one row a folder.

A folder holds ``scores.json``, what ``sacrebleu -m bleu chrf`` printed, and ``seconds``, how long its
training took, one line for each time it was started.  Its name is the system's.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any


def read_row(folder: Path) -> tuple[list[str], list[str]]:
    """The cells of a system, and the signatures of its scores."""
    bleu, chrf = _by_name(folder / "scores.json")
    penalty = re.search(r"BP = ([\d.]+)", bleu["verbose_score"])
    if penalty is None:
        raise SystemExit(f"score_table.py: no brevity penalty in {folder / 'scores.json'}")
    seconds = sum(map(int, (folder / "seconds").read_text().split()))
    cells = [folder.name, f"{bleu['score']:.1f}", penalty[1], f"{chrf['score']:.1f}", str(seconds)]
    return cells, [f"{score['name']}|{score['signature']}" for score in (bleu, chrf)]


def _by_name(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    scores = {score["name"].lower(): score for score in json.loads(path.read_text())}
    return scores["bleu"], scores["chrf2"]


def main() -> None:
    """Reads the folders and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders
    for folder in folders:
        for name in ("scores.json", "seconds"):
            if not (folder / name).is_file():
                parser.error(f"{folder / name} is missing")
    rows, signatures = zip(*map(read_row, folders), strict=True)
    if len({tuple(signature) for signature in signatures}) > 1:
        parser.error("the systems were scored differently: their signatures differ")
    print("| system | BLEU | brevity penalty | chrF | training, seconds |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print("\n" + "\n".join(signatures[0]))


if __name__ == "__main__":
    main()
