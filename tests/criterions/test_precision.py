"""fairseq's half precisions, as far as they run on a CPU, and what a loss is divided by."""

from unittest import mock

import fairseq_runs
import pytest
import torch

from fairseq_softtopk.beam import search, selection
from fairseq_softtopk.criterions.soft_beam import SoftBeamConfig, SoftBeamCriterion

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # fairseq's and hydra's

UPDATES = 4
OPTIONS = ["--optimizer", "adam", "--lr", "0.01", "--max-tokens", "60", "--dropout", "0"]
# BLEU jumps with a word, words with a rounding, and so does the gradient of a sharp selection.
OPTIONS += ["--soft-beam-objective", "gold", "--soft-beam-epsilon", "0.1", "--teacher-forcing-ratio", "0.2"]
# --amp is absent: fairseq autocasts for CUDA only, so on a CPU it is float32 (see the test of autocast below).
# bf16 has no option that a CPU accepts: Hydra's common.bf16 sets the same field.
PRECISIONS = {
    "fp16": (["--fp16", "--fp16-no-flatten-grads"], torch.float16, 0.01),
    "memory-efficient-fp16": (["--memory-efficient-fp16"], torch.float16, 0.01),
    "bf16": ([], torch.bfloat16, 0.05),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return fairseq_runs.write_corpus(tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def float32(corpus):
    """What the first updates log in float32."""
    return fairseq_runs.train(fairseq_runs.make_trainer(fairseq_runs.configure(corpus, *OPTIONS)), UPDATES)


@pytest.fixture
def selections():
    """The precisions of the log-probabilities, the scores and the weights of every selection."""
    seen = set()

    def watched_candidates(cumulative, lprobs, *args):
        candidates = best_candidates(cumulative, lprobs, *args)
        seen.update({cumulative.dtype, lprobs.dtype, candidates.scores.dtype})
        return candidates

    def watched_topk(scores, *args, **kwargs):
        weights = sorted_soft_topk(scores, *args, **kwargs)
        seen.update({scores.dtype, weights.dtype})
        return weights

    best_candidates, sorted_soft_topk = search.best_candidates, selection.sorted_soft_topk
    with (
        mock.patch.object(search, "best_candidates", watched_candidates),
        mock.patch.object(selection, "sorted_soft_topk", watched_topk),
    ):
        yield seen


@pytest.mark.parametrize("name", PRECISIONS)
def test_trains_in_half_precision_and_selects_in_float32(corpus, float32, selections, name):
    options, dtype, tolerance = PRECISIONS[name]
    cfg = fairseq_runs.configure(corpus, *OPTIONS, *options)
    cfg.common.bf16 = name == "bf16"
    cfg.common.fp16_no_flatten_grads = True
    trainer = fairseq_runs.make_trainer(cfg)
    start = fairseq_runs.parameters(trainer).clone()
    logged = fairseq_runs.train(trainer, UPDATES)
    weights = fairseq_runs.parameters(trainer)
    assert len(logged) == UPDATES and None not in logged  # no update was skipped for an overflow
    assert weights.dtype == dtype and weights.isfinite().all()
    assert (weights - start).abs().max() > 0.01
    assert selections == {torch.float32}
    for half, full in zip(logged, float32, strict=True):
        for key in "loss", "teacher_forcing_loss", "soft_beam_loss":
            assert half[key] == pytest.approx(full[key], rel=tolerance)
        assert half["score_grad_norm"] == pytest.approx(full["score_grad_norm"], rel=0.3)


def test_autocast_selects_in_float32(make_model, make_sample, task, selections):
    """What --amp does on a GPU."""
    model, sample = make_model("topk_attention").float(), make_sample([(5, 4), (3, 6), (2, 1), (4, 2)])
    criterion = SoftBeamCriterion(task, SoftBeamConfig(sentence_avg=False, soft_beam_size=3))
    expected = criterion(model, sample)[0]
    selections.clear()
    products = []
    model.decoder.layers[0].register_forward_hook(lambda _module, _args, state: products.append(state[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model, sample)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and selections == {torch.float32}
    assert torch.bfloat16 in products  # autocast was on
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    assert all(
        p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all())
        for p in model.parameters()
    )


@pytest.mark.parametrize("average", [[], ["--sentence-avg"]], ids=["per token", "per sentence"])
@pytest.mark.parametrize("rho", ["0.8", "0"])
def test_an_update_is_the_gradient_of_all_its_batches_over_their_size(corpus, average, rho):
    """Batches of other numbers of tokens and sentences: the mean of their means is something else."""
    learning_rate = 0.5
    cfg = fairseq_runs.configure(
        corpus,
        *OPTIONS,
        "--optimizer",
        "sgd",
        "--lr",
        str(learning_rate),
        "--teacher-forcing-ratio",
        rho,
        *average,
    )

    def start():
        trainer = fairseq_runs.make_trainer(cfg, torch.float64)
        trainer.get_train_iterator(epoch=1)
        trainer.lr_step(1)
        return trainer, trainer.task.dataset("train")

    def step(*batches: range):
        trainer, dataset = start()
        before = fairseq_runs.parameters(trainer).clone()
        trainer.train_step([dataset.collater([dataset[i] for i in batch]) for batch in batches])
        return fairseq_runs.parameters(trainer) - before

    first, second, both = range(3), range(3, 8), range(8)
    trainer, dataset = start()
    sample = dataset.collater([dataset[i] for i in both])
    lengths = sample["target"].ne(dataset.tgt_dict.pad()).sum(1)
    loss, _, _ = trainer.criterion(trainer.model, sample)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    expected = -learning_rate * gradient / (len(both) if average else lengths.sum())
    # A selection is solved to 1e-9 or better, in as many steps as the slowest of those beside it wants.
    torch.testing.assert_close(step(first, second), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(step(both), expected, rtol=0, atol=1e-14)
