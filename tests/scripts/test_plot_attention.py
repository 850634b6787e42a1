"""What is drawn is the attention of the model's own translation, with the tokens that the model saw."""

import importlib.util
from pathlib import Path

import fairseq_runs
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_attention.py"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # fairseq's and hydra's


@pytest.fixture(scope="module")
def plot_attention():
    spec = importlib.util.spec_from_file_location("plot_attention", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return fairseq_runs.write_corpus(tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module")
def checkpoint(corpus):
    folder = corpus / "soft_beam" / "seed1"
    folder.mkdir(parents=True)
    options = ["--optimizer", "sgd", "--lr", "0.1", "--max-tokens", "40", "--no-save-optimizer-state"]
    trainer = fairseq_runs.make_trainer(fairseq_runs.configure(corpus, *options))
    fairseq_runs.train(trainer, 1)
    trainer.save_checkpoint(str(folder / "model.pt"), {"train_iterator": {"epoch": 1}})
    return folder / "model.pt"


def test_the_weights_of_a_target_token_sum_to_one(plot_attention, corpus, checkpoint):
    shown = plot_attention.translate(checkpoint, corpus / "data-bin", "en3 en5 en3", tokenized=True)
    assert shown.title == "soft_beam/seed1: soft_topk"
    assert shown.source == ["en3", "en5", "en3", "</s>"] and shown.target[-1] == "</s>"
    assert shown.attention.shape == (len(shown.target), len(shown.source))
    torch.testing.assert_close(shown.attention.sum(1), torch.ones(len(shown.target)))


def test_what_the_dictionary_does_not_have_is_marked(plot_attention, corpus, checkpoint):
    shown = plot_attention.translate(checkpoint, corpus / "data-bin", "en3 En5", tokenized=True)
    assert shown.source == ["en3", "En5 <unk>", "</s>"]


@pytest.mark.parametrize(("escape", "mark"), [(True, "&amp;"), (False, "&")])
def test_tokens_are_escaped_where_those_of_training_are(plot_attention, escape, mark):
    assert plot_attention.split("en3 & en5", "en", None, False, escape, lowercase=False) == f"en3 {mark} en5"


def test_letters_are_lower_cased_after_tokenising(plot_attention):
    """Moses takes a dot off "no.", but not off "No. 5"."""
    assert plot_attention.split("No. 5 .", "en", None, False, True, lowercase=True) == "no. 5 ."


def test_is_drawn(plot_attention, corpus, checkpoint, monkeypatch):
    out = corpus / "attention.png"
    command = ["plot_attention.py", str(corpus / "data-bin"), str(checkpoint)]
    monkeypatch.setattr("sys.argv", [*command, "--lowercase", "--sentence", "EN3 en5", "--out", str(out)])
    drawn = []
    draw = plot_attention.draw
    monkeypatch.setattr(plot_attention, "draw", lambda shown, out: drawn.extend(shown) or draw(shown, out))
    plot_attention.main()
    assert out.stat().st_size > 10_000
    assert drawn[0].source == ["en3", "en5", "</s>"]


def test_a_dollar_is_a_token_and_no_formula(plot_attention, tmp_path):
    tokens = ["$\\foo$", "$$"]
    shown = plot_attention.Translation("a $\\bar$", tokens, tokens, torch.eye(2))
    plot_attention.draw([shown], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
