"""Draws where a model looks while it translates a sentence, as a heat map.

``python scripts/plot_attention.py CHECKPOINT DATA_BIN --bpe-codes CODES --sentence "..." --out PNG``

The sentence is raw text: it is tokenised (Moses) and split (subword-nmt) as for training.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch


def translate(
    checkpoint: str, data: str, codes: str, sentence: str
) -> tuple[list[str], list[str], torch.Tensor]:
    """Source tokens, tokens of the best hypothesis, and the attention between them (target x source)."""
    from argparse import Namespace

    from fairseq import checkpoint_utils
    from fairseq.data import encoders
    from fairseq.utils import import_user_module

    import_user_module(Namespace(user_dir="fairseq_softtopk"))
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], {"data": data})
    languages = cfg.task.source_lang, cfg.task.target_lang
    if None in languages:
        languages = task.cfg.source_lang, task.cfg.target_lang
    tokenizer = encoders.build_tokenizer(
        Namespace(tokenizer="moses", source_lang=languages[0], target_lang=languages[1])
    )
    bpe = encoders.build_bpe(Namespace(bpe="subword_nmt", bpe_codes=codes, bpe_separator="@@"))
    source = task.source_dictionary.encode_line(
        bpe.encode(tokenizer.encode(sentence)), add_if_not_exist=False
    ).long()
    models[0].eval()
    batch = {"net_input": {"src_tokens": source[None], "src_lengths": torch.tensor([len(source)])}}
    best = task.build_generator(models, Namespace(beam=5)).generate(models, batch)[0][0]

    def words(dictionary: Any, tokens: torch.Tensor) -> list[str]:
        return [dictionary[token] for token in tokens]

    return (
        words(task.source_dictionary, source),
        words(task.target_dictionary, best["tokens"]),
        best["attention"].detach().T,
    )


def draw(source: list[str], target: list[str], attention: torch.Tensor, out: Path) -> None:
    """A grid of target tokens (down) against source tokens (across)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(1.5 + 0.42 * len(source), 1.2 + 0.32 * len(target)))
    image = axis.imshow(attention, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(source)), source, rotation=60, ha="left")
    axis.set_yticks(range(len(target)), target)
    axis.xaxis.tick_top()
    axis.set(xlabel="source", ylabel="translation")
    figure.colorbar(image, label="attention weight")
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Translates the sentence and draws its attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("data", type=Path, metavar="DATA_BIN", help="folder with the dictionaries")
    parser.add_argument("--bpe-codes", type=Path, required=True, metavar="CODES")
    parser.add_argument("--sentence", required=True, help="raw source text")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    for path in (args.checkpoint, args.data, args.bpe_codes):
        if not path.exists():
            parser.error(f"{path} does not exist")
    if not args.sentence.strip():
        parser.error("--sentence is empty")
    logging.disable(logging.INFO)  # fairseq has hydra turn on everybody's debug messages
    drawn = translate(str(args.checkpoint), str(args.data), str(args.bpe_codes), args.sentence)
    draw(*drawn, args.out)


if __name__ == "__main__":
    main()
