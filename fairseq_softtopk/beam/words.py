"""From pieces of words, such as BPE's, to words that can be compared, on the device that they are on."""

from __future__ import annotations

import unicodedata

import torch
from torch import Tensor, nn

JOINED = ("subword_nmt", "sentencepiece")
POST_PROCESSES = ("auto", "none", *JOINED)
COMMON = 0.01  # share of a dictionary's symbols that makes a kind of it; a few may look like it by chance
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")  # scripts

BASE = 0x9E3779B97F4A7C15  # odd: of the polynomials over characters, modulo 2^64


class WordJoiner(nn.Module):
    """Joins pieces to words, as fairseq's ``--post-process`` does with text; equal words have equal numbers.

    A word of characters ``c_0 c_1 ...`` is the number ``sum_i ord(c_i) BASE^i`` modulo 2^64, whichever pieces
    it is made of.  The token -1, which no other equals, makes a word that no other equals, and is joined to
    others like a piece without a mark.  A "▁" before the start of a word is an empty word.

    Args:
        symbols: text of each token.
        post_process: ``"subword_nmt"``: ``@@`` at the end of a piece joins the next to it;
            ``"sentencepiece"``: ``▁`` at its start begins a word.

    Raises:
        ValueError: if ``post_process`` is unknown, or no symbol has its mark.
    """

    def __init__(self, symbols: list[str], post_process: str) -> None:
        super().__init__()
        if post_process == "subword_nmt":
            continued = [symbol.endswith("@@") for symbol in symbols]
            continues = [False] * len(symbols)
            texts = [symbol.removesuffix("@@") for symbol in symbols]
            if not any(continued):
                raise ValueError('post_process "subword_nmt": no symbol of the dictionary ends with "@@"')
        elif post_process == "sentencepiece":
            continued = [False] * len(symbols)
            continues = [not symbol.startswith("▁") for symbol in symbols]
            texts = [symbol.removeprefix("▁") for symbol in symbols]
            if all(continues):
                raise ValueError('post_process "sentencepiece": no symbol of the dictionary starts with "▁"')
        else:
            raise ValueError(f"post_process must be one of {', '.join(JOINED)}, got {post_process!r}")
        # The last entry is that of -1, a "character" that is none.
        numbers = [sum(ord(c) * BASE**i for i, c in enumerate(text)) for text in texts] + [-1]
        self.register_buffer("numbers", torch.tensor([_signed(n) for n in numbers]), persistent=False)
        self.register_buffer("chars", torch.tensor([len(text) for text in texts] + [1]), persistent=False)
        self.register_buffer("continued", torch.tensor([*continued, False]), persistent=False)
        self.register_buffer(
            "continues", torch.tensor([*continues, post_process == "sentencepiece"]), persistent=False
        )
        self.numbers: Tensor
        self.chars: Tensor
        self.continued: Tensor
        self.continues: Tensor

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Words and their number.

        Args:
            tokens: (..., S), from -1 to V - 1.
            lengths: (...), how many tokens count.

        Returns:
            (..., S), the words, zeros after them; (...), how many there are.
        """
        inside = torch.arange(tokens.size(-1), device=tokens.device) < lengths.unsqueeze(-1)
        joined = self.continues[tokens]
        joined[..., 1:] |= self.continued[tokens[..., :-1]]
        joined[..., :1] = False
        starts = inside & ~joined
        chars = torch.where(inside, self.chars[tokens], 0)
        before = chars.cumsum(-1) - chars  # characters before a piece, in the sentence
        before = before - torch.where(starts, before, 0).cummax(-1).values  # and in its word
        powers = torch.full_like(before, _signed(BASE)) ** before
        parts = torch.where(inside, self.numbers[tokens] * powers, 0)
        which = (starts.cumsum(-1) - 1).clamp(min=0)
        return torch.zeros_like(tokens).scatter_add(-1, which, parts), starts.sum(-1)


def find_post_process(symbols: list[str]) -> str:
    """What the pieces of a dictionary are: the one of ``JOINED`` whose mark more symbols have, or ``"none"``.

    A mark that fewer than one symbol in a hundred has is none: such a dictionary has whole words, or pieces of
    another kind.  If as many are of a script without spaces between words, it is ``"none"``, too: what lies
    between two spaces may be a whole sentence, whose BLEU is 0 unless all of it is right.
    """
    enough = max(COMMON * len(symbols), 1)
    if sum(map(_is_without_spaces, symbols)) >= enough:
        return "none"
    marked = {
        "subword_nmt": sum(symbol.endswith("@@") for symbol in symbols),
        "sentencepiece": sum(symbol.startswith("▁") for symbol in symbols),
    }
    found = max(JOINED, key=marked.__getitem__)
    return found if marked[found] >= enough else "none"


def _is_without_spaces(symbol: str) -> bool:
    return any(unicodedata.name(char, "").startswith(WITHOUT_SPACES) for char in symbol)


def _signed(number: int) -> int:
    """An integer modulo 2^64 as a signed one."""
    return (number + 2**63) % 2**64 - 2**63
