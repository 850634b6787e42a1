"""The text steps of the translation recipes, each of which reads its files line by line.

- ``python text.py hold-out RAW OUT SRC TGT PAIRS WORDS`` takes PAIRS sentence pairs for validation and as many
  for the test set out of ``RAW/train.*``, evenly spaced, of 1 to WORDS words, and leaves the others for
  training;
- ``python text.py tokens IN OUT SRC TGT [filters]`` tokenises ``IN.SRC`` and ``IN.TGT`` into ``OUT.SRC`` and
  ``OUT.TGT`` and, with filters, leaves out pairs that are too long, too unlike in length, empty, or of which a
  sentence is in one of the held-out sets;
- ``python text.py check FILE NAME WORDS`` ends with NAME and the line where a file is not UTF-8, or a line has
  more than so many words;
- ``python text.py detokenize LANGUAGE`` and ``python text.py pieces MODEL`` (SentencePiece) filter lines.

XML entities that a Moses tokeniser has left (``&apos;``, ``&#91;``) are turned back into what they stand for.
The punctuation of the source is normalised. That of the target is not, because references are scored as they
are: only a typographic apostrophe becomes the plain one, which is the only one that the tokeniser splits at.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import IO

from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

SPLITS = ("train", "valid", "test")


class TextError(ValueError):
    """What is wrong with a file, in one line."""


def read_lines(file: IO[bytes], name: Path | str) -> Iterator[str]:
    """The lines of a file in UTF-8, without their ends; a line ends with a newline and nothing else.

    Raises:
        TextError: naming file and line, where it is not UTF-8.
    """
    for number, line in enumerate(file, 1):
        try:
            yield line.decode().strip()
        except UnicodeDecodeError as error:
            raise TextError(f"{name}, line {number} is not UTF-8: {error.reason}") from error


def read_file(path: Path) -> Iterator[str]:
    """The lines of a file, see :func:`read_lines`."""
    with path.open("rb") as file:
        yield from read_lines(file, path)


def read_pairs(prefix: Path, src: str, tgt: str) -> Iterator[tuple[str, str]]:
    """The sentence pairs of ``prefix.src`` and ``prefix.tgt``.

    Raises:
        TextError: if one has more lines than the other.
    """
    paths = [prefix.with_name(f"{prefix.name}.{language}") for language in (src, tgt)]
    with paths[0].open("rb") as source_file, paths[1].open("rb") as target_file:
        sources, targets = read_lines(source_file, paths[0]), read_lines(target_file, paths[1])
        for number, (source, target) in enumerate(zip_longest(sources, targets), 1):
            if source is None or target is None:
                short, long = paths if source is None else paths[::-1]
                raise TextError(f"{short} ends before line {number}, {long} goes on: they must be parallel")
            yield source, target


def open_pair(stack: ExitStack, prefix: Path, src: str, tgt: str) -> list[IO[str]]:
    """The two files of a split, for writing."""
    return [
        stack.enter_context(
            prefix.with_name(f"{prefix.name}.{language}").open("w", encoding="utf-8", newline="")
        )
        for language in (src, tgt)
    ]


def write_pair(files: Iterable[IO[str]], pair: Iterable[str]) -> None:
    """A line for each language."""
    for file, sentence in zip(files, pair, strict=True):
        file.write(f"{sentence}\n")


# ---------------------------------------------------------------------------------------------- steps


def check(path: Path, name: str, words: int) -> None:
    """Raises ``TextError`` where a line is not UTF-8 or has more words; the user calls the file ``name``."""
    with path.open("rb") as file:
        for number, line in enumerate(read_lines(file, name), 1):
            if words and len(line.split()) > words:
                raise TextError(f"{name}, line {number} has {len(line.split())} words, more than {words}")


def hold_out(raw: Path, out: Path, src: str, tgt: str, pairs: int, words: int) -> None:
    """Splits ``raw/train`` into ``out/train``, ``out/valid`` and ``out/test``."""

    def usable(pair: Iterable[str]) -> bool:
        return all(0 < len(sentence.split()) <= words for sentence in pair)

    total = sum(usable(pair) for pair in read_pairs(raw / "train", src, tgt))
    if total < 4 * pairs:
        raise TextError(
            f"{raw / 'train'}.* has {total} pairs of 1 to {words} words, too few to hold out {2 * pairs}"
        )
    every, seen, taken = total // (2 * pairs), 0, 0
    with ExitStack() as stack:
        files = {split: open_pair(stack, out / split, src, tgt) for split in SPLITS}
        for pair in read_pairs(raw / "train", src, tgt):
            split = "train"
            if usable(pair):
                if seen % every == 0 and taken < 2 * pairs:
                    split = "valid" if taken % 2 == 0 else "test"
                    taken += 1
                seen += 1
            write_pair(files[split], pair)


class Tokens:
    """Moses tokens of sentences of a language.

    Args:
        normalize: their punctuation, too.
        aggressive: split hyphens.
    """

    def __init__(self, language: str, normalize: bool, aggressive: bool) -> None:
        self.normalizer = MosesPunctNormalizer(language) if normalize else None
        self.tokenizer = MosesTokenizer(language)
        self.unescape = MosesDetokenizer(language).unescape_xml
        self.aggressive = aggressive

    def __call__(self, sentence: str) -> str:
        """Tokens with spaces between them, entities resolved."""
        text = self.unescape(sentence).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        tokens: str = self.tokenizer.tokenize(
            self.normalizer.normalize(text) if self.normalizer else text,
            aggressive_dash_splits=self.aggressive,
            escape=False,
            return_str=True,
        )
        return tokens


def tokens(args: argparse.Namespace) -> Counter[str]:
    """Tokenises a split and counts what it kept and what it left out, and why."""
    counts: Counter[str] = Counter(kept=0)
    if args.pieces:  # SentencePiece finds its own tokens
        languages = [MosesDetokenizer(language).unescape_xml for language in (args.src, args.tgt)]
    else:
        languages = [
            Tokens(args.src, normalize=True, aggressive=args.aggressive),
            Tokens(args.tgt, normalize=False, aggressive=args.aggressive),
        ]
    held_out = {key(sentence) for path in args.not_in for sentence in read_file(path)} - {""}
    with ExitStack() as stack:
        files = open_pair(stack, args.output, args.src, args.tgt)
        for pair in read_pairs(args.input, args.src, args.tgt):
            # A line of thousands of words is not worth a tokeniser's time.
            longest = max(len(sentence.split()) for sentence in pair)
            if args.max_tokens and longest > 2 * args.max_tokens:
                counts["too long"] += 1
                continue
            tokenized = [split(sentence) for split, sentence in zip(languages, pair, strict=True)]
            if args.lower:
                tokenized = [sentence.lower() for sentence in tokenized]
            reason = why_not([len(sentence.split()) for sentence in tokenized], args.max_tokens, args.max_ratio)
            if reason is None and held_out and any(key(sentence) in held_out for sentence in tokenized):
                reason = "held out"
            if reason is None:
                write_pair(files, pair if args.as_they_are else tokenized)
            counts[reason or "kept"] += 1
    return counts


def why_not(lengths: list[int], max_tokens: int, max_ratio: float) -> str | None:
    """Why a pair of these lengths is left out, if it is; without a limit on tokens none is."""
    if not max_tokens:
        return None
    if min(lengths) == 0:
        return "empty"
    if max(lengths) > max_tokens:
        return "too long"
    if max(lengths) > max_ratio * min(lengths):
        return "lengths too unlike"
    return None


def key(sentence: str) -> str:
    """What makes two sentences the same: not their spaces, nor upper case."""
    return "".join(sentence.split()).lower()


def detokenize(language: str) -> None:
    """Tokens on standard input to text on standard output, entities resolved."""
    detokenizer = MosesDetokenizer(language)
    for line in read_lines(sys.stdin.buffer, "standard input"):
        sys.stdout.buffer.write(f"{detokenizer.detokenize(line.split(), unescape=True)}\n".encode())


def pieces(model: Path) -> None:
    """Text on standard input to SentencePiece's pieces on standard output."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(
            (" ".join(processor.encode(line.decode().strip(), out_type=str)) + "\n").encode()
        )


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("hold-out")
    for name in ("raw", "out"):
        command.add_argument(name, type=Path)
    for name in ("src", "tgt"):
        command.add_argument(name)
    for name in ("pairs", "words"):
        command.add_argument(name, type=int)
    command = commands.add_parser("tokens")
    for name in ("input", "output"):
        command.add_argument(name, type=Path)
    for name in ("src", "tgt"):
        command.add_argument(name)
    command.add_argument("--aggressive", action="store_true", help="split hyphens, as the paper does")
    command.add_argument("--lower", action="store_true", help="lower-case")
    command.add_argument("--pieces", action="store_true", help="leave tokens to SentencePiece")
    command.add_argument(
        "--max-tokens", type=int, default=0, help="of either sentence (default: 0, no filters)"
    )
    command.add_argument("--max-ratio", type=float, default=1.5, help="between the two lengths (default: 1.5)")
    command.add_argument("--as-they-are", action="store_true", help="write what is kept without changing it")
    command.add_argument("--not-in", type=Path, nargs="*", default=[], help="tokens of held-out sentences")
    command = commands.add_parser("check")
    command.add_argument("file", type=Path)
    command.add_argument("name", help="what the user calls the file")
    command.add_argument("words", type=int, help="of a line, at most; 0 for any number")
    command = commands.add_parser("detokenize")
    command.add_argument("language")
    command = commands.add_parser("pieces")
    command.add_argument("model", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "hold-out":
            hold_out(args.raw, args.out, args.src, args.tgt, args.pairs, args.words)
        elif args.command == "tokens":
            counts = tokens(args)
            print("\n".join(f"{number}\t{what}" for what, number in counts.items()))
        elif args.command == "check":
            check(args.file, args.name, args.words)
        elif args.command == "detokenize":
            detokenize(args.language)
        else:
            pieces(args.model)
    except (TextError, OSError) as error:
        parser.exit(1, f"text.py: {error}\n")


if __name__ == "__main__":
    main()
