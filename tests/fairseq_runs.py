"""fairseq-train inside a process of the tests: its own parser, task, trainer and loop, without its start-up."""

import math
import random

import torch
from fairseq import options, tasks, utils
from fairseq.data import iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from fairseq_cli import preprocess

import fairseq_softtopk.plugin  # noqa: F401  (in place of --user-dir)

COMMON = [
    "--arch", "topk_attention_tiny", "--criterion", "soft_beam", "--soft-beam-size", "3",
    "--soft-beam-candidates", "12",
    "--encoder-embed-dim", "16", "--encoder-hidden-size", "16", "--decoder-embed-dim", "16",
    "--decoder-hidden-size", "16", "--decoder-out-embed-dim", "16", "--share-all-embeddings",
    "--required-batch-size-multiple", "1", "--num-workers", "0", "--cpu",
]  # fmt: skip


def write_corpus(folder):
    """Writes ``folder/data-bin``: sentences of 1 to 4 words, each translated word by word."""
    chance = random.Random(1)
    for split, size in (("train", 200), ("valid", 13)):
        lines = [[chance.randrange(12) for _ in range(chance.randint(1, 4))] for _ in range(size)]
        for language in "en", "de":
            text = "".join(" ".join(f"{language}{word}" for word in line) + "\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text)
    arguments = ["-s", "en", "-t", "de", "--joined-dictionary", "--destdir", str(folder / "data-bin")]
    arguments += ["--trainpref", str(folder / "train"), "--validpref", str(folder / "valid")]
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
    return folder


def configure(corpus, *arguments: str):
    """The configuration that ``fairseq-train corpus/data-bin`` makes of its arguments."""
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, input_args=[str(corpus / "data-bin"), *COMMON, *arguments])
    return convert_namespace_to_omegaconf(args)


class Float64Trainer(Trainer):
    """fairseq takes the norm of the gradients in float32, and cannot of float64."""

    def clip_grad_norm(self, clip_norm):
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm or math.inf)


def make_trainer(cfg, dtype=torch.float32) -> Trainer:
    """fairseq's trainer of such a configuration, with the weights of its seed."""
    utils.set_torch_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model).to(dtype)
    for parameter in model.parameters():  # fairseq's initial weights hardly tell tokens apart
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    kind = Float64Trainer if dtype == torch.float64 else Trainer
    return kind(cfg, task, model, task.build_criterion(cfg.criterion))


def train(trainer: Trainer, updates: int) -> list[dict]:
    """Runs the first updates, over as many epochs as they take; returns what each one logged."""
    logged: list[dict] = []
    epochs = trainer.get_train_iterator(epoch=1)
    trainer.lr_step(1)
    while True:
        batches = epochs.next_epoch_itr(shuffle=True)
        for samples in iterators.GroupedIterator(batches, trainer.cfg.optimization.update_freq[0]):
            logged.append(trainer.train_step(samples))
            if len(logged) == updates:
                return logged


def parameters(trainer: Trainer) -> torch.Tensor:
    """All weights in one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.get_model().parameters()])
