import math
import random

import naive_soft_beam
import pytest
import sacrebleu
import torch

from fairseq_softtopk.beam.bleu import sentence_bleu


def test_equals_counting():
    chance = random.Random(1)
    for _ in range(200):
        size, ref_size = chance.randint(0, 9), chance.randint(1, 9)
        hypotheses = torch.randint(0, 4, (2, 3, size))
        references = torch.randint(0, 4, (2, ref_size))
        lengths, ref_lengths = torch.randint(0, size + 1, (2, 3)), torch.randint(0, ref_size + 1, (2,))
        got = sentence_bleu(hypotheses, lengths, references, ref_lengths)
        for row in range(2):
            reference = references[row, : ref_lengths[row]].tolist()
            for hypothesis, length, value in zip(hypotheses[row], lengths[row], got[row], strict=True):
                expected = naive_soft_beam.bleu(hypothesis[:length].tolist(), reference)
                assert value.item() == pytest.approx(expected, abs=1e-6)


def test_brevity_smoothing_lengthens_the_reference_in_the_brevity_penalty_only():
    hypothesis, reference = torch.tensor([[[4, 5, 6, 7, 8]]]), torch.tensor([[4, 5, 9, 7, 8, 6]])
    sizes = torch.tensor([[5]]), torch.tensor([6])
    plain, smooth = (
        sentence_bleu(hypothesis, sizes[0], reference, sizes[1], torch.float64, smoothing).item()
        for smoothing in (0, 1.5)
    )
    assert smooth / plain == pytest.approx(math.exp((1 - 7.5 / 5) - (1 - 6 / 5)), abs=1e-12)
    longer = torch.tensor([[[4, 5, 6, 7, 8, 9, 3, 3]]]), torch.tensor([[8]])
    assert sentence_bleu(*longer, reference, sizes[1]) == sentence_bleu(
        *longer, reference, sizes[1], brevity_smoothing=2
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 12, 30])
def test_with_brevity_smoothing_nothing_is_worth_more_than_the_reference(size):
    """One word more or less, and what a smoothing of more than a third of a short one would make of it."""
    reference = torch.arange(size)[None]
    hypotheses = torch.cat([reference, torch.tensor([[99]])], dim=1)[:, None].expand(1, 3, -1)
    lengths = torch.tensor([[size, size + 1, size - 1]])
    for smoothing in (0.0, 0.5, 1.0):
        exact, longer, shorter = sentence_bleu(
            hypotheses, lengths, reference, torch.tensor([size]), torch.float64, smoothing
        )[0].tolist()
        assert exact > longer and exact > shorter
        assert exact == pytest.approx(math.exp(-min(smoothing, size / 3) / size))


def test_equals_sacrebleu_with_its_add_k_smoothing():
    """sacrebleu adds 1 to the counts of n > 1, as BLEU+1 does."""
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "big"]
    chance = random.Random(2)
    metric = sacrebleu.metrics.BLEU(
        smooth_method="add-k", smooth_value=1, tokenize="none", effective_order=False
    )
    for _ in range(50):
        hypothesis, reference = ([chance.randrange(8) for _ in range(chance.randint(5, 12))] for _ in range(2))
        got = sentence_bleu(
            torch.tensor([[hypothesis]]),
            torch.tensor([[len(hypothesis)]]),
            torch.tensor([reference]),
            torch.tensor([len(reference)]),
        )
        texts = [" ".join(words[i] for i in tokens) for tokens in (hypothesis, reference)]
        assert got.item() == pytest.approx(metric.sentence_score(texts[0], [texts[1]]).score / 100, abs=1e-6)
