"""What goes wrong in a training run: it is killed, its checkpoint is broken, its model diverges."""

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import fairseq_runs
import pytest
import torch
from fairseq_cli import generate, validate
from fairseq_cli import train as fairseq_train

from fairseq_softtopk.criterions.soft_beam import SoftBeamConfig, SoftBeamCriterion

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # fairseq's and hydra's

OPTIONS = ["--optimizer", "adam", "--lr", "0.01", "--max-tokens", "40", "--dropout", "0.2"]
OFTEN = ["--save-interval-updates", "3", "--no-epoch-checkpoints", "--max-update", "12"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return fairseq_runs.write_corpus(tmp_path_factory.mktemp("faults"))


@pytest.fixture(autouse=True)
def one_thread():
    """Sums come out the same, to the last bit, only in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(corpus, tmp_path):
    """Runs fairseq-train in this process, returns its folder of checkpoints."""

    def train(*options: str, folder: Path = tmp_path / "checkpoints") -> Path:
        fairseq_train.main(fairseq_runs.configure(corpus, *OPTIONS, "--save-dir", str(folder), *options))
        return folder

    return train


def test_a_killed_run_ends_where_the_uninterrupted_one_does(corpus, tmp_path, run):
    expected = torch.load(run(*OFTEN) / "checkpoint_last.pt", weights_only=False)
    folder = tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        "from fairseq_cli.train import cli_main; cli_main()",
        str(corpus / "data-bin"),
    ]
    command += [*fairseq_runs.COMMON, *OPTIONS, *OFTEN, "--save-dir", str(folder)]
    command += ["--user-dir", str(Path(fairseq_runs.fairseq_softtopk.__file__).parent)]
    with subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint_1_6.pt").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    # The copy of the checkpoint may have been what it was killed in.
    (folder / "checkpoint_last.pt").write_bytes((folder / "checkpoint_1_6.pt").read_bytes())
    resumed = torch.load(run(*OFTEN, folder=folder) / "checkpoint_last.pt", weights_only=False)
    assert resumed["optimizer_history"][-1]["num_updates"] == 12
    assert resumed["model"].keys() == expected["model"].keys()
    assert all(torch.equal(resumed["model"][name], weight) for name, weight in expected["model"].items())
    moments = [state["last_optimizer_state"]["state"] for state in (expected, resumed)]
    for state, again in zip(moments[0].values(), moments[1].values(), strict=True):
        assert torch.equal(state["exp_avg"], again["exp_avg"])


def test_resumes_exactly_in_a_later_epoch(run, tmp_path):
    """fairseq makes the batches of all epochs in the one that it starts in, unless it is told otherwise."""
    options = ["--save-interval-updates", "3", "--no-epoch-checkpoints", "--max-update", "24"]
    options += ["--update-epoch-batch-itr", "True", "--update-freq", "2", "--soft-beam-prob", "0.6"]
    options += ["--teacher-forcing-ratio", "0.2", "--teacher-forcing-ratio-schedule", "linear"]
    options += ["--teacher-forcing-ratio-updates", "20"]
    folder, again = run(*options), tmp_path / "again"
    again.mkdir()
    (again / "checkpoint_last.pt").write_bytes((folder / "checkpoint_2_15.pt").read_bytes())
    weights = [
        torch.load(path / "checkpoint_last.pt", weights_only=False)["model"]
        for path in (folder, run(*options, folder=again))
    ]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


class Payload:
    """Makes a folder when it is unpickled by a reader that trusts the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    options = [*OPTIONS, "--max-update", "1", "--no-epoch-checkpoints", "--save-dir", str(folder)]
    fairseq_train.main(fairseq_runs.configure(corpus, *options))
    return folder / "checkpoint_last.pt"


def restore(corpus, path):
    fairseq_train.main(fairseq_runs.configure(corpus, *OPTIONS, "--no-save", "--restore-file", str(path)))


def restart(corpus, path):
    """What happens without an option, after a kill in the middle of a copy."""
    fairseq_train.main(fairseq_runs.configure(corpus, *OPTIONS, "--save-dir", str(path.parent)))


def finetune(corpus, path):
    fairseq_train.main(
        fairseq_runs.configure(corpus, *OPTIONS, "--no-save", "--finetune-from-model", str(path))
    )


def read(parser, main, corpus, path, *options):
    parse = fairseq_runs.options.parse_args_and_arch
    main(
        fairseq_runs.convert_namespace_to_omegaconf(
            parse(
                parser, [str(corpus / "data-bin"), "--path", str(path), "--cpu", "--max-tokens", "99", *options]
            )
        )
    )


def generates(corpus, path):
    read(fairseq_runs.options.get_generation_parser(), generate.main, corpus, path, "--gen-subset", "valid")


def validates(corpus, path):
    parser = fairseq_runs.options.get_validation_parser("translation")
    read(parser, validate.main, corpus, path, "--task", "translation")


@pytest.mark.parametrize("command", [generates, validates])
def test_a_whole_checkpoint_is_read(corpus, checkpoint, command):
    command(corpus, checkpoint)


@pytest.mark.parametrize("command", [restore, restart, finetune, generates, validates])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", "failed reading zip archive"),
        ("garbage", "Weights only load failed|invalid load key"),
        ("empty", r"checkpoint_last\.pt is not a checkpoint, or was cut off: EOFError"),
        ("text", r"checkpoint_last\.pt is not a checkpoint, or was cut off|Weights only load failed"),
        ("payload", r"Weights only load failed(.|\n)*(mkdir|posix)"),
    ],
)
def test_a_broken_checkpoint_is_an_error_and_runs_nothing(
    corpus, checkpoint, tmp_path, command, fault, message
):
    path, trap = tmp_path / "checkpoint_last.pt", tmp_path / "trap"
    if fault == "payload":
        torch.save({**torch.load(checkpoint), "payload": Payload(trap)}, path)
    else:
        whole = checkpoint.read_bytes()
        contents = {
            "truncated": whole[: len(whole) // 2],
            "garbage": bytes(range(256)) * 40,
            "empty": b"",  # of a run that was killed when it had begun to copy a checkpoint
            "text": b"hello\n" * 100,
        }
        path.write_bytes(contents[fault])
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match=message):
        command(corpus, path)
    assert not trap.exists()


LSTM = ["--arch", "lstm", "--encoder-bidirectional", "--share-decoder-input-output-embed"]


@pytest.fixture
def trainer(corpus, tmp_path):
    """A trainer of stock ``lstm``, whose attention does not look for NaN itself."""

    def make(*options: str):
        cfg = fairseq_runs.configure(corpus, *LSTM, *OPTIONS, "--save-dir", str(tmp_path), *options)
        return fairseq_runs.make_trainer(cfg)

    return make


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("rho", "message"),
    [
        ("1", "soft_beam: the teacher-forcing loss of a batch is nan"),
        ("0.8", "soft_beam: the teacher-forcing loss of a batch is nan"),
        ("0", "soft_beam: the model's log-probabilities at step 1 of the beam search contain NaN"),
    ],
)
@pytest.mark.parametrize("precision", [[], ["--amp"], ["--fp16", "--fp16-no-flatten-grads"]], ids=str)
def test_a_weight_that_is_not_finite_ends_training_with_its_name(trainer, value, rho, message, precision):
    broken = trainer("--teacher-forcing-ratio", rho, *precision)
    with torch.no_grad():
        broken.get_model().decoder.embed_tokens.weight[5] = value
    with pytest.raises(FloatingPointError, match=message):
        fairseq_runs.train(broken, 3)


def test_gradients_that_are_not_finite_end_training(trainer):
    """fairseq's own check, of the gradient's norm."""
    broken = trainer()
    broken.get_model().decoder.embed_tokens.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        fairseq_runs.train(broken, 1)


def test_a_last_step_that_diverges_is_caught_in_validation_before_the_checkpoint_is_written(run, tmp_path):
    with pytest.raises(FloatingPointError, match="soft_beam: the teacher-forcing loss of a batch is nan"):
        run(*LSTM, "--optimizer", "sgd", "--lr", "1e38", "--max-update", "1")
    assert not list(tmp_path.rglob("*.pt"))


def test_a_nan_at_a_later_step_is_named(make_model, make_sample, task):
    model, steps = make_model(), []

    def spoil(_module, _args, logits):
        steps.append(logits)
        return logits * math.nan if len(steps) == 3 else logits

    options = {"sentence_avg": False, "seed": 1, "soft_beam_objective": "gold", "teacher_forcing_ratio": 0.0}
    criterion = SoftBeamCriterion(task, SoftBeamConfig(**options))
    model.decoder.fc_out.register_forward_hook(spoil)
    with pytest.raises(
        FloatingPointError, match="at step 3 of the beam search contain NaN; the model has diverged"
    ):
        criterion(model, make_sample([(3, 5), (2, 4)]))


def test_a_gold_token_without_probability_is_named(make_model, make_sample, task):
    model, sample = make_model(), make_sample([(3, 2)])
    options = {"sentence_avg": False, "seed": 1, "soft_beam_objective": "gold", "teacher_forcing_ratio": 0.0}
    criterion = SoftBeamCriterion(task, SoftBeamConfig(**options))
    gold = sample["target"][0, 0]

    def forbid(_module, _args, logits):
        return logits.index_fill(-1, gold, -math.inf)

    model.decoder.fc_out.register_forward_hook(forbid)
    with pytest.raises(FloatingPointError, match="soft_beam: the soft beam's loss of a batch is inf"):
        criterion(model, sample)
