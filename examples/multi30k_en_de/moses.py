"""Moses tokens of lines: ``python moses.py tokenize en < text``, ``python moses.py detokenize de < tokens``.

``tokenize`` is what Moses' ``tokenizer.perl -a -no-escape`` and ``lowercase.perl`` do: hyphens are split,
``&`` and ``|`` stay what they are (the ``sacremoses`` command always escapes them), letters are lower-cased.
"""

from __future__ import annotations

import argparse
import sys

from sacremoses import MosesDetokenizer, MosesTokenizer


def main() -> None:
    """Reads lines, writes as many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("tokenize", "detokenize"))
    parser.add_argument("language")
    args = parser.parse_args()
    tokenizer, detokenizer = MosesTokenizer(args.language), MosesDetokenizer(args.language)
    for line in sys.stdin.buffer:  # a line ends with \n and nothing else
        text = line.decode().strip()
        if args.direction == "tokenize":
            text = tokenizer.tokenize(text, aggressive_dash_splits=True, escape=False, return_str=True).lower()
        else:
            text = detokenizer.detokenize(text.split(), unescape=False)
        sys.stdout.buffer.write(f"{text}\n".encode())


if __name__ == "__main__":
    main()
