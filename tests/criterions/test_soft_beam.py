import dataclasses
import functools
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics

from fairseq_softtopk import plugin  # noqa: F401
from fairseq_softtopk.beam import soft_beam_loss
from fairseq_softtopk.criterions import soft_beam
from fairseq_softtopk.criterions.soft_beam import SoftBeamConfig, SoftBeamCriterion
from fairseq_softtopk.decoders import step_decoder_for

LENGTHS = [(5, 4), (3, 6), (2, 1), (4, 2)]


def test_rho_one_is_stock_cross_entropy_to_the_last_bit(make_model, make_sample, make_criterion, task):
    model, sample = make_model("topk_attention", encoder_bidirectional=True), make_sample(LENGTHS)
    expected, expected_size, _ = CrossEntropyCriterion(task, sentence_avg=False)(model, sample)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    loss, size, logged = make_criterion(teacher_forcing_ratio=1.0)(model, sample)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(loss, expected) and size == expected_size
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    assert "soft_beam_loss" not in logged


def test_rho_one_with_label_smoothing_is_the_stock_criterion_to_the_last_bit(
    make_model, make_sample, make_criterion, task
):
    model, sample = make_model("topk_attention"), make_sample(LENGTHS)
    stock = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=0.1)
    expected, _, expected_log = stock(model, sample)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    loss, _, logged = make_criterion(teacher_forcing_ratio=1.0, label_smoothing=0.1)(model, sample)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(loss, expected) and torch.equal(logged["teacher_forcing_loss"], expected_log["nll_loss"])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_loss_is_the_mixture_of_its_two_parts(make_model, make_sample, make_criterion):
    model, sample = make_model(), make_sample(LENGTHS)
    teacher_forcing = make_criterion(teacher_forcing_ratio=1.0)(model, sample)[0]
    soft_beam = make_criterion(teacher_forcing_ratio=0.0)(model, sample)[0]
    mixed, _, logged = make_criterion(teacher_forcing_ratio=0.8)(model, sample)
    torch.testing.assert_close(mixed, 0.8 * teacher_forcing + 0.2 * soft_beam)
    torch.testing.assert_close(logged["soft_beam_loss"], soft_beam.detach())
    torch.testing.assert_close(logged["teacher_forcing_loss"], teacher_forcing.detach())


def test_rho_zero_runs_no_teacher_forcing_decoder_pass(make_model, make_sample, make_criterion, monkeypatch):
    model, sample = make_model(), make_sample(LENGTHS)
    monkeypatch.setattr(model.decoder, "forward", None)
    loss, _, logged = make_criterion(teacher_forcing_ratio=0.0)(model, sample)
    assert loss.isfinite() and "teacher_forcing_loss" not in logged


def test_validation_with_rho_zero_logs_teacher_forcing_all_the_same(make_model, make_sample, make_criterion):
    model, sample = make_model().eval(), make_sample(LENGTHS)
    losses, logs = [], []
    for rho in (0.0, 1.0):
        loss, _, logged = make_criterion(teacher_forcing_ratio=rho).eval()(model, sample)
        losses.append(loss)
        logs.append(logged)
    torch.testing.assert_close(logs[0]["teacher_forcing_loss"], losses[1].detach())
    torch.testing.assert_close(losses[0], logs[0]["soft_beam_loss"])


def test_encodes_the_batch_once(make_model, make_sample, make_criterion):
    model, calls = make_model(), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    make_criterion()(model, make_sample(LENGTHS))
    assert len(calls) == 1


def test_one_sharp_beam_feeds_what_greedy_search_writes(make_model, make_sample, make_criterion):
    model, sample = make_model().requires_grad_(False), make_sample([(4, 5)])
    criterion = make_criterion(soft_beam_size=1, soft_beam_epsilon=1e-6, teacher_forcing_ratio=0.0)
    tokens = torch.tensor([[2]])
    encoder_out = model.encoder(sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"])
    while tokens.size(1) < 5:  # greedy: never pad, bos, eos
        logits = model.decoder(tokens, encoder_out)[0][:, -1]
        logits[:, [0, 1, 2]] = -math.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    greedy = {
        "net_input": {**sample["net_input"], "prev_output_tokens": tokens},
        "target": sample["target"],
        "ntokens": 5,
    }
    expected = make_criterion(teacher_forcing_ratio=1.0)(model, greedy)[0]
    torch.testing.assert_close(criterion(model, sample)[0].float(), expected, atol=1e-5, rtol=0)


def test_sentence_avg_counts_sentences(make_model, make_sample, task):
    criterion = SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=True, soft_beam_size=2))
    assert criterion(make_model(), make_sample(LENGTHS))[1] == len(LENGTHS)


def test_log_shows_losses_sharpness_agreement_and_the_gradient_before_the_bound(
    make_model, make_sample, make_criterion
):
    model, criterion, outputs = make_model(), make_criterion(), []
    for seed in (0, 1):
        loss, _, logged = criterion(model, make_sample(LENGTHS, seed=seed))
        loss.backward()
        outputs.append(logged)
    summed = {key: sum(float(output[key]) for output in outputs) for key in outputs[0]}
    values = []
    for logging_outputs in (outputs, [summed]):  # ranks may add up first
        with metrics.aggregate(new_root=True) as aggregator:
            criterion.reduce_metrics(logging_outputs)
        values.append(aggregator.get_smoothed_values())
    assert values[0] == pytest.approx(values[1], abs=2e-3)
    assert set(values[0]) == {
        "loss",
        "teacher_forcing_loss",
        "soft_beam_loss",
        "ppl",
        "sharpness",
        "agreement",
        "gold_rank",
        "gold_on_beam",
        "score_grad_norm",
        "score_grad_clipped",
    }
    expected = sum(float(output["soft_beam_loss"]) for output in outputs) / 26 / math.log(2)
    assert values[0]["soft_beam_loss"] == pytest.approx(expected, abs=1e-3)
    assert 0 < values[0]["sharpness"] <= 1 and 0 < values[0]["agreement"] <= 1
    assert values[0]["score_grad_norm"] > 0
    assert criterion.logging_outputs_can_be_summed()


def test_the_loss_in_the_log_is_per_token_that_was_scored(make_model, make_sample, make_criterion):
    model, sample, logged = make_model(), make_sample([(4, 9), (3, 9)]), {}
    for max_len in (0, 2):
        criterion = make_criterion(soft_beam_max_len=max_len, teacher_forcing_ratio=0.0)
        output = criterion(model, sample)[2]
        with metrics.aggregate(new_root=True) as aggregator:
            criterion.reduce_metrics([output])
        logged[max_len] = aggregator.get_smoothed_values()
        scored = float(output["soft_beam_loss"]) / (2 * (max_len or 9)) / math.log(2)
        assert logged[max_len]["soft_beam_loss"] == pytest.approx(scored, abs=1e-3)
        assert "ppl" not in logged[max_len]
    assert logged[2]["soft_beam_loss"] == pytest.approx(logged[0]["soft_beam_loss"], rel=0.3)


def test_perplexity_is_nan_in_an_interval_without_teacher_forcing(make_model, make_sample, make_criterion):
    outputs = [
        make_criterion(teacher_forcing_ratio=rho)(make_model(), make_sample(LENGTHS))[2] for rho in (1.0, 0.0)
    ]
    with metrics.aggregate("interval", new_root=True) as aggregator:
        SoftBeamCriterion.reduce_metrics(outputs[:1])
        assert aggregator.get_smoothed_values()["ppl"] > 1
        aggregator.reset()  # as fairseq does after each line of its log
        SoftBeamCriterion.reduce_metrics(outputs[1:])
    assert math.isnan(aggregator.get_smoothed_values()["ppl"])


def test_validation_logs_no_gradient(make_model, make_sample, make_criterion):
    criterion = make_criterion()
    with torch.no_grad():
        _, _, logged = criterion(make_model().eval(), make_sample(LENGTHS))
    with metrics.aggregate(new_root=True) as aggregator:
        criterion.reduce_metrics([logged])
    assert "score_grad_norm" not in aggregator.get_smoothed_values()


@pytest.mark.parametrize("cost_scale", ["max", "batch_max"])
def test_literal_cost_makes_the_beam_an_average(make_model, make_sample, make_criterion, cost_scale):
    """Design fact: with the cost divided by its maximum, epsilon = 0.1 is not sharp at all."""
    model, sample = make_model(), make_sample([(5, 9), (4, 9)])

    def sharpness(scale):
        logged = make_criterion(soft_beam_cost_scale=scale)(model, sample)[2]
        return float(logged["beam_sharpness"] / logged["beam_selections"])

    assert sharpness(cost_scale) < 0.6 < sharpness("none")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher_forcing_ratio": 1.5}, r"--teacher-forcing-ratio must lie in \[0, 1\], got 1.5"),
        ({"teacher_forcing_ratio": -0.1}, r"--teacher-forcing-ratio must lie in \[0, 1\], got -0.1"),
        ({"teacher_forcing_ratio": math.nan}, "got nan"),
        ({"soft_beam_relaxation": "soft"}, "--soft-beam-relaxation must be one of soft_topk, .* got soft"),
        (
            {"soft_beam_relaxation": "softmax_k", "soft_beam_cost_scale": "max"},
            "--soft-beam-cost-scale must be none with --soft-beam-relaxation softmax_k, .* got max",
        ),
        ({"label_smoothing": 1.0}, r"--label-smoothing must lie in \[0, 1\), got 1.0"),
        ({"soft_beam_size": 0}, r"--soft-beam-size must lie in \[1, 13\] .*, got 0"),
        ({"soft_beam_size": 14}, r"--soft-beam-size must lie in \[1, 13\] .*, got 14"),
        ({"soft_beam_epsilon": 0.0}, "--soft-beam-epsilon must be positive and finite, got 0.0"),
        ({"soft_beam_epsilon": math.inf}, "--soft-beam-epsilon must be positive and finite, got inf"),
        ({"soft_beam_candidates": 2}, "--soft-beam-candidates must be at least --soft-beam-size 3, got 2"),
        ({"soft_beam_score_grad_clip": -1.0}, "--soft-beam-score-grad-clip must be at least 0, got -1.0"),
        ({"soft_beam_eos_weight": 1.5}, r"--soft-beam-eos-weight must lie in \[0, 1\], got 1.5"),
        ({"soft_beam_prob": -0.5}, r"--soft-beam-prob must lie in \[0, 1\], got -0.5"),
        ({"teacher_forcing_ratio_end": 2.0}, r"--teacher-forcing-ratio-end must lie in \[0, 1\], got 2.0"),
        ({"soft_beam_epsilon_end": 0.0}, "--soft-beam-epsilon-end must be positive and finite, got 0.0"),
        ({"soft_beam_epsilon_schedule": "linear"}, "--soft-beam-epsilon-updates must be at least 1 .*, got 0"),
        ({"soft_beam_temperature": 0.0}, "--soft-beam-temperature must be positive and finite, got 0.0"),
        ({"soft_beam_hypotheses": 1}, "--soft-beam-hypotheses must be at least 2, got 1"),
        ({"soft_beam_backward_epsilon": -1.0}, "--soft-beam-backward-epsilon must be at least 0 .*, got -1.0"),
        ({"soft_beam_epsilon_updates": 5}, "--soft-beam-epsilon-updates must be 0 without .*, got 5"),
        (
            {"soft_beam_objective": "risk", "soft_beam_max_len": 1},
            "--soft-beam-max-len must be 0 or at least 2 with --soft-beam-objective risk, .* got 1",
        ),
        (
            {"soft_beam_relaxation": "hard", "soft_beam_backward_epsilon": 1.0},
            "--soft-beam-backward-epsilon must be 0.0 with --soft-beam-relaxation hard, got 1.0",
        ),
        (
            {"soft_beam_relaxation": "hard", "soft_beam_detach": "scores"},
            "--soft-beam-detach must be nothing with --soft-beam-relaxation hard, got scores",
        ),
        ({"soft_beam_horizon": -1}, "--soft-beam-horizon must be at least 0, got -1"),
        ({"soft_beam_max_len": -1}, "--soft-beam-max-len must be at least 0, got -1"),
        ({"soft_beam_start_update": -1}, "--soft-beam-start-update must be at least 0, got -1"),
        ({"soft_beam_objective": "bleu"}, "--soft-beam-objective must be one of risk, gold, got bleu"),
        (
            {"soft_beam_post_process": "letter"},
            "--soft-beam-post-process must be one of auto, none, subword_nmt, sentencepiece, got letter",
        ),
        (
            {"soft_beam_post_process": "subword_nmt", "soft_beam_objective": "gold"},
            "--soft-beam-post-process must be auto with --soft-beam-objective gold, got subword_nmt",
        ),
        (
            {"soft_beam_brevity_smoothing": -1.0},
            "--soft-beam-brevity-smoothing must be at least 0 and finite, got -1.0",
        ),
        (
            {"soft_beam_brevity_smoothing": 1.0, "soft_beam_objective": "gold"},
            "--soft-beam-brevity-smoothing must be left out with --soft-beam-objective gold, got 1.0",
        ),
        (
            {"soft_beam_hypotheses": 5, "soft_beam_objective": "gold"},
            "--soft-beam-hypotheses must be 20 with --soft-beam-objective gold, got 5",
        ),
        (
            {"soft_beam_eos_weight": 0.0, "soft_beam_objective": "risk"},
            "--soft-beam-eos-weight must be 1.0 with --soft-beam-objective risk, got 0.0",
        ),
        (
            {"soft_beam_epsilon_end": 0.5},
            "--soft-beam-epsilon-end must be 0.001 with --soft-beam-epsilon-schedule constant, got 0.5",
        ),
        ({"soft_beam_prefix_size": -1}, "--soft-beam-prefix-size must be at least 0, got -1"),
        ({"soft_beam_detach": "all"}, "--soft-beam-detach must be one of nothing, .* got all"),
        (
            {"soft_beam_cost_scale": "mean"},
            "--soft-beam-cost-scale must be one of none, max, batch_max, got mean",
        ),
    ],
)
def test_bad_options_name_the_value(make_criterion, options, message):
    with pytest.raises(ValueError, match=message):
        make_criterion(**options)


def test_a_beam_as_large_as_the_vocabulary_allows(make_model, make_sample, make_criterion):
    loss = make_criterion(soft_beam_size=13)(make_model(), make_sample(LENGTHS))[0]
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_are_finite_in_low_precision(make_model, make_sample, make_criterion, dtype):
    model, sample = make_model("topk_attention", encoder_bidirectional=True), make_sample(LENGTHS)
    expected = make_criterion()(model, sample)[0]
    loss = make_criterion()(model.to(dtype), sample)[0]
    loss.backward()
    torch.testing.assert_close(loss.float(), expected.float(), rtol=0.05, atol=0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_dummy_batch_leaves_no_gradient(make_model, make_sample, make_criterion):
    """fairseq multiplies the loss of an empty shard's stand-in by 0."""
    model = make_model("topk_attention")
    loss = make_criterion()(model, make_sample(LENGTHS))[0] * 0
    loss.backward()
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("place", ["cfg", "args"])  # tasks without a dataclass have args, and strings in them
@pytest.mark.parametrize("value", [True, "True"])
def test_targets_padded_on_the_left_are_refused(task, place, value):
    setattr(task, place, SimpleNamespace(left_pad_target="False"))
    SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=False))
    setattr(task, place, SimpleNamespace(left_pad_target=value))
    with pytest.raises(ValueError, match="padded on the right, got --left-pad-target True"):
        SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=False))


@pytest.mark.parametrize("objective", ["risk", "gold"])
def test_targets_that_do_not_end_with_eos_are_refused(make_model, make_sample, make_criterion, objective):
    """Such as those of fairseq's ``translation_from_pretrained_bart``, which end with a language's token."""
    model, sample = make_model(), make_sample([(3, 4), (3, 2)])
    criterion = make_criterion(soft_beam_objective=objective)
    assert criterion(model, sample)[0].isfinite()
    sample["target"][1, 1] = 7
    with pytest.raises(ValueError, match="soft_beam: targets must end with eos"):
        criterion(model, sample)


def with_prefix(sample, tag):
    """The same sentences, whose targets start with a token, as those of a multilingual task do."""
    net_input, target = sample["net_input"], sample["target"]
    tags = torch.full_like(target[:, :1], tag)
    fed = torch.cat([net_input["prev_output_tokens"][:, :1], tags, net_input["prev_output_tokens"][:, 1:]], 1)
    net_input = {**net_input, "prev_output_tokens": fed}
    longer = {"target": torch.cat([tags, target], 1), "ntokens": sample["ntokens"] + len(target)}
    return {**sample, "net_input": net_input, **longer}


@pytest.mark.parametrize("objective", ["risk", "gold"])
@pytest.mark.parametrize("arch", ["topk_attention", "transformer"])
def test_the_beam_starts_after_a_prefix_that_is_given(make_model, make_sample, make_criterion, arch, objective):
    model, sample = make_model(arch), make_sample(LENGTHS)
    options = {"soft_beam_objective": objective, "teacher_forcing_ratio": 0.0}
    criterion = make_criterion(soft_beam_prefix_size=1, **options)
    losses = {tag: criterion(model, with_prefix(sample, tag))[0].item() for tag in (5, 9)}
    assert losses[5] != losses[9]

    class Started:
        """A decoder that has been fed eos and then gets the tag for its first token."""

        def __init__(self, decoder):
            self.decoder = decoder

        def __getattr__(self, name):
            return getattr(self.decoder, name)

        def start(self, encoder_out):
            state = self.decoder.start(encoder_out)
            return self.decoder.step(self.decoder.embed(torch.full((len(LENGTHS), 1), 2)), state)[1]

    encoder_out = model.encoder(sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"])
    target = sample["target"]
    for tag, loss in losses.items():
        expected, _ = soft_beam_loss(
            Started(step_decoder_for(model)),
            encoder_out,
            first=torch.full((len(LENGTHS), 1), tag),
            gold=target,
            lengths=target.ne(1).sum(1),
            config=dataclasses.replace(criterion.beam, max_len=1000),
        )
        assert loss == pytest.approx(expected.sum().item(), abs=1e-9)
    with pytest.raises(ValueError, match="nothing after --soft-beam-prefix-size tokens"):
        make_criterion(soft_beam_prefix_size=3, **options)(model, sample)


def test_a_language_in_the_target_must_be_said(task, make_criterion):
    langtoks = {"main": (None, "tgt")}
    task.args = SimpleNamespace(langtoks=langtoks, lang_tok_replacing_bos_eos=False)
    with pytest.raises(ValueError, match=r"--soft-beam-prefix-size must be at least 1 .* got 0"):
        make_criterion()
    make_criterion(soft_beam_prefix_size=1)
    task.args.lang_tok_replacing_bos_eos = True
    make_criterion()
    task.args = SimpleNamespace(langtoks={"main": ("src", None)})
    make_criterion()


def test_words_of_languages_with_dictionaries_of_their_own_are_refused(task, make_criterion):
    """The words are those of the target language, whatever the task calls its target dictionary."""
    pieces = type(task.target_dictionary)()
    for piece in range(12):
        pieces.add_symbol(f"w{piece}@@")
    words = {"soft_beam_objective": "risk", "soft_beam_post_process": "subword_nmt"}
    task.lang_pairs, task.dicts = ["de-en"], {"de": task.target_dictionary, "en": pieces}
    assert make_criterion(**words).words.continued.sum() == 12
    task.lang_pairs = ["de-en", "en-de"]
    with pytest.raises(ValueError, match="--soft-beam-post-process must be none where target languages"):
        make_criterion(**words)
    assert make_criterion(soft_beam_objective="risk").words is None


@pytest.mark.parametrize(
    "symbol, given, words, smoothing",
    [
        ("w", {}, False, 0),
        ("w@@", {}, True, 1),
        ("▁w", {}, True, 1),
        ("w@@", {"soft_beam_post_process": "none"}, False, 0),
        ("w@@", {"soft_beam_brevity_smoothing": 0.0}, True, 0),
        ("w", {"soft_beam_brevity_smoothing": 1.0}, False, 1),
    ],
)
def test_the_dictionary_says_whether_the_risk_is_of_words(
    task, make_criterion, caplog, symbol, given, words, smoothing
):
    task.target_dictionary.symbols[-1] = symbol
    with caplog.at_level(logging.INFO):
        criterion = make_criterion(soft_beam_objective="risk", **given)
    assert (criterion.words is not None) == words
    assert criterion.beam.brevity_smoothing == smoothing
    assert f"brevity smoothing {smoothing}" in caplog.text


@pytest.mark.parametrize(
    "scheme, mark", [("sentencepiece", 'starts with "▁"'), ("subword_nmt", 'ends with "@@"')]
)
def test_pieces_that_no_symbol_marks_are_refused(make_criterion, scheme, mark):
    with pytest.raises(ValueError, match=f"no symbol of the dictionary {mark}"):
        make_criterion(soft_beam_objective="risk", soft_beam_post_process=scheme)


@pytest.fixture
def warnings_of(caplog):
    """The texts of what is warned of once in a process, as if it were the first time."""
    soft_beam._warn_once.cache_clear()
    yield caplog
    soft_beam._warn_once.cache_clear()


def test_a_forward_pass_that_the_beam_does_not_follow_is_warned_of(
    make_model, make_sample, make_criterion, warnings_of
):
    model, criterion = make_model(), make_criterion()
    criterion(model, make_sample(LENGTHS))
    assert not warnings_of.records

    class Louder(type(model)):
        def forward(self, src_tokens, src_lengths, prev_output_tokens):
            encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
            return self.decoder(prev_output_tokens, encoder_out=(encoder_out[0] * 5, *encoder_out[1:]))

    model.__class__ = Louder
    for _ in range(2):
        criterion(model, make_sample(LENGTHS))
    (record,) = warnings_of.records
    assert "Louder has its own forward: the beam calls its encoder and its decoder" in record.message


def test_label_smoothing_of_nothing_is_warned_of(make_criterion, warnings_of):
    risk = {"soft_beam_objective": "risk", "label_smoothing": 0.1, "teacher_forcing_ratio": 0.0}
    for others in ({"teacher_forcing_ratio": 0.5}, {"soft_beam_objective": "gold"}, {"soft_beam_prob": 0.5}):
        make_criterion(**{**risk, **others})
    assert not warnings_of.records
    make_criterion(**risk)
    assert "--label-smoothing has no effect on the risk" in warnings_of.text


def test_a_model_without_encoder_is_refused(make_sample, make_criterion):
    with pytest.raises(ValueError, match="encoder-decoder models, got Linear without an encoder"):
        make_criterion()(torch.nn.Linear(1, 1), make_sample(LENGTHS))


def test_a_model_that_cannot_be_stepped_is_refused(make_model, make_sample, make_criterion):
    class OddDecoder(torch.nn.Module):
        forward = staticmethod(lambda tokens, **_: (torch.randn(*tokens.shape, 16), None))

        def get_normalized_probs(self, net_output, log_probs, sample):
            return net_output[0].log_softmax(-1)

    model = make_model()
    del model.decoder
    model.decoder = OddDecoder()
    with pytest.raises(ValueError, match="cannot step the decoder OddDecoder of LSTMModel"):
        make_criterion()(model, make_sample(LENGTHS))


def train_steps(task, criterion, model, sample, updates):
    """What fairseq does: the task trains on a batch, and says after how many updates."""
    logged = []
    for update in updates:
        logged.append(task.train_step(sample, model, criterion, None, update))
    return logged


@pytest.fixture
def training_task(task):
    """With a ``train_step`` like that of fairseq's tasks."""

    def train_step(sample, model, criterion, optimizer, update_num, ignore_grad=False):
        criterion.train()
        return criterion(model, sample)[2]

    task.train_step = train_step
    return task


def test_schedules_count_from_the_start_update(training_task, make_model, make_sample, make_criterion):
    criterion = make_criterion(
        soft_beam_start_update=10,
        teacher_forcing_ratio=1.0,
        teacher_forcing_ratio_schedule="linear",
        teacher_forcing_ratio_end=0.0,
        teacher_forcing_ratio_updates=4,
        soft_beam_epsilon=1.0,
        soft_beam_epsilon_schedule="exponential",
        soft_beam_epsilon_end=0.01,
        soft_beam_epsilon_updates=2,
    )
    model, sample = make_model(), make_sample(LENGTHS)
    logged = train_steps(training_task, criterion, model, sample, [0, 9, 10, 11, 12, 14, 99])
    sentences = len(LENGTHS)
    assert [log["rho"] / sentences for log in logged] == pytest.approx([1, 1, 1, 0.75, 0.5, 0, 0])
    assert [log["epsilon"] / sentences for log in logged] == pytest.approx([1, 1, 1, 0.1, 0.01, 0.01, 0.01])
    assert ["soft_beam_loss" in log for log in logged] == [False] * 3 + [True] * 4
    assert ["teacher_forcing_loss" in log for log in logged] == [True] * 5 + [False] * 2


def test_a_criterion_that_never_trained_validates_at_the_end_of_its_schedules(
    make_model, make_sample, make_criterion
):
    criterion = make_criterion(
        soft_beam_start_update=10,
        soft_beam_prob=0.0,
        soft_beam_epsilon_schedule="linear",
        soft_beam_epsilon_end=0.5,
        soft_beam_epsilon_updates=4,
    ).eval()
    _, _, logged = criterion(make_model(), make_sample(LENGTHS))
    assert logged["epsilon"] == 0.5 * len(LENGTHS) and "soft_beam_loss" in logged


def test_validation_stands_where_the_updates_are(training_task, make_model, make_sample, make_criterion):
    schedule = {"teacher_forcing_ratio_schedule": "linear", "teacher_forcing_ratio_updates": 4}
    criterion = make_criterion(
        teacher_forcing_ratio=1.0, teacher_forcing_ratio_end=0.0, soft_beam_start_update=2, **schedule
    )
    model, sample = make_model(), make_sample(LENGTHS)
    for done, rho in ((1, 1.0), (2, 1.0), (3, 0.75), (6, 0.0)):
        train_steps(training_task, criterion, model, sample, [done - 1])  # the last update of so many
        assert criterion.eval().rho_and_epsilon()[0] == rho


def test_a_decorated_train_step_is_called_as_it_is(task, make_model, make_sample, make_criterion):
    class Task:
        def __init__(self):
            self.target_dictionary, self.seen = task.target_dictionary, []

        def train_step(self, sample, model, criterion, optimizer, update_num):
            self.seen.append(update_num)

    def decorated(method):
        @functools.wraps(method)
        def call(*args):
            return method(*args)

        return call

    Task.train_step = decorated(Task.train_step)
    mine = Task()
    criterions = [SoftBeamCriterion(mine, SoftBeamConfig(sentence_avg=False)) for _ in range(2)]
    mine.train_step(None, None, None, None, 5)
    assert mine.seen == [5] and [criterion.num_updates for criterion in criterions] == [None, 5]


def test_a_random_beam_wants_to_know_the_updates(make_model, make_sample, make_criterion):
    with pytest.raises(ValueError, match=r"--soft-beam-prob .* set_num_updates was not called"):
        make_criterion(soft_beam_prob=0.5).train()(make_model(), make_sample(LENGTHS))


def test_unknown_words_are_no_match(make_model, make_sample, make_criterion, task):
    """A model that writes nothing but unknown words gains nothing from references of unknown words."""
    model, sample = make_model().eval(), make_sample([(4, 5)])
    unk = task.target_dictionary.unk()
    sample["target"][:, :-1] = unk
    with torch.no_grad():
        model.decoder.fc_out.bias[unk] = 50.0  # type: ignore[union-attr]
        output = make_criterion(soft_beam_objective="risk")(model, sample)[2]
    assert float(output["beam_bleu"]) == 0
    assert float(output["soft_beam_risk"]) == pytest.approx(5)


def test_soft_beam_prob_is_the_share_of_updates_with_a_beam(make_criterion):
    """Every batch of an update draws the same; another seed draws otherwise; validation always runs it."""
    drawn = []
    for seed in (1, 1, 2):
        criterion = make_criterion(soft_beam_prob=0.3, seed=seed).train()
        draws = []
        for update in range(1000):
            criterion.set_num_updates(update)
            draws.append(criterion.rho_and_epsilon()[0] < 1)
        drawn.append(draws)
    assert drawn[0] == drawn[1] != drawn[2]
    assert 240 < sum(drawn[0]) < 360
    assert criterion.eval().rho_and_epsilon()[0] == 0.8


@pytest.mark.parametrize("prefix_size", [0, 1])
def test_risk_logs_its_own_quantities(make_model, make_sample, make_criterion, prefix_size):
    """The risk is per token that the beam may write, which a prefix is not."""
    model, sample = make_model(), make_sample(LENGTHS)
    criterion = make_criterion(
        soft_beam_objective="risk", teacher_forcing_ratio=0.0, soft_beam_prefix_size=prefix_size
    )
    size = sample["ntokens"]
    loss, _, logged = criterion(model, with_prefix(sample, 5) if prefix_size else sample)
    loss.backward()
    with metrics.aggregate(new_root=True) as aggregator:
        criterion.reduce_metrics([logged])
    values = aggregator.get_smoothed_values()
    assert values["soft_beam_risk"] == pytest.approx(float(loss.detach()) / size, abs=1e-3)
    assert 0 <= values["soft_beam_risk"] <= 1 and 0 <= values["beam_bleu"] <= 100
    assert "soft_beam_loss" not in values and "ppl" not in values
    assert logged["score_grad_norm"] > 0 and logged["score_grad_total"] > 0


def test_risk_falls_and_bleu_rises(make_model, make_sample, make_criterion):
    """A model can learn sentences from nothing but the BLEU of what it writes."""
    model, sample = make_model("topk_attention"), make_sample([(5, 6), (4, 6)])
    criterion = make_criterion(
        soft_beam_objective="risk", teacher_forcing_ratio=0.0, soft_beam_size=5, soft_beam_score_grad_clip=0.1
    )
    optimizer, bleu = torch.optim.Adam(model.parameters(), lr=0.03), []
    for _ in range(60):
        optimizer.zero_grad()
        loss, _, logged = criterion(model, sample)
        loss.backward()
        optimizer.step()
        bleu.append(float(logged["beam_bleu"]) / 2)
    assert sum(bleu[-5:]) / 5 > bleu[0] + 0.2


def test_low_sharpness_warns_once_and_says_what_to_change(caplog):
    logs = [{"beam_sharpness": torch.tensor(1.0), "beam_selections": 100, "sample_size": 1, "ntokens": 1}]
    soft_beam._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING), metrics.aggregate(new_root=True):
        for _ in range(3):
            SoftBeamCriterion.reduce_metrics([{**logs[0], "beam_sharpness": 90}])
        assert not caplog.records
        for _ in range(3):
            SoftBeamCriterion.reduce_metrics(logs)
    assert len(caplog.records) == 1
    assert "lower --soft-beam-epsilon" in caplog.text


def test_options_reach_the_search(make_criterion):
    options = {
        "size": 4, "epsilon": 0.3, "relaxation": "straight_through", "cost_scale": "max", "objective": "risk",
        "backward_epsilon": 0.7, "detach": "scores", "horizon": 5, "recompute": True, "max_len": 9,
        "eos_weight": 1.0, "hypotheses": 6, "temperature": 0.2, "brevity_smoothing": 1.5,
    }  # fmt: skip
    names = {"score_grad_clip": "score_grad_bound", "candidates": "num_candidates"}
    given = {
        f"soft_beam_{name}": value
        for name, value in {**options, "score_grad_clip": 0.7, "candidates": 33}.items()
    }
    beam = make_criterion(label_smoothing=0.1, **given).beam
    expected = {
        **options,
        **{names[name]: given[f"soft_beam_{name}"] for name in names},
        "label_smoothing": 0.1,
    }
    assert dataclasses.asdict(beam) == {**expected, "eos": 2, "unk": 3, "never": (1, 0), "words": None}
    assert make_criterion(soft_beam_eos_weight=0.5).beam.eos_weight == 0.5


def test_the_risk_is_of_words(task, make_model, make_sample, make_criterion):
    """No token but one, which no target has, has a "▁", and none but bos, which none writes, a "@@"."""
    model, sample = make_model("topk_attention"), make_sample(LENGTHS)
    task.target_dictionary.symbols[-1], task.target_dictionary.symbols[0] = "▁w", "<s>@@"
    assert len(task.target_dictionary) - 1 not in sample["target"]
    risks = {}
    for scheme in ("none", "subword_nmt", "sentencepiece"):
        criterion = make_criterion(
            soft_beam_objective="risk", soft_beam_post_process=scheme, soft_beam_brevity_smoothing=0.0
        )
        assert not criterion.state_dict()  # nothing for a checkpoint to hold
        _, _, logged = criterion(model, sample)
        risks[scheme] = logged["soft_beam_risk"].item()
    assert risks["none"] == risks["subword_nmt"] < risks["sentencepiece"]
    assert logged["beam_bleu"] == 0


def test_an_adaptive_softmax_of_an_lstm_takes_what_comes_before_the_last_layer(
    make_model, make_sample, make_criterion
):
    """fairseq's LSTM builds that layer where sizes differ, and does not use it before an adaptive softmax."""
    options = {"adaptive_softmax_cutoff": "6", "decoder_out_embed_dim": 4, "criterion": "adaptive_loss"}
    model = make_model("lstm", **options)
    loss = make_criterion(teacher_forcing_ratio=0.0)(model, make_sample(LENGTHS))[0]
    loss.backward()
    assert loss.isfinite() and model.decoder.adaptive_softmax.head.weight.grad.abs().max() > 0
