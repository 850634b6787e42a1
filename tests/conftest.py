"""One seed per test, and small fairseq models, tasks and batches to test with."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.fixture
def task():
    """A translation task as far as models and criterions look at it: two dictionaries of 12 words."""
    from fairseq.data import Dictionary

    dictionary = Dictionary()
    for word in range(12):
        dictionary.add_symbol(f"w{word}")
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


@pytest.fixture
def make_model(task):
    """Builds a tiny model in float64, without dropout: ``make_model("topk_attention", **options)``."""
    from fairseq.models import ARCH_MODEL_REGISTRY

    import fairseq_softtopk.plugin  # noqa: F401  (registers the architectures)

    def build(arch: str = "lstm", **options):
        sizes = {
            name: 8
            for name in (
                "encoder_embed_dim",
                "encoder_hidden_size",
                "decoder_embed_dim",
                "decoder_hidden_size",
                "decoder_out_embed_dim",
                "encoder_ffn_embed_dim",
                "decoder_ffn_embed_dim",
            )
        }
        sides = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
        transformer = dict.fromkeys(sides, 2)
        topk = {"attention_top_k": 2}
        own = {
            "lstm": {},
            "topk_attention": topk,
            "topk_attention_transformer": {**topk, **transformer},
        }.get(arch, transformer)
        settings = {"dropout": 0.0, "criterion": None, **sizes, **own, **options}
        model = ARCH_MODEL_REGISTRY[arch].build_model(Namespace(**settings), task).double()
        for parameter in model.parameters():  # fairseq's initial weights hardly tell tokens apart
            torch.nn.init.uniform_(parameter, -1, 1)
        return model

    return build


@pytest.fixture
def exact_softmax(monkeypatch):
    """Lets fairseq's Transformer attend in float64, to compare digits: its own softmax is float32."""
    monkeypatch.setattr("fairseq.utils.softmax", lambda x, dim, onnx_trace=False: torch.softmax(x, dim))


@pytest.fixture
def make_criterion(task):
    """Builds ``soft_beam`` with the paper's loss, three beams and a bound: ``make_criterion(**options)``."""
    from fairseq_softtopk.criterions.soft_beam import SoftBeamConfig, SoftBeamCriterion

    def build(**options):
        gold = {"soft_beam_objective": "gold", "teacher_forcing_ratio": 0.8, "soft_beam_epsilon": 0.1}
        settings = {
            "sentence_avg": False,
            "seed": 1,
            "soft_beam_size": 3,
            "soft_beam_score_grad_clip": 0.5,
            **gold,
            **options,
        }
        return SoftBeamCriterion(task, SoftBeamConfig(**settings))

    return build


@pytest.fixture
def make_sample(task):
    """Makes a batch as fairseq's translation task does: ``make_sample([(source length, target length)])``."""
    from fairseq.data.language_pair_dataset import collate

    def make(lengths: list[tuple[int, int]], seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        dictionary = task.target_dictionary

        def sentence(length: int) -> torch.Tensor:
            words = torch.randint(dictionary.nspecial, len(dictionary), (length - 1,), generator=generator)
            return torch.cat([words, torch.tensor([dictionary.eos()])])

        pairs = [
            {"id": i, "source": sentence(source), "target": sentence(target)}
            for i, (source, target) in enumerate(lengths)
        ]
        return collate(pairs, dictionary.pad(), dictionary.eos(), left_pad_source=True)

    return make


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A folder with 200 sentence pairs of the embedded corpus: text, BPE codes and ``data-bin``."""
    folder = tmp_path_factory.mktemp("tiny")
    script = Path(__file__).parents[1] / "scripts" / "write_corpus.py"
    commands = f"""
    set -euo pipefail
    {sys.executable} {script} --target de --out . --train 200 --valid 20 --test 13
    for split in train valid test; do
      for lang in en de; do sacremoses -q -l $lang tokenize -a < $split.$lang > $split.tok.$lang; done
    done
    cat train.tok.en train.tok.de | subword-nmt learn-bpe -s 200 -o codes
    for split in train valid test; do
      for lang in en de; do subword-nmt apply-bpe -c codes < $split.tok.$lang > $split.bpe.$lang; done
    done
    fairseq-preprocess -s en -t de --joined-dictionary --destdir data-bin \\
      --trainpref train.bpe --validpref valid.bpe --testpref test.bpe
    """
    done = subprocess.run(["bash", "-c", commands], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def shell(tiny_corpus):
    """Runs a command in the folder of the tiny corpus; returns what it printed, stdout first."""

    def run(command: list[str], stdin: str = "") -> str:
        done = subprocess.run(
            command, cwd=tiny_corpus, input=stdin, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run
