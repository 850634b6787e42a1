import dataclasses

import naive_soft_beam
import pytest
import torch
from fairseq.data.data_utils import post_process
from naive_decoders import NaiveLSTM, NaiveTransformer

from fairseq_softtopk.beam import BeamConfig, WordJoiner, soft_beam_loss
from fairseq_softtopk.beam.search import soft_beam_search
from fairseq_softtopk.beam.trace import follow
from fairseq_softtopk.decoders import step_decoder_for

LENGTHS = [(5, 4), (3, 6), (2, 1), (4, 2)]


@pytest.fixture
def config(task):
    dictionary = task.target_dictionary
    return BeamConfig(
        size=3,
        epsilon=0.7,
        num_candidates=10_000,
        objective="gold",
        score_grad_bound=0.0,
        eos=dictionary.eos(),
        never=(dictionary.pad(), dictionary.bos()),
    )


def search(model, sample, config):
    net_input = sample["net_input"]
    return soft_beam_loss(
        step_decoder_for(model),
        model.encoder(net_input["src_tokens"], net_input["src_lengths"]),
        net_input["prev_output_tokens"][:, :1],
        sample["target"],
        sample["target"].ne(1).sum(1),
        config,
    )


def sentences(sample):
    """The un-padded (source, target) of every sentence of a batch."""
    for source, target in zip(sample["net_input"]["src_tokens"], sample["target"], strict=True):
        yield source[source != 1], target[target != 1]


MODELS = [
    (NaiveLSTM, "lstm", {}),
    (NaiveLSTM, "lstm", {"encoder_layers": 2, "decoder_layers": 2}),
    (NaiveLSTM, "lstm", {"encoder_bidirectional": True, "decoder_out_embed_dim": 5}),
    (NaiveLSTM, "lstm", {"share_all_embeddings": True, "decoder_attention": "0"}),
    (NaiveLSTM, "topk_attention", {"encoder_bidirectional": True}),
    (NaiveTransformer, "transformer", {}),
    (NaiveTransformer, "transformer", {"share_all_embeddings": True}),
]


NEVER = {"never": (0, 1), "eos": 2}


def assert_equal_with_gradients(model, loss, expected):
    """Loss and the gradient of every parameter, to 1e-8."""
    torch.testing.assert_close(loss, expected, atol=1e-8, rtol=0)
    grads, expected_grads = (
        torch.autograd.grad(value, list(model.parameters()), allow_unused=True) for value in (loss, expected)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        if expected_grad is None:
            assert grad is None or grad.abs().max() == 0
        else:
            torch.testing.assert_close(grad, expected_grad, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("naive_decoder, arch, options", MODELS)
@pytest.mark.parametrize(
    "size, eos_weight, smoothing", [(1, 1.0, 0.0), (2, 1.0, 0.1), (3, 0.25, 0.0), (5, 0.0, 0.2)]
)
def test_gold_equals_the_nested_loops_on_padded_batches(
    make_model, make_sample, exact_softmax, config, naive_decoder, arch, options, size, eos_weight, smoothing
):
    """For a batch with padding on either side."""
    model, sample = make_model(arch, **options), make_sample(LENGTHS)
    config = dataclasses.replace(config, size=size, eos_weight=eos_weight, label_smoothing=smoothing)
    expected = sum(
        naive_soft_beam.gold_loss(
            naive_decoder(model, source),
            gold,
            size,
            config.epsilon,
            eos_weight=eos_weight,
            smoothing=smoothing,
            steps=len(gold),
            **NEVER,
        )
        for source, gold in sentences(sample)
    )
    assert_equal_with_gradients(model, search(model, sample, config)[0].sum(), expected)


@pytest.mark.parametrize("naive_decoder, arch, options", [MODELS[1], MODELS[4], MODELS[5]])
@pytest.mark.parametrize("size, hypotheses, temperature", [(1, 3, 0.5), (3, 10, 0.1), (4, 2, 1.0)])
def test_risk_equals_the_nested_loops_on_padded_batches(
    make_model, make_sample, exact_softmax, config, naive_decoder, arch, options, size, hypotheses, temperature
):
    model, sample = make_model(arch, **options), make_sample(LENGTHS)
    config = dataclasses.replace(
        config, size=size, objective="risk", hypotheses=hypotheses, temperature=temperature
    )
    expected = sum(
        naive_soft_beam.risk(
            naive_decoder(model, source),
            gold,
            size,
            config.epsilon,
            hypotheses=hypotheses,
            temperature=temperature,
            steps=len(gold) + len(gold) // 5 + 2,
            **NEVER,
        )
        for source, gold in sentences(sample)
    )
    loss, stats = search(model, sample, config)
    assert 0 <= stats.bleu <= len(LENGTHS)
    assert_equal_with_gradients(model, loss.sum(), expected)


@pytest.mark.parametrize("scheme, text", [("subword_nmt", "x{}@@"), ("sentencepiece", "▁x{}")])
def test_risk_of_words_equals_the_nested_loops(make_model, make_sample, exact_softmax, config, scheme, text):
    """Every third token is marked: with BPE it is joined to the next, else it begins a word."""
    model, sample = make_model("lstm"), make_sample(LENGTHS)
    vocabulary = model.decoder.embed_tokens.num_embeddings
    symbols = [text.format(i) if i % 3 == 0 else f"x{i}" for i in range(vocabulary)]
    config = dataclasses.replace(config, objective="risk", words=WordJoiner(symbols, scheme))

    def words(tokens):
        return post_process(" ".join(symbols[token] for token in tokens), scheme).split()

    expected = sum(
        naive_soft_beam.risk(
            NaiveLSTM(model, source),
            gold,
            config.size,
            config.epsilon,
            hypotheses=config.hypotheses,
            temperature=config.temperature,
            steps=len(gold) + len(gold) // 5 + 2,
            words=words,
            **NEVER,
        )
        for source, gold in sentences(sample)
    )
    loss = search(model, sample, config)[0].sum()
    assert_equal_with_gradients(model, loss, expected)
    of_tokens = search(model, sample, dataclasses.replace(config, words=None))[0].sum()
    assert (of_tokens - loss).abs() > 1e-3


@pytest.mark.parametrize("naive_decoder, arch, options", [MODELS[4], MODELS[5]])
@pytest.mark.parametrize("objective", ["gold", "risk"])
@pytest.mark.parametrize(
    "change",
    [
        {"backward_epsilon": 2.0},
        {"detach": "scores"},
        {"detach": "embeddings"},
        {"horizon": 1},
        {"horizon": 3},
        {"max_len": 3},
        {"num_candidates": 6},
    ],
)
def test_variants_of_the_search_equal_the_nested_loops(
    make_model, make_sample, exact_softmax, config, naive_decoder, arch, options, objective, change
):
    model, sample = make_model(arch, **options), make_sample(LENGTHS)
    config = dataclasses.replace(config, objective=objective, **change)
    max_len = change.get("max_len", 100)
    gradient = {key: value for key, value in change.items() if key != "max_len"}
    expected = 0.0
    for source, gold in sentences(sample):
        search_settings = (naive_decoder(model, source), gold, config.size, config.epsilon)
        if objective == "gold":
            steps, loss = len(gold), {"eos_weight": 1.0, "smoothing": 0.0}
            naive_loss = naive_soft_beam.gold_loss
        else:
            steps, loss = len(gold) + len(gold) // 5 + 2, {"hypotheses": 10, "temperature": 0.1}
            naive_loss = naive_soft_beam.risk
        expected += naive_loss(*search_settings, **loss, steps=min(steps, max_len), **NEVER, **gradient)
    assert_equal_with_gradients(model, search(model, sample, config)[0].sum(), expected)


@pytest.mark.parametrize("objective", ["gold", "risk"])
@pytest.mark.parametrize("arch", ["topk_attention", "transformer"])
def test_recomputed_steps_give_the_same_gradient_and_statistics(
    make_model, make_sample, config, arch, objective
):
    """With dropout, which must be the same again, and with the bound, which must count a gradient once."""
    model, sample = make_model(arch, dropout=0.3).train(), make_sample(LENGTHS)
    results = []
    for recompute in (False, True):
        torch.manual_seed(7)
        loss, stats = search(
            model,
            sample,
            dataclasses.replace(config, objective=objective, score_grad_bound=0.5, recompute=recompute),
        )
        model.zero_grad()
        loss.sum().backward()
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        results.append((loss, [*stats[:-1], *stats.score_grad], grads))
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-12)
    assert results[0][1][-1] > 0


@pytest.mark.parametrize("objective", ["gold", "risk"])
@pytest.mark.parametrize("arch", ["topk_attention", "transformer"])
def test_a_sentence_does_not_depend_on_its_batch(
    make_model, make_sample, exact_softmax, config, arch, objective
):
    """Nor does its gradient, nor the bound on it."""
    model = make_model(arch, encoder_bidirectional=True)
    sample = make_sample([(2, 1), (9, 15), (3, 2)])
    config = dataclasses.replace(config, objective=objective, score_grad_bound=0.05)
    for row, (source, gold) in enumerate(sentences(sample)):
        alone = {
            "net_input": {
                "src_tokens": source[None],
                "src_lengths": torch.tensor([len(source)]),
                "prev_output_tokens": torch.tensor([[2]]),
            },
            "target": gold[None],
        }
        together = search(model, sample, config)[0][row]
        assert_equal_with_gradients(model, search(model, alone, config)[0][0], together)


def hard_beam_loss(model, source, gold, k):
    """A textbook beam search over token sequences, with the stock decoder run anew on every prefix."""
    encoder_out = model.encoder(source[None], torch.tensor([len(source)]))
    hypotheses = [((2,), 0.0, 0.0)]
    for step, token in enumerate(gold.tolist()):
        extended = []
        for prefix, score, gold_lprob in hypotheses:
            logits, _ = model.decoder(torch.tensor([prefix]), encoder_out)
            lprobs = logits[0, -1].log_softmax(0).tolist()
            for word, lprob in enumerate(lprobs):
                if word not in (0, 1) and (word != 2 or step + 1 == len(gold)):
                    extended.append(((*prefix, word), score + lprob, gold_lprob + lprobs[token]))
        hypotheses = sorted(extended, key=lambda hypothesis: -hypothesis[1])[:k]
    return -hypotheses[0][2]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("num_candidates", [4, 10_000])
@pytest.mark.parametrize("arch", ["lstm", "transformer"])
def test_tends_to_a_hard_beam_search_as_epsilon_vanishes(
    make_model, make_sample, config, size, num_candidates, arch
):
    model, sample = make_model(arch, encoder_bidirectional=True).eval(), make_sample(LENGTHS, seed=3)
    config = dataclasses.replace(config, size=size, epsilon=1e-7, num_candidates=num_candidates)
    with torch.no_grad():
        got, stats = search(model, sample, config)
        expected = [hard_beam_loss(model, *pair, size) for pair in sentences(sample)]
    # fairseq's attentions compute in float32 in places, whatever their scores are.
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), atol=1e-5, rtol=0)
    assert stats.sharpness / stats.selections == 1 and stats.agreement / stats.selections == 1
    assert stats.selections == sum(target - 1 for _, target in LENGTHS)


def hard_beams(model, source, steps, k):
    """The k hypotheses of a textbook beam search before every step but the first, best first."""
    encoder_out = model.encoder(source[None], torch.tensor([len(source)]))
    hypotheses = [((2,), 0.0)]
    for _ in range(steps):
        extended = []
        for prefix, score in hypotheses:
            lprobs = model.decoder(torch.tensor([prefix]), encoder_out)[0][0, -1].log_softmax(0).tolist()
            extended += [((*prefix, word), score + lprob) for word, lprob in enumerate(lprobs) if word > 2]
        hypotheses = sorted(extended, key=lambda hypothesis: -hypothesis[1])[:k]
        yield [list(prefix[1:]) for prefix, _ in hypotheses]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_candidates", [5, 10_000])
@pytest.mark.parametrize(
    "arch, options", [("lstm", {"encoder_layers": 2, "decoder_layers": 2}), ("transformer", {})]
)
def test_all_beams_are_those_of_a_hard_beam_search_as_epsilon_vanishes(
    make_model, make_sample, exact_softmax, config, size, num_candidates, arch, options
):
    model, sample = make_model(arch, **options).eval(), make_sample([(5, 7), (3, 6), (2, 1)])
    config = dataclasses.replace(config, size=size, epsilon=1e-7, num_candidates=num_candidates)
    net_input, gold, lengths = sample["net_input"], sample["target"], sample["target"].ne(1).sum(1)
    with torch.no_grad():
        encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        first = net_input["prev_output_tokens"][:, :1]
        trace, _ = soft_beam_search(step_decoder_for(model), encoder_out, first, gold, lengths, lengths, config)
        beams = torch.arange(size).expand(len(gold), -1)
        for row, (source, target) in enumerate(sentences(sample)):
            for step, expected in enumerate(hard_beams(model, source, len(target) - 1, size), start=1):
                got = follow(trace, torch.full_like(beams, step), beams).tokens[row, :, :step]
                assert got.tolist() == expected


@pytest.mark.parametrize("arch", ["topk_attention", "transformer"])
def test_sentences_that_are_over_leave_the_batch(make_model, make_sample, config, arch):
    """And what is recorded of the others stays where it was."""
    model, sample = make_model(arch).eval(), make_sample(LENGTHS)
    net_input, gold, lengths = sample["net_input"], sample["target"], sample["target"].ne(1).sum(1)
    encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    decoder, stepped = step_decoder_for(model), []

    class Counting:
        def __getattr__(self, name):
            return getattr(decoder, name)

        def step(self, embeddings, state):
            stepped.append(len(embeddings))
            return decoder.step(embeddings, state)

    first = net_input["prev_output_tokens"][:, :1]
    trace, _ = soft_beam_search(Counting(), encoder_out, first, gold, lengths, lengths, config)
    longest, _ = soft_beam_search(
        decoder, encoder_out, first, gold, torch.full_like(lengths, int(lengths.max())), lengths, config
    )
    assert stepped == [int((lengths > step).sum()) for step in range(len(trace))] and len(set(stepped)) > 2
    for step, (short, long) in enumerate(zip(trace, longest, strict=True)):
        going = lengths > step
        torch.testing.assert_close(short.finished[going], long.finished[going])
        torch.testing.assert_close(short.best[going], long.best[going])
        assert short.finished[~going].eq(0).all()


def test_preselected_candidates_change_nothing_where_the_others_have_no_weight(make_model, make_sample, config):
    model, sample = make_model(), make_sample(LENGTHS)
    config = dataclasses.replace(config, epsilon=0.05)
    everything, _ = search(model, sample, config)
    best, _ = search(model, sample, dataclasses.replace(config, num_candidates=20))
    torch.testing.assert_close(best, everything, atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight", [1.0, 0.2, 4096.0])
def test_bound_limits_the_gradient_in_its_own_unit(make_model, make_sample, config, weight):
    """The loss may be weighted or scaled: the bounded gradient is scaled by it, and so is nothing else."""
    model, sample = make_model("topk_attention"), make_sample(LENGTHS)

    def gradient(bound, weight):
        loss, stats = search(model, sample, dataclasses.replace(config, score_grad_bound=bound, epsilon=0.1))
        grads = torch.autograd.grad(weight * loss.sum(), list(model.decoder.parameters()))
        return torch.cat([grad.flatten() for grad in grads]) / weight, stats.score_grad

    literal, before = gradient(0.0, 1.0)
    bounded, stats = gradient(0.5, weight)
    assert before.clipped == 0 and stats.clipped > 0 and stats.total == before.total == 9
    assert bounded.norm() < literal.norm()
    torch.testing.assert_close(bounded, gradient(0.5, 1.0)[0], atol=1e-6, rtol=1e-5)
    loose, stats = gradient(1e9, weight)
    torch.testing.assert_close(loose, literal, atol=1e-5, rtol=1e-5)
    assert stats.clipped == 0
    torch.testing.assert_close(stats.norm, before.norm, rtol=1e-4, atol=0)


def test_statistics_of_the_gold_tokens(make_model, make_sample, config):
    """Where the model is sure of the gold tokens they are the best continuations, and stay on the beam."""
    model, sample = make_model().eval(), make_sample(LENGTHS)
    _, stats = search(model, sample, config)
    tokens = sum(target for _, target in LENGTHS)
    assert stats.gold_tokens == tokens and stats.sentences == len(LENGTHS)
    assert tokens < stats.gold_rank < 16 * tokens and stats.gold_on_beam < len(LENGTHS)

    class Sure:
        """Says the gold tokens one after the other, whatever it is fed."""

        def __init__(self):
            self.steps = 0

        def step(self, embeddings, state):
            gold = sample["target"][state, self.steps].view(-1, 1, 1)
            lprobs = torch.full((*embeddings.shape[:2], 16), -5.0)
            lprobs.scatter_(2, gold.expand(-1, embeddings.size(1), 1), 0.0)
            self.steps += 1
            return lprobs, state

        start = staticmethod(lambda encoder_out: torch.arange(len(LENGTHS)))
        keep = staticmethod(lambda state, sentences: state[sentences])
        embed = staticmethod(lambda tokens: tokens.unsqueeze(-1).float())
        mix = staticmethod(lambda state, weights: state)
        mix_embeddings = staticmethod(lambda tokens, weights: weights.sum(1).unsqueeze(-1))

    target = sample["target"]
    config = dataclasses.replace(config, epsilon=1e-3)
    _, stats = soft_beam_loss(Sure(), None, target[:, :1], target, target.ne(1).sum(1), config)
    assert stats.gold_rank == tokens and stats.gold_on_beam == len(LENGTHS)
