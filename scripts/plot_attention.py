"""Draws where models look while they translate a sentence: a heat map for each.

``python scripts/plot_attention.py DATA_BIN CHECKPOINT... --sentence "..." --out PNG``

The sentence is raw text, which is tokenised (Moses) and, with ``--bpe-codes``, split (subword-nmt) as for
training, with ``--no-escape`` if that was; or, with ``--tokenized``, what the tokeniser of the training data
has made of it.  A token that the dictionary does not have is marked: the model sees ``<unk>`` in its place.  A
panel's title is the checkpoint's folder and its relaxation; a Transformer shows the mean of the heads in its
last layer.
"""

from __future__ import annotations

import argparse
import logging
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch


class Translation(NamedTuple):
    """What a model wrote, and what it looked at.

    Attributes:
        title: of its panel.
        source: tokens, eos included.
        target: likewise.
        attention: (target, source) weights.
    """

    title: str
    source: list[str]
    target: list[str]
    attention: torch.Tensor


def split(
    sentence: str, language: str, codes: Path | None, tokenized: bool, escape: bool, lowercase: bool
) -> str:
    """The tokens of a sentence, with spaces between them."""
    from fairseq.data import encoders

    if not tokenized:
        moses = {"tokenizer": "moses", "moses_no_escape": not escape}
        tokenizer = encoders.build_tokenizer(Namespace(source_lang=language, target_lang=language, **moses))
        sentence = tokenizer.encode(sentence)
    if lowercase:  # after Moses, which looks at capitals
        sentence = sentence.lower()
    if codes is not None:
        bpe = encoders.build_bpe(Namespace(bpe="subword_nmt", bpe_codes=str(codes), bpe_separator="@@"))
        sentence = bpe.encode(sentence)
    return sentence


def translate(
    checkpoint: Path,
    data: Path,
    sentence: str,
    codes: Path | None = None,
    tokenized: bool = False,
    escape: bool = True,
    lowercase: bool = False,
) -> Translation:
    """The best hypothesis of a beam search with 5 beams."""
    from fairseq import checkpoint_utils

    import fairseq_softtopk.plugin  # noqa: F401  the architectures

    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], {"data": str(data)})
    language = cfg.task.source_lang or task.cfg.source_lang
    line = split(sentence, language, codes, tokenized, escape, lowercase)
    symbols = task.source_dictionary
    source = symbols.encode_line(line, add_if_not_exist=False).long()
    models[0].eval()
    batch = {"net_input": {"src_tokens": source[None], "src_lengths": torch.tensor([len(source)])}}
    best = task.build_generator(models, Namespace(beam=5)).generate(models, batch)[0][0]

    tokens = [token if token in symbols else f"{token} {symbols.unk_word}" for token in line.split()]
    relaxation = getattr(cfg.model, "attention_relaxation", "softmax")
    return Translation(
        f"{'/'.join(checkpoint.resolve().parts[-3:-1])}: {getattr(relaxation, 'value', relaxation)}",
        [*tokens, symbols.eos_word],
        [task.target_dictionary[token] for token in best["tokens"]],
        best["attention"].detach().T,
    )


def draw(translations: list[Translation], out: Path) -> None:
    """For each, a grid of target tokens (down) against source tokens (across)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    longest = max(len(translation.target) for translation in translations)
    width = sum(1.5 + 0.42 * len(translation.source) for translation in translations)
    figure, axes = plt.subplots(
        1, len(translations), figsize=(width, 1.6 + 0.32 * longest), squeeze=False, layout="constrained"
    )
    for axis, (title, source, target, attention) in zip(axes[0], translations, strict=True):
        image = axis.imshow(attention, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(source)), source, rotation=60, ha="left", parse_math=False)
        axis.set_yticks(range(len(target)), target, parse_math=False)
        axis.xaxis.tick_top()
        axis.set_title(title, parse_math=False)
        axis.set(xlabel="source", ylabel="translation")
    figure.colorbar(image, ax=axes, label="attention weight")
    figure.savefig(out, dpi=120)


def main() -> None:
    """Translates the sentence with every model and draws their attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_BIN", help="folder with the dictionaries")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--sentence", required=True, help="source text")
    parser.add_argument("--tokenized", action="store_true", help="the sentence is in tokens already")
    parser.add_argument("--no-escape", action="store_true", help="as the data: & stays &, ' is not &apos;")
    parser.add_argument("--lowercase", action="store_true", help="as the training data was")
    parser.add_argument("--bpe-codes", type=Path, metavar="CODES", help="of the data's BPE, if it has one")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    for path in (args.data, *args.checkpoints, args.bpe_codes):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    if not args.sentence.strip():
        parser.error("--sentence is empty")
    logging.disable(logging.INFO)  # fairseq has hydra turn on everybody's debug messages
    settings = args.sentence, args.bpe_codes, args.tokenized, not args.no_escape, args.lowercase
    draw([translate(path, args.data, *settings) for path in args.checkpoints], args.out)


if __name__ == "__main__":
    main()
