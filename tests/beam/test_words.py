import random

import pytest
import torch
from fairseq.data.data_utils import post_process

from fairseq_softtopk.beam.words import WordJoiner, find_post_process

SYMBOLS = {
    "subword_nmt": ["<s>", "<unk>", "a", "b@@", "a@@", "ab", "b", "@@", "ab@@"],
    "sentencepiece": ["<s>", "<unk>", "▁a", "b", "a", "▁ab", "▁b", "ab", "▁"],
}


@pytest.mark.parametrize("scheme", SYMBOLS)
def test_words_are_equal_where_those_of_fairseqs_text_are(scheme):
    """Also where they are made of different pieces."""
    symbols, chance = SYMBOLS[scheme], random.Random(1)
    joiner = WordJoiner(symbols, scheme)
    number_of: dict[str, int] = {}
    for _ in range(1000):
        lengths = [chance.randint(0, 9) for _ in range(3)]
        tokens = torch.randint(0, len(symbols) - (scheme == "sentencepiece"), (3, 9))  # without empty words
        words, counts = joiner(tokens, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            text = " ".join(symbols[token] for token in tokens[row, :length])
            expected = [word for word in post_process(text, scheme).split(" ") if word]
            own = [
                word for word in words[row, : counts[row]].tolist() if word
            ]  # "@@" alone may be an empty one
            assert len(own) == len(expected)
            for number, word in zip(own, expected, strict=True):
                assert number_of.setdefault(word, number) == number
    assert len(set(number_of.values())) == len(number_of) > 100


def test_what_no_token_equals_makes_a_word_that_no_word_equals():
    joiner = WordJoiner(["a@@", "b"], "subword_nmt")
    words, counts = joiner(torch.tensor([[[0, -1, 1], [0, 1, 1]]]), torch.tensor([[3, 3]]))
    assert counts.tolist() == [[2, 2]]
    assert words[0, 0, 0] not in words[0, 1] and words[0, 0, 1] == words[0, 1, 1]


def test_an_unknown_piece_is_joined_like_others_where_only_the_start_of_a_word_is_marked():
    """As in the text that fairseq makes of the pieces, where <unk> has no mark."""
    symbols = ["▁na", "▁cat", "ve", "▁", "<unk>"]
    joiner = WordJoiner(symbols, "sentencepiece")
    tokens = torch.tensor([[0, 4, 2, 1], [1, 3, 4, 1], [4, 2, 1, 1]])
    words, counts = joiner(tokens.masked_fill(tokens == 4, -1), torch.full((3,), 4))
    texts = (" ".join(symbols[token] for token in row) for row in tokens.tolist())
    assert counts.tolist() == [len(post_process(text, "sentencepiece").split()) for text in texts]
    unknown = {words[0, 0].item(), words[1, 1].item(), words[2, 0].item()}
    assert len(unknown) == 3 and not unknown & set(joiner(torch.tensor([0, 2, 1]), torch.tensor(3))[0].tolist())


def test_long_words_do_not_overflow_into_others():
    joiner = WordJoiner(["ab@@", "ba@@", "a"], "subword_nmt")
    tokens = torch.randint(0, 2, (400, 300))
    words, counts = joiner(tokens, torch.full((400,), 300))
    assert counts.eq(1).all() and len(words[:, 0].unique()) == 400


def test_no_tokens():
    words, counts = WordJoiner(["a@@"], "subword_nmt")(
        torch.zeros(2, 0, dtype=torch.long), torch.zeros(2).long()
    )
    assert words.shape == (2, 0) and counts.tolist() == [0, 0]


@pytest.mark.parametrize("scheme", SYMBOLS)
def test_the_mark_that_most_pieces_have_is_found(scheme):
    other = {"subword_nmt": "▁", "sentencepiece": "a@@"}[scheme]
    assert find_post_process([*SYMBOLS[scheme], other]) == scheme


def test_words_that_look_like_pieces_by_chance_do_not_make_pieces():
    words = [f"word{i}" for i in range(998)]
    assert find_post_process([*words, "@@", "▁"]) == find_post_process(words) == "none"
    assert find_post_process([]) == "none"


@pytest.mark.parametrize("text", ["今天", "ひらがな", "カタカナ", "ภาษาไทย"])
@pytest.mark.parametrize("scheme", SYMBOLS)
def test_pieces_of_scripts_without_spaces_are_not_joined_to_sentences(scheme, text):
    spaced = [f"▁{word}" if scheme == "sentencepiece" else f"{word}@@" for word in ("한국어", "слово", "λέξη")]
    assert find_post_process([*SYMBOLS[scheme], *spaced]) == scheme
    assert find_post_process([*SYMBOLS[scheme], *spaced, text]) == "none"
    assert find_post_process([*spaced * 100, text]) == scheme


def test_unknown_scheme():
    with pytest.raises(
        ValueError, match="post_process must be one of subword_nmt, sentencepiece, got 'letter'"
    ):
        WordJoiner(["a"], "letter")
